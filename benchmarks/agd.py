"""The rival of guidance LoRAs: small adapters beside attention, after AGD (arXiv 2503.07274).

AGD keeps the base frozen too, but adds new modules: beside every attention layer a small cross-attention whose keys and
values come from the guidance w and the time t, with an output that starts at zero,

    h' = Attn(x) + O softmax(Q x K(w, t)^T) V(w, t)

trained on the states of guided sampling. It takes w as an input, and cannot become part of the weights or be loaded by
other programs. Restated here in a plain form (the paper tries several); both rivals get the same states, batch and
number of steps, each with AdamW at one untuned rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.diffusion.distillation.consistency import DiffusionPath
from pipelines.diffusion.distillation.embedding import sinusoid
from pipelines.diffusion.distillation.guidance import guided
from pipelines.diffusion.distillation.trajectories import follow

WIDTH, TOKENS, BATCH = 32, 8, 8
RATES = {"agd": 5e-3, "lora": 2e-3}


class Adapter(nn.Module):
    """x (batch, length, channels) -> addition to the attention's output, from w and t of :attr:`condition`."""

    def __init__(self, channels: int, condition: dict[str, Tensor]) -> None:
        super().__init__()
        self.condition = condition
        self.embed = nn.Sequential(nn.Linear(512, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 2 * TOKENS * WIDTH))
        self.query, self.out = nn.Linear(channels, WIDTH), nn.Linear(WIDTH, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        keys, values = self.embed(self.condition["wt"]).view(len(x), 2, TOKENS, WIDTH).unbind(1)
        weights = torch.softmax(self.query(x) @ keys.transpose(1, 2) / math.sqrt(WIDTH), dim=-1)
        added: Tensor = self.out(weights @ values)
        return added


class Agd(nn.Module):
    """A frozen UNet with an adapter beside every attention layer."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = [unet]
        self.condition: dict[str, Tensor] = {}
        self.adapters = nn.ModuleList()
        for name, module in unet.named_modules():
            if name.endswith((".attn1", ".attn2")):
                adapter = Adapter(module.to_q.in_features, self.condition)
                self.adapters.append(adapter)
                module.register_forward_hook(lambda m, args, output, adapter=adapter: output + adapter(args[0]))

    def forward(self, state: Tensor, level: Tensor, words: Tensor, w: Tensor) -> Tensor:
        times = sinusoid(1 + level.float() / 1000)
        self.condition["wt"] = torch.cat([sinusoid(w), times], dim=1)
        answer: Tensor = self.unet[0](state, level, words).sample
        return answer


@torch.no_grad()
def states_of(pipe: Any, captions: list[str], w: float, knots: int) -> dict[str, Tensor]:
    """Guided paths of ``captions``: states, levels, words and targets."""
    path = DiffusionPath(pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type, knots)
    words, null = pipe.encode_prompt(captions, "cpu", 1, True)

    def predict(state: Tensor, level: Tensor) -> Tensor:
        both = pipe.unet(torch.cat([state, state]), torch.cat([level, level]), torch.cat([null, words])).sample
        return guided(*both.chunk(2), w)

    states, targets = follow(path, torch.randn(len(captions), 4, 16, 16, generator=_dice(1)), predict)
    levels = path.start().flip(0)
    return {
        "states": states.flatten(0, 1), "targets": targets.flatten(0, 1), "levels": levels.repeat(len(captions)),
        "words": words.repeat_interleave(len(levels), 0),
    }  # fmt: skip


def learn(model: nn.Module, ask: Callable[..., Tensor], seen: dict[str, Tensor], steps: int, rate: float) -> None:
    """``steps`` steps of AdamW on random states; ``ask(states, levels, words)`` is the student."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    dice = _dice(2)
    for _ in range(steps):
        rows = torch.randint(len(seen["states"]), (BATCH,), generator=dice)
        loss = (
            (ask(*(seen[key][rows] for key in ("states", "levels", "words"))) - seen["targets"][rows]).square().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def measure(
    pipeline: Callable[[], Any],
    held: dict[str, Tensor],
    w: float,
    steps: int,
    error_ratio: Callable[..., float],
    captions: list[str],
) -> dict[str, Any]:
    """R of both rivals after ``steps`` steps on the same states."""
    from peft import LoraConfig

    torch.manual_seed(0)
    pipe = pipeline()
    seen = states_of(pipe, captions, w, 20)
    agd = Agd(pipe.unet.requires_grad_(False))

    def ask(state: Tensor, level: Tensor, words: Tensor) -> Tensor:
        return agd(state, level, words, torch.full((len(state),), w))

    learn(agd.adapters, ask, seen, steps, RATES["agd"])
    found = {
        "steps": steps,
        "states": len(seen["states"]),
        "parameters": sum(p.numel() for p in agd.adapters.parameters()),
        "error": round(error_ratio(ask, held, w), 4),
    }
    unet = pipeline().unet.requires_grad_(False)
    names = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and not n.startswith("conv_")]
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=names))

    def ask_lora(state: Tensor, level: Tensor, words: Tensor) -> Tensor:
        answer: Tensor = unet(state, level, words).sample
        return answer

    learn(unet, ask_lora, seen, steps, RATES["lora"])
    return {
        **found,
        "lora parameters": sum(p.numel() for p in unet.parameters() if p.requires_grad),
        "lora error": round(error_ratio(ask_lora, held, w), 4),
    }


def _dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
