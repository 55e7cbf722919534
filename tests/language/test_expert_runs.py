"""Mixtures of experts trained by the language job: they learn, resume exactly, reload in PEFT, and answer in chats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adapters import formats
from adapters.errors import Cancelled, InputError
from adapters.layers.experts import MoeConfig
from pipelines.language.adapters import AdaptedModel
from studio.library import scan
from studio.training.tasks.language import run
from tests.language.conftest import Watcher, settings

METHODS = ("mixlora", "mola", "loramoe", "llava-mole")


def weights(result: dict) -> dict[str, torch.Tensor]:
    return load_file(Path(result["adapter"]) / "adapter_model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_and_peft_and_chats_load_it(method, bases, chats, tmp_path):
    config = settings(
        bases("llama"), chats, steps=4, method=method, dropout=0.1, batch_size=2, gradient_accumulation=2,
        sample_prompts=["red1?"], sample_tokens=2,
    )  # fmt: skip
    watcher = Watcher()
    whole = run(config, tmp_path / "whole", watcher)
    with pytest.raises(Cancelled):
        run(config, tmp_path / "part", Watcher(stop_at=2))
    resumed = run(config, tmp_path / "part", Watcher(), resume=True)
    first, second = weights(whole), weights(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any("a LoRA of as many on the same layers has rank" in p.message for p in watcher.seen)

    card = Path(whole["card"]).read_text()
    assert f"mixture of LoRA experts ({method})" in card
    assert "import adapters.layers.experts" in card
    ids = torch.tensor([[8, 9, 10, 11]])
    base = AutoModelForCausalLM.from_pretrained(bases("llama")).eval()
    plain = base(ids).logits
    chat = AdaptedModel(base)
    chat.add("mix", Path(whole["adapter"]))
    assert torch.equal(base(ids).logits, plain)
    with chat.active({"mix": 1.0}) as model:
        answered = model(ids).logits
    assert not torch.equal(answered, plain)
    assert torch.equal(base(ids).logits, plain)
    with pytest.raises(InputError, match=r"use 1, not 0\.5"), chat.active({"mix": 0.5}):
        pass
    peft = PeftModel.from_pretrained(base, whole["adapter"])
    torch.testing.assert_close(peft(ids).logits, answered, atol=1e-6, rtol=0)
    assert scan.record(Path(whole["adapter"]), "adapter").notes["algorithm"] == f"mixture of experts ({method})"
    with pytest.raises(InputError, match="depends on the token"):
        formats.read(whole["adapter"])
    assert MoeConfig.from_pretrained(whole["adapter"]).preset == method
