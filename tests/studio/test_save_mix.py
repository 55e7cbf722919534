"""The mix as one LoRA: it draws what the merge draws, and what is no sum is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adapters.errors import InputError
from adapters.progress import Silent
from studio import library
from studio.composition import job, save_mix
from studio.composition.schema import ComposeConfig

USES: list[dict[str, Any]] = [
    {"name": "fox", "path": "fox", "weight": 0.8, "te_weight": 0.5, "triggers": ["fox"]},
    {"name": "robot", "path": "robot", "weight": 0.6, "blocks": {"down_blocks.1": 0.25}, "triggers": ["robot"]},
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path))


def composition(**values: Any) -> ComposeConfig:
    return ComposeConfig.parse({"prompt": "a fox and a robot", "steps": 3, "seed": 1, "adapters": USES, **values})


def pixels(config: ComposeConfig, folder: Path) -> np.ndarray:
    folder.mkdir()
    with Image.open(job.run(config, folder, Silent())["images"][0]) as picture:
        return np.array(picture.convert("RGB"), dtype=int)


def test_one_lora_draws_what_the_merge_drew(tmp_path: Path) -> None:
    drawn = pixels(composition(), tmp_path / "merge")
    name, accuracy = save_mix.save(composition(), "my mix", preview=tmp_path / "merge" / "picture-1.png")
    record = library.find(name)
    assert "layers against the exact sum: " in accuracy
    assert float(record.notes["accuracy"].removeprefix("largest relative error ").split()[0]) < 1e-6
    assert (record.name, set(record.triggers), record.problem) == ("my mix", {"fox", "robot"}, "")
    assert record.preview is not None
    again = pixels(composition(adapters=[{"path": "my mix"}]), tmp_path / "mix")
    base = pixels(composition(adapters=[]), tmp_path / "base")
    assert np.abs(drawn - again).max() <= 2
    assert np.abs(drawn - base).mean() > 3
    assert save_mix.save(composition(), "my mix").name == "my mix-2"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "switch"}, "Only what Merge shows"),
        ({"adapters": []}, "no adapter to save"),
        ({"adapters": [{**USES[0], "schedule": [[0, 1], [1, 0]]}]}, "part of the steps"),
    ],
)
def test_what_is_no_sum_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        save_mix.check(composition(**values))
