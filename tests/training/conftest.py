"""Shared by the training tests: tiny bases on disk, picture folders, a studio home of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.progress import Progress
from studio.training.schemas.image import TrainImageConfig
from tests import tiny
from tests.training import bed


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path_factory.getbasetemp() / "home"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Family name -> saved tiny pipeline, made when asked for."""
    folder = tmp_path_factory.mktemp("bases")
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tiny.saved(family, folder)
        return made[family]

    return get


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Eight captioned 32-pixel pictures."""
    return bed.crosses(tmp_path_factory.mktemp("pictures"))


class Watcher:
    """A monitor that remembers, and asks to stop after ``stop_at`` steps."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.seen: list[Progress] = []

    def report(self, progress: Progress) -> None:
        self.seen.append(progress)

    def cancelled(self) -> bool:
        return self.stop_at is not None and any(p.stage == "training" and p.step >= self.stop_at for p in self.seen)


def settings(base: Path, data: Path, **changes: Any) -> TrainImageConfig:
    """A short run on a tiny base."""
    values: dict[str, Any] = {
        "base": str(base),
        "data": str(data),
        "mode": "captioned",
        "device": "cpu",
        "rank": 2,
        "resolution": 32,
        "steps": 4,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "lr_schedule": "linear",
        "sample_steps": 2,
        "sample_guidance": 2.0,
        "sample_every": 0,
        "save_every": 0,
        "checkpoint_every": 0,
    }
    return TrainImageConfig.parse(values | changes)
