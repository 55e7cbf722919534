"""Shared by the speech tests: a tiny Whisper on disk, a studio home of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.speech import tiny


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path_factory.getbasetemp() / "speech-home"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.whisper(tmp_path_factory.mktemp("whisper") / "tiny")


@pytest.fixture(scope="session")
def multilingual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.whisper(tmp_path_factory.mktemp("whisper") / "many", multilingual=True)


@pytest.fixture(scope="session")
def utterances(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.utterances(tmp_path_factory.mktemp("utterances"))
