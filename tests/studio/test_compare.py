"""Methods side by side: one job, the same seed, what cannot work named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adapters.errors import Cancelled, InputError
from adapters.progress import Progress, Silent
from studio.composition import comparison as compare
from studio.composition.comparison_schema import CompareConfig
from studio.composition.schema import ComposeConfig

REGION = {"box": [0, 0, 0.5, 1], "adapters": ["fox"]}


def config(**values: Any) -> CompareConfig:
    return CompareConfig.parse({"prompt": "a fox", "adapters": [{"name": "fox", "path": "fox"}], "seed": 4, **values})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ComposeConfig]:
    """The compositions that were asked for; ``switch`` refuses."""
    seen: list[ComposeConfig] = []

    def run(one: ComposeConfig, folder: Path, monitor: Any) -> dict[str, Any]:
        seen.append(one)
        if one.method == "switch":
            raise InputError("not with these.")
        monitor.report(Progress("denoising", 1, 2))
        path = folder / f"picture-{one.seed}.png"
        Image.new("RGB", (64, 48), "red").save(path)
        return {"images": [str(path)], "regions": [], "remarks": []}

    monkeypatch.setattr("studio.composition.job.run", run)
    return seen


def test_one_picture_per_method_with_everything_else_the_same(tmp_path: Path, asked: list[ComposeConfig]) -> None:
    result = compare.run(config(methods=["merge", "switch", "composite"], images=3), tmp_path, Silent())
    assert [one.method for one in asked] == ["merge", "switch", "composite"]
    assert {(one.seed, one.images, one.prompt) for one in asked} == {(4, 1, "a fox")}
    assert result["methods"] == ["merge", "composite"]
    assert result["skipped"] == {"switch": "not with these."}
    assert [Path(path).parent.name for path in result["images"]] == ["merge", "composite"]
    with Image.open(result["grid"]) as grid:
        assert grid.size == (2 * 256 + 3 * compare.GAP, 192 + compare.LABEL + 2 * compare.GAP)


def test_nothing_possible_is_an_error_with_the_reasons(tmp_path: Path, asked: list[ComposeConfig]) -> None:
    with pytest.raises(InputError, match=r"None of the methods.*Switch: not with these"):
        compare.run(config(methods=["switch"]), tmp_path, Silent())
    assert len(asked) == 1


def test_stopping_is_not_a_method_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> Any:
        raise Cancelled("stopped")

    monkeypatch.setattr("studio.composition.job.run", stop)
    with pytest.raises(Cancelled):
        compare.run(config(methods=["merge"]), tmp_path, Silent())


@pytest.mark.usefixtures("asked")
def test_progress_goes_up_once(tmp_path: Path) -> None:
    class Steps(Silent):
        seen: list[tuple[int, int]]

        def __init__(self) -> None:
            self.seen = []

        def report(self, progress: Progress) -> None:
            self.seen.append((progress.step, progress.total))

    steps = Steps()
    compare.run(config(methods=["merge", "composite"]), tmp_path, steps)
    assert steps.seen == [(1, 4), (3, 4)]


def test_methods_without_regions_are_used_without_them() -> None:
    both = config(methods=["activation", "merge"], regions=[REGION], self_mask=True)
    assert both.of("activation").regions
    assert both.of("activation").self_mask is True
    assert both.of("merge").regions == []
    assert both.of("merge").self_mask is None


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"methods": []}, "at least one"),
        ({"methods": ["merge", "merge"]}, "twice"),
        ({"methods": ["cross"]}, "'cross' needs regions"),
        ({}, "methods"),
    ],
)
def test_wrong_choices_are_sentences(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        config(**values)
