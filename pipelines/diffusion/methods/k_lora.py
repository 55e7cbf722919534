"""K-LoRA: in every layer either the concept or the style, the concept earlier and the style later.

"K-LoRA: Unlocking Training-Free Fusion of Any Subject and Style LoRAs" (arXiv 2502.18461). For a layer with updates
D_c = s_c B_c A_c and D_s, and K = r_c r_s,

    S_c = sum of the K largest |entries of D_c|,   S_s likewise
    gamma = mean over the layers of |D_c|_1 / |D_s|_1, ratios beyond 3 times their median left out
    at progress u in [0, 1):  the concept if  S_c / gamma >= S_s (1.5 u + 0.5),  else the style

S is constant, so each layer switches at one fixed progress, which is computed once; the authors' code sorts the full
product at every call of every layer. Their u counts calls for a fixed number of steps and layers; here it is the
progress of the denoising. Their outliers are ratios beyond 3 times the mean; here it is the median, which a single huge
ratio does not move. For Flux they offer (1.5 u + 1.275) mod 1.5 besides 1.5 u + 0.5; here every family uses the latter,
with which each layer switches once. The first adapter is the concept, the second the style. One prediction per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.formats.lora import LoraLayer
from pipelines.diffusion.denoise import Denoising
from pipelines.diffusion.methods.context import MethodContext
from pipelines.diffusion.methods.step import Step, Strengths

METHOD = Method(
    name="k-lora",
    title="K-LoRA",
    summary="A concept and a style (in this order): every layer uses one of them, the style more often in later steps.",
    stage="compose",
    makes="picture",
    paper="K-LoRA: Unlocking Training-Free Fusion of Any Subject and Style LoRAs, arXiv 2502.18461",
    entry="pipelines.diffusion.methods.k_lora:steps",
    properties={"position": 11, "text": "together", "order_matters": True, "pair": True},
)

GAIN, START = 1.5, 0.5
OUTLIER = 3.0


@dataclass(frozen=True)
class LayerStep(Step):
    """A step in which each layer has its own gates: module path -> factor of every adapter."""

    layers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


class Run(Denoising):
    """Sets the step's gates of every layer."""

    def _before(self, module: Any, args: Any, kwargs: Any) -> Any:
        step = self.steps[min(self.step, len(self.steps) - 1)]
        assert isinstance(step, LayerStep)
        table = {
            name: torch.tensor([factors], dtype=torch.float32, device=self.gates.strengths.device)
            for name, factors in step.layers.items()
        }
        self.gates.tokens_to(lambda name, tokens: table.get(name))
        return super()._before(module, args, kwargs)


def steps(strengths: Strengths, context: MethodContext) -> list[Step]:
    """One prediction per step, in which each layer uses one of the two adapters.

    Raises:
        InputError: not two adapters, adapters of different layers, or a DoRA adapter.
    """
    if len(context.names) != 2:
        raise InputError(f"K-LoRA composes a concept and a style: give two adapters, not {len(context.names)}.")
    concept, style = context.layers
    odd = sorted(concept.keys() ^ style.keys())
    if odd:
        raise InputError(
            f"K-LoRA needs adapters of the same layers, but {len(odd)} are in only one of them, such as '{odd[0]}'."
        )
    if any(layer.magnitude is not None for layers in context.layers for layer in layers.values()):
        raise InputError("K-LoRA cannot compare DoRA adapters: their update is not a product of two matrices.")
    change = crossings(concept, style)
    made: list[Step] = []
    for k, row in enumerate(strengths):
        progress = k / len(strengths)
        layers = {name: (1.0, 0.0) if progress <= place else (0.0, 1.0) for name, place in change.items()}
        made.append(LayerStep(row, layers=layers))
    return made


def crossings(concept: Mapping[str, LoraLayer], style: Mapping[str, LoraLayer]) -> dict[str, float]:
    """Layer -> last progress at which it uses the concept (below 0: never, above 1: always)."""
    sums: dict[str, tuple[float, float]] = {}
    ratios: list[float] = []
    for name, one in concept.items():
        two = style[name]
        first, second = one.delta().abs().flatten(), two.delta().abs().flatten()
        count = min(one.rank * two.rank, first.numel())
        sums[name] = float(first.topk(count).values.sum()), float(second.topk(count).values.sum())
        if float(second.sum()) > 0:
            ratios.append(float(first.sum()) / float(second.sum()))
    gamma = balance(ratios)
    return {name: (_crossing(c / gamma, s) if gamma > 0 else -1.0) for name, (c, s) in sums.items()}


def balance(ratios: list[float]) -> float:
    """gamma: the mean of the ratios that are at most three times the median."""
    if not ratios:
        return 1.0
    kept = [ratio for ratio in ratios if ratio <= OUTLIER * median(ratios)] or ratios
    return sum(kept) / len(kept)


def _crossing(concept: float, style: float) -> float:
    if style == 0:
        return 2.0  # the style does not change this layer
    return (concept / style - START) / GAIN
