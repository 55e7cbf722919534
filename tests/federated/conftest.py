"""Shared by the federated tests: a tiny language model, two clients' rows, a home of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.federation.schema import FederateConfig
from tests.language import tiny
from tests.language.conftest import write_rows


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path_factory.getbasetemp() / "federated-home"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("federated") / "llama")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of three clients, each with words of its own, and one to measure on."""
    folder = tmp_path_factory.mktemp("federated-rows")
    words = (("red", "blue", "green"), ("one", "two", "three", "four"), ("cat", "dog"))
    made = []
    for number, some in enumerate(words):
        asked = [{"prompt": f"{word}{k}?", "completion": word[::-1]} for word in some for k in "12"]
        made.append(write_rows(folder / f"client{number}.jsonl", asked))
    test = [{"prompt": f"{w}7?", "completion": w[::-1]} for some in words for w in some[:1]]
    return [*made, write_rows(folder / "test.jsonl", test)]


@pytest.fixture
def federation(llama: Path, rows: list[Path]) -> Callable[..., FederateConfig]:
    """A configuration with three clients (``changes`` of its own keys, ``training`` of the clients')."""

    def make(training: dict[str, Any] | None = None, **changes: Any) -> FederateConfig:
        settings = {"base": str(llama), "rank": 2, "steps": 2, "batch_size": 2, "learning_rate": 1e-2, "device": "cpu",
                    "lr_schedule": "constant", "warmup_ratio": 0.0}  # fmt: skip
        names = ("north", "south", "west")
        clients = [{"name": n, "data": str(f), "test": str(rows[-1])} for n, f in zip(names, rows, strict=False)]
        values = {"name": "shared", "rounds": 2, "training": settings | (training or {}), "clients": clients}
        return FederateConfig.parse(values | changes)

    return make
