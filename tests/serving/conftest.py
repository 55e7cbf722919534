"""Shared by the serving tests: a tiny Llama on disk and PEFT adapters of several ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.language import tiny

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = ALL[:4]


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path_factory.getbasetemp() / "serving-home"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("serving-base") / "llama", hidden=64)


@pytest.fixture(scope="session")
def make(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make(name, rank, seed, **options)`` writes a random PEFT adapter of the base, as PEFT saves it."""
    folder = tmp_path_factory.mktemp("serving-adapters")

    def made(name: str, rank: int = 4, seed: int = 0, on: Path | None = None, **options: Any) -> Path:
        if (folder / name).is_dir():
            return folder / name
        torch.manual_seed(seed)
        values: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": list(ATTENTION),
                                  "init_lora_weights": False, "task_type": "CAUSAL_LM"}  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(on or base)
        get_peft_model(model, LoraConfig(**(values | options))).save_pretrained(folder / name)
        return folder / name

    return made


@pytest.fixture(scope="session")
def several(make: Callable[..., Path]) -> dict[str, Path]:
    """Adapters that differ in rank, targets, scale and kind."""
    return {
        "small": make("small", 2, 1),
        "medium": make("medium", 4, 2),
        "large": make("large", 8, 3, target_modules=list(ALL)),
        "rslora": make("rslora", 4, 4, use_rslora=True),
        "patterns": make("patterns", 4, 5, rank_pattern={"q_proj": 2, "layers.1.self_attn.v_proj": 7},
                         alpha_pattern={"k_proj": 3}),
        "dora": make("dora", 3, 6, use_dora=True, target_modules=["q_proj", "down_proj"]),
        "table": make("table", 2, 7, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    }  # fmt: skip
