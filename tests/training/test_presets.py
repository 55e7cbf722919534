"""Presets: one key for every kind of training and every way to give it; and what they come to on the shipped base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import InputError
from studio.cli.app import run as command
from studio.jobs import kinds
from studio.schema import JobConfig
from studio.training.presets import MEASURED, PRESETS

NEEDED: dict[str, dict[str, Any]] = {
    "train-image": {"data": "x", "trigger": "zxq"},
    "train-language": {"data": "x"},
    "distill": {"prompts": "x"},
}
COMMANDS = {"train-image": "image", "train-language": "language", "distill": "distill"}


def parse(kind: str, **values: Any) -> JobConfig:
    return kinds.find(kind).parse({**NEEDED[kind], **values})


@pytest.mark.parametrize("kind", NEEDED)
def test_every_preset_sets_what_it_says_and_given_keys_win(kind: str) -> None:
    for name, values in PRESETS[kind].items():
        made = parse(kind, preset=name, base="elsewhere").model_dump(mode="json")
        assert made.items() >= {**values, "preset": name, "base": "elsewhere"}.items()
        given = parse(kind, preset=name, base="elsewhere", rank=3, steps=7).model_dump(mode="json")
        assert given == {**made, "rank": 3, "steps": 7}
        assert parse(kind, **given).model_dump(mode="json") == given, "a whole recipe is not changed by its preset"
    for base, measured in MEASURED.items():
        for name, values in PRESETS[kind].items():
            made = parse(kind, preset=name, base=base).model_dump()
            assert made.items() >= {**values, **measured.get(kind, {}), **measured.get(f"{kind} {name}", {})}.items()
        assert parse(kind, base=base).model_dump().items() >= measured.get(kind, {}).items()
    with pytest.raises(InputError, match=r"no preset 'nrmal'.*choose"):
        parse(kind, preset="nrmal")


@pytest.mark.parametrize("kind", NEEDED)
def test_yaml_flags_and_python_take_a_preset_alike(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[JobConfig] = []
    monkeypatch.setattr("studio.training.commands.run.begin", lambda config, *more: seen.append(config))
    name = list(PRESETS[kind])[-1]
    needed = [word for key, value in NEEDED[kind].items() for word in (f"--{key}", value)]
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({**NEEDED[kind], "preset": name, "rank": 5}))
    (train, group) = ("train", COMMANDS[kind])
    assert command([train, group, *needed, "--preset", name, "--rank", "5", "--quiet"]) == 0
    assert command([train, group, str(file), "--quiet"]) == 0
    assert command([train, group, str(file), "--preset", next(iter(PRESETS[kind])), "--preset", name, "-q"]) == 0
    assert capsys.readouterr().err == ""
    assert seen == [parse(kind, preset=name, rank=5)] * 3


@pytest.mark.slow
def test_the_quickest_preset_of_the_page_shows_its_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import assets
    from adapters.progress import Silent
    from assets.build.judge import load_judge
    from benchmarks.presets import cut, judged, page_config
    from studio.training.tasks.image import run

    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path / "home"))
    pictures = cut(assets.path("adapters/fox/samples.png"), tmp_path / "pictures")
    assert len(list(pictures.iterdir())) == 24
    config = page_config("concept-quick", pictures, "fox")
    result = run(config, tmp_path / "run", Silent())
    drawn = judged(result["adapter"], ["a picture of fox"] * 10, ["fox"] * 10, load_judge())
    assert drawn["subject"] >= 0.7
    assert len(result["samples"]) == 4
    assert result["pairs"][0]["prompt"] == "a picture of fox", "drawn without being asked for"
