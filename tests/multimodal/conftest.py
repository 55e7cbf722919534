"""Shared by the vision-language tests: a tiny LLaVA on disk, pictures with questions, a studio home of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from studio.training.schemas.vision_language import TrainVisionLanguageConfig
from tests.multimodal import tiny

COLOURS = ("red", "blue", "green", "white", "black", "pink")


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path_factory.getbasetemp() / "multimodal-home"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def sights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of one colour, asked for it."""
    folder = tmp_path_factory.mktemp("sights")
    (folder / "pictures").mkdir()
    rows = []
    for colour in COLOURS:
        Image.new("RGB", (24, 16), colour).save(folder / "pictures" / f"{colour}.png")
        rows.append({"image": f"pictures/{colour}.png", "question": "hue?", "answer": colour})
    return write_rows(folder / "rows.jsonl", rows)


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings(base: Path, data: Path, **changes: Any) -> TrainVisionLanguageConfig:
    """A short run on a tiny base."""
    values: dict[str, Any] = {
        "base": str(base), "data": str(data), "device": "cpu", "rank": 2, "steps": 4, "batch_size": 2,
        "learning_rate": 1e-2, "checkpoint_every": 0, "save_every": 0, "warmup_ratio": 0.0, "name": "little",
        "sample_every": 0, "sample_tokens": 8,
    }  # fmt: skip
    return TrainVisionLanguageConfig.parse(values | changes)
