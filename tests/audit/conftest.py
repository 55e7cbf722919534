"""The toy world, built once."""

from __future__ import annotations

import pytest
import torch

from tests.audit import toy


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path_factory.getbasetemp() / "audit-home"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> toy.World:
    torch.set_num_threads(1)
    return toy.build(tmp_path_factory.mktemp("world"))
