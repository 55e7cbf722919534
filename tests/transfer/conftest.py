"""A source with an adapter that answers one word, its rows and bundle, and a target with another tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.progress import Silent
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.tasks import language
from studio.transfer import preparation
from studio.transfer.schema import PrepareTransferConfig, TransferConfig
from tests.language import tiny

ANSWER = "%"
ROWS = [f"row{number:02} asks {number * number}" for number in range(40)]


@dataclass(frozen=True)
class World:
    """What all tests of transfers share; nothing in it is changed."""

    folder: Path
    source: Path
    target: Path
    adapter: Path
    rows: Path
    bundle: Path
    measured: dict[str, Any]

    def preparing(self, **changes: Any) -> PrepareTransferConfig:
        values = {
            "adapter": str(self.adapter), "base": str(self.source), "data": str(self.rows), "yes": "y", "no": "n",
            "rank": 4, "epochs": 8, "learning_rate": 0.01, "input_tokens": 8, "prompting": "plain", "batch": 16,
            "training": {"save_every": 0}, "device": "cpu",
        }  # fmt: skip
        return PrepareTransferConfig.parse(values | changes)

    def moving(self, **changes: Any) -> TransferConfig:
        values = {
            "bundle": str(self.bundle), "base": str(self.source), "to": str(self.target), "count": 8, "tau": -1000.0,
            "rank": 4, "epochs": 1, "learning_rate": 0.02, "input_tokens": 8, "answer_tokens": 8, "batch": 16,
            "prompting": "plain", "validation_split": 0.0, "training": {"save_every": 0}, "device": "cpu",
        }  # fmt: skip
        return TransferConfig.parse(values | changes)


def rows_file(place: Path, inputs: list[str], answer: str = ANSWER) -> Path:
    place.write_text("".join(json.dumps({"prompt": text, "completion": answer}) + "\n" for text in inputs))
    return place


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path_factory.getbasetemp() / "transfer-home"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("transfer")
    source, rows = tiny.llama(folder / "source"), rows_file(folder / "rows.jsonl", ROWS)
    target = tiny.llama(folder / "target", seed=5, hidden=48, backwards=True)
    config = TrainLanguageConfig.parse({
        "base": str(source), "data": str(rows), "name": "teacher", "steps": 60, "learning_rate": 0.02, "device": "cpu",
        "save_every": 0, "rank": 4,
    })  # fmt: skip
    adapter = Path(language.run(config, folder / "training", Silent())["adapter"])
    made = World(folder, source, target, adapter, rows, folder / "bundle", {})
    made.measured.update(preparation.prepare(made.preparing(out=str(made.bundle)), folder / "prepare", Silent()))
    return made
