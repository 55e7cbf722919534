"""Shared by the language tests: tiny bases on disk, rows, a studio home of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.progress import Progress
from pipelines.language.answer import end_of_turn, generated, prompt
from pipelines.language.tokens import Sampling
from studio.training.language.data import Samples
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.tasks.language import task_for
from tests.language import tiny


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path_factory.getbasetemp() / "language-home"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """ "llama", "bare" (no chat template), "wide", "gpt2", "bert" -> directory, made when asked for."""
    folder = tmp_path_factory.mktemp("language-bases")
    makers: dict[str, Callable[[Path], Path]] = {
        "llama": tiny.llama, "bare": lambda place: tiny.llama(place, template=False),
        "wide": lambda place: tiny.llama(place, hidden=48), "gpt2": tiny.gpt2, "bert": tiny.bert,
        "other": lambda place: tiny.llama(place, seed=9),
    }  # fmt: skip

    def get(name: str) -> Path:
        place = folder / name
        return place if (place / "config.json").is_file() else makers[name](place)

    return get


def stream(
    model: Any, tokenizer: Any, messages: list[dict[str, str]], sampling: Sampling, template: str | None = None
) -> Iterator[str]:
    """The answer of transformers' own ``generate`` in pieces, to compare with."""
    mark = end_of_turn(tokenizer, messages, template)
    inputs = prompt(tokenizer, messages, next(model.parameters()).device, template)
    yield from generated(model, tokenizer, inputs, sampling, mark)


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve short questions with answers."""
    words = ("red", "blue", "green", "black", "white", "pink")
    rows = [{"prompt": f"{word}{number}?", "completion": word[::-1]} for number in (1, 2) for word in words]
    return write_rows(tmp_path_factory.mktemp("rows") / "chats.jsonl", rows)


class Watcher:
    """A monitor that remembers, and asks to stop after ``stop_at`` steps."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.seen: list[Progress] = []

    def report(self, progress: Progress) -> None:
        self.seen.append(progress)

    def cancelled(self) -> bool:
        return self.stop_at is not None and any(p.stage == "training" and p.step >= self.stop_at for p in self.seen)

    @property
    def losses(self) -> list[float]:
        return [p.loss for p in self.seen if p.stage == "training" and p.loss is not None]


def settings(base: Path, data: Path, **changes: Any) -> TrainLanguageConfig:
    """A short run on a tiny base."""
    values: dict[str, Any] = {
        "base": str(base), "data": str(data), "device": "cpu", "rank": 2, "steps": 5, "batch_size": 4,
        "max_length": 96, "learning_rate": 1e-2, "checkpoint_every": 0, "save_every": 0, "warmup_ratio": 0.0,
        "name": "little",
    }  # fmt: skip
    return TrainLanguageConfig.parse(values | changes)


def samples_of(config: TrainLanguageConfig, tokenizer: Any, longest: int | None = None) -> Samples:
    """The rows of a configuration as its task makes tokens of them."""
    task = task_for(config)
    task.rows()
    return task.tokens(tokenizer, longest)
