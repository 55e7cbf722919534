"""LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning, arXiv 2305.18403.

Heads and channels are pruned while a LoRA learns. How much a weight matters is estimated from A, B and their gradients
alone, so that the frozen W0 never has a gradient (G = dL/dW, W = W0 + s B A; gA = s B^T G, gB = s G A^T):

    exact       I = (G o W)^2
    estimate    G ~ s (gB A + B gA - eta gB gA), the step of B A under one SGD step of A and B       (eta = 1)
    group       sum of I over everything that disappears together (:mod:`adapters.compression.structure`)
    over time   e <- 0.9 e + 0.1 I after every optimiser step; steps with numbers that are not finite are left out
    share       rho (1 - (1 - (t - w T) / ((1 - w - c) T))^3) at step t between w T and (1 - c) T of T steps, every 10;
                in the last c T steps the model recovers

The gradients are those of the whole step, after clipping (gB gA is quadratic in them, so their size matters). The
groups with the lowest e of each block become zero; one that is gone stays gone, so masks are nested. With grouped
queries a group is one key-value head and its query heads. A mask acts where its heads enter o and its channels enter
down, so a masked model computes exactly what the cut one does. At (1 - c) T the share is exactly rho.

Written from the paper. ``form="official"`` follows published facts about the authors' program instead: |estimate o W|
without s in the gradient, scores of each layer divided by their L2 norm, and no event at which rho is exact. Other
criteria, for comparison: the true gradient (which needs memory for G of every weight), magnitude (G = 1), random.
Trained: A and B. Stored: the merged and cut model; while training, masks and e beside the LoRA.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adapters.catalogue import Method
from adapters.compression import importance
from adapters.compression.importance import Scores, by_group
from adapters.compression.loram import shrunk
from adapters.compression.slicing import member_of
from adapters.compression.structure import (
    MEMBERS,
    Kept,
    Member,
    Pruning,
    Sizes,
    check_ratio,
    prunable,
    removed,
    sizes_of,
    with_whole_blocks,
)
from adapters.errors import InputError
from adapters.layers.variant import PREFIX, StudioVariant, adapted, base_weight, core_of, offset_of, pair
from adapters.plugin import Handles, Layers, Plugin, check_whole

METHOD = Method(
    name="loraprune",
    title="LoRAPrune",
    summary="Prunes heads and channels while a LoRA learns, judged by the LoRA's gradients: a smaller model for good.",
    stage="compression",
    makes="smaller base",
    paper="LoRAPrune, arXiv 2305.18403",
    entry="adapters.compression.loraprune:LoraPrune",
)

Criterion = Literal["lora", "gradient", "magnitude", "random"]
Form = Literal["paper", "official"]


def surrogate(A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, eta: float = 1.0) -> Tensor:
    """[B A - (B - eta gB)(A - eta gA)] / eta = gB A + B gA - eta gB gA: (out, in)."""
    return gB @ A + B @ gA - eta * (gB @ gA)


def score(gradient: Tensor, weight: Tensor, form: Form = "paper") -> Tensor:
    """(gradient o weight)^2, or its absolute value in the official form: (out, in)."""
    product = gradient * weight
    return product.abs() if form == "official" else product.square()


def share(step: int, steps: int, ratio: float, warmup: float = 0.1, cooldown: float = 0.1) -> float:
    """rho after ``step`` of ``steps`` optimiser steps."""
    begun, ended = warmup * steps, (1 - cooldown) * steps
    if step <= begun:
        return 0.0
    if step >= ended:
        return ratio
    return ratio * (1 - (1 - (step - begun) / (ended - begun)) ** 3)


def without_lowest(scores: Tensor, mask: Tensor, count: int) -> Tensor:
    """The mask (groups,) with the ``count`` groups of lowest score off; those that are off stay off.

    Never fewer than before are off; of equal scores the first goes.
    """
    order = torch.sort(torch.where(mask, scores, -torch.inf), stable=True).indices
    made = mask.clone()
    made[order[: max(count, int((~mask).sum()))]] = False
    return made


@dataclass(frozen=True)
class Settings:
    """How much is pruned, where and when.

    Attributes:
        ratio: share of the heads and of the channels that goes, in every block that is pruned.
        every: optimiser steps between two prunings.
        warmup, cooldown: shares of the run at its start and end in which nothing is pruned.
        keep_first, keep_last: blocks that stay whole.
        decay: of the running mean of scores.
        eta: step of the estimate.
    """

    ratio: float = 0.5
    every: int = 10
    warmup: float = 0.1
    cooldown: float = 0.1
    keep_first: int = 0
    keep_last: int = 0
    criterion: Criterion = "lora"
    form: Form = "paper"
    decay: float = 0.9
    eta: float = 1.0

    def check(self) -> None:
        """Raise :class:`InputError` for values out of range."""
        check_ratio(self.ratio)
        if self.every < 1:
            raise InputError(f"Prune every 1 step or more, not every {self.every}.")
        if self.warmup < 0 or self.cooldown < 0 or self.warmup + self.cooldown >= 1:
            raise InputError(
                f"Warm-up {self.warmup:g} and cool-down {self.cooldown:g} leave no steps to prune in: their sum must "
                "be below 1."
            )


def paper_layers(layers: int) -> tuple[int, int]:
    """(first, last) blocks that the paper never prunes."""
    return int(0.1 * layers), 1


def sized(sizes: Sizes, settings: Settings) -> Pruning:
    """A pruning of the counts at the end of a run, whatever is chosen (the first groups), for estimates.

    Raises:
        InputError: a share that leaves nothing, or no block to prune.
    """
    settings.check()
    chosen = prunable(sizes, settings.keep_first, settings.keep_last) if settings.ratio else range(0)
    counts = (sizes.kv_heads - removed(sizes.kv_heads, settings.ratio),
              sizes.channels - removed(sizes.channels, settings.ratio))  # fmt: skip
    kept = Kept(*(tuple(range(count)) for count in counts))
    layers = tuple(kept if number in chosen else Kept() for number in range(sizes.layers))
    return with_whole_blocks(Pruning(sizes, layers, f"loraprune {settings.criterion}", settings.ratio))


class LoraPrune(Plugin):
    """The criterion, the schedule and the masks, in any training loop with the plugin's hooks.

    Args:
        settings: how much, where and when.

    Attributes:
        masks: block -> (heads (kv_heads,), channels (channels,)), bool.
        means: block -> running mean of the scores.
        history: (step, share) of every pruning so far.
    """

    name = "loraprune"

    def __init__(self, settings: Settings) -> None:
        settings.check()
        self.settings = settings
        self.masks: dict[int, tuple[Tensor, Tensor]] = {}
        self.means: dict[int, Scores] = {}
        self.history: list[tuple[int, float]] = []
        self.base_name, self.base_digest = "", ""
        self._inputs: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._clip = 0.0

    # ---------------------------------------------------------------- before the first step
    def configure(self, config: Any) -> None:
        self._clip = float(getattr(config, "max_grad_norm", 0.0) or 0.0)
        self.base_name = str(getattr(config, "base", ""))
        self._seed = int(getattr(config, "seed", 0))
        if getattr(config, "use_dora", False):
            raise InputError("LoRAPrune judges plain low-rank layers, but this configuration is DoRA: switch it off.")

    def before_inject(self, models: Mapping[str, nn.Module]) -> None:
        (model,) = models.values()
        given: Any = model
        plain = given.config.to_dict()
        plain.pop("quantization_config", None)  # the estimate reads weights in few bits one layer at a time
        self.sizes: Sizes = sizes_of(plain)
        chosen = prunable(self.sizes, self.settings.keep_first, self.settings.keep_last)
        self.blocks = list(chosen) if self.settings.ratio else []

    def initialise(self, handles: Handles) -> None:
        (self.model,) = handles.models.values()
        self.adapter, self.steps, self._seed = handles.adapter, handles.steps, handles.seed
        layers = adapted(self.model, self.adapter)
        self.layers: dict[str, tuple[int, Member, Any]] = {}
        for name, layer in layers.items():
            found = member_of(name)
            if found is None or found[0] not in self.blocks:
                continue
            if layer.lora_variant.get(self.adapter) is not None and not isinstance(
                layer.lora_variant[self.adapter], StudioVariant
            ):
                raise InputError("LoRAPrune judges plain low-rank layers: switch use_dora off.")
            self.layers[name] = (*found, layer)
        for axes, what in ((("query", "kv"), "attention"), (("channel",), "feed-forward")):
            if self.blocks and not any(member.axis in axes for _, member, _ in self.layers.values()):
                raise InputError(
                    f"No {what} layer of the blocks that are pruned learns, so nothing says which of its groups "
                    f"matter: choose targets with some of {', '.join(n for n in MEMBERS if MEMBERS[n].axis in axes)}."
                )

    def after_inject(self, handles: Handles) -> None:
        check_whole({name: layer for name, (_, _, layer) in self.layers.items()}, self.adapter, "LoRAPrune")
        for name, (_, _, layer) in self.layers.items():
            if layer.merged or core_of(layer, self.adapter) is not None or offset_of(layer, self.adapter) is not None:
                raise InputError(f"LoRAPrune needs A and B of '{name}' as PEFT trains them: set init to 'default'.")
        self.masks = {
            number: (torch.ones(self.sizes.kv_heads, dtype=torch.bool),
                     torch.ones(self.sizes.channels, dtype=torch.bool))
            for number in self.blocks
        }  # fmt: skip
        self.means = importance.empty(self.sizes, self.blocks)
        self._factors: dict[tuple[int, bool], Tensor] = {}
        for name, module in self.model.named_modules():
            found = member_of(name.removeprefix(PREFIX))
            if found is not None and not found[1].rows and found[0] in self.masks:
                number, heads = found[0], found[1].axis == "query"
                module.register_forward_pre_hook(lambda _, given, key=(number, heads): self._masked(given, key))
        if self.settings.criterion == "gradient":
            for name, (_, _, layer) in self.layers.items():
                layer.register_forward_pre_hook(lambda _, given, key=name: self._inputs.__setitem__(key, given[0]))
                layer.register_full_backward_hook(lambda _, __, outer, key=name: self._accumulate(key, outer[0]))

    def _masked(self, given: tuple[Any, ...], key: tuple[int, bool]) -> tuple[Any, ...]:
        """The input of o or down with what is pruned at zero."""
        x = given[0]
        factor = self._factors.get(key)
        if factor is None:
            number, heads = key
            mask = self.masks[number][0 if heads else 1]
            if bool(mask.all()):
                return given
            factor = mask.repeat_interleave(self.sizes.block("query")) if heads else mask
            factor = self._factors[key] = factor.to(x.device)
        return (x.masked_fill(~factor, 0), *given[1:])

    # ---------------------------------------------------------------- one step
    def grads_ready(self, step: int) -> None:
        if not self.blocks:
            return
        self._update()
        now, settings = step + 1, self.settings
        last = math.ceil((1 - settings.cooldown) * self.steps - 1e-9)
        wanted = share(now, self.steps, settings.ratio, settings.warmup, settings.cooldown)
        regular = now % settings.every == 0 and 0 < wanted < settings.ratio
        if regular or (now == last and settings.form == "paper"):
            self._prune(now, settings.ratio if now == last else wanted)

    @torch.no_grad()
    def _update(self) -> None:
        """Add this step's scores to the running means, unless one is not finite."""
        found = self.scores()
        self._gradients.clear()
        if not all(bool(one.heads.isfinite().all() and one.channels.isfinite().all()) for one in found.values()):
            return
        for number, one in found.items():
            mean = self.means[number]
            mean.heads.lerp_(one.heads, 1 - self.settings.decay)
            mean.channels.lerp_(one.channels, 1 - self.settings.decay)

    @torch.no_grad()
    def scores(self) -> dict[int, Scores]:
        """The groups' scores from the gradients of this step; also usable outside a training loop."""
        if self.settings.criterion == "random":
            return importance.random(self.sizes, self.blocks, self._seed)
        clip = self._clipping()
        found = importance.empty(self.sizes, self.blocks)
        for name, (number, member, layer) in self.layers.items():
            one = score(self._gradient(name, layer, clip), self._weight(layer), self.settings.form)
            grouped = by_group(one, member, self.sizes).cpu()
            if self.settings.form == "official":
                grouped = grouped / (grouped.norm() + 1e-8)
            found[number].of(member).add_(grouped)
        return found

    def _weight(self, layer: Any) -> Tensor:
        A, B = pair(layer, self.adapter)
        return base_weight(layer).float() + layer.scaling[self.adapter] * (B.float() @ A.float())

    def _gradient(self, name: str, layer: Any, clip: float) -> Tensor:
        A, B = pair(layer, self.adapter)
        if self.settings.criterion == "magnitude":
            return A.new_ones(B.shape[0], A.shape[1], dtype=torch.float32)
        if self.settings.criterion == "gradient":
            return self._gradients[name] * clip
        scale = 1.0 if self.settings.form == "official" else layer.scaling[self.adapter]
        gA, gB = (clip * (torch.zeros_like(p) if p.grad is None else p.grad).float() for p in (A, B))
        return float(scale) * surrogate(A.float(), B.float(), gA, gB, self.settings.eta)

    def _clipping(self) -> float:
        """The factor with which the loop will clip the gradients."""
        if not self._clip:
            return 1.0
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in grads])))
        return min(1.0, self._clip / (norm + 1e-6))

    def _accumulate(self, name: str, outer: Tensor) -> None:
        """G += dL/dy^T x, for the criterion of the true gradient."""
        x = self._inputs.pop(name).detach().flatten(0, -2).float()
        found = outer.detach().flatten(0, -2).float().T @ x
        self._gradients[name] = self._gradients[name] + found if name in self._gradients else found

    def _prune(self, step: int, wanted: float) -> None:
        for number, (heads, channels) in self.masks.items():
            mean = self.means[number]
            self.masks[number] = (
                without_lowest(mean.heads, heads, removed(self.sizes.kv_heads, wanted)),
                without_lowest(mean.channels, channels, removed(self.sizes.channels, wanted)),
            )
        self._factors.clear()
        self.history.append((step, wanted))

    # ---------------------------------------------------------------- checkpoints and the result
    def state_dict(self) -> dict[str, Any]:
        return {
            "layout": self._layout(),
            "masks": {number: list(pair_) for number, pair_ in self.masks.items()},
            "means": {number: [one.heads, one.channels] for number, one in self.means.items()},
            "history": [list(entry) for entry in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not state:
            return
        if state["layout"] != self._layout():
            raise InputError("The checkpoint was made with other groups of heads and channels: start a new run.")
        self.masks = {number: (heads, channels) for number, (heads, channels) in state["masks"].items()}
        self.means = {number: Scores(heads, channels) for number, (heads, channels) in state["means"].items()}
        self.history = [(int(step), float(wanted)) for step, wanted in state["history"]]
        self._factors.clear()

    def _layout(self) -> str:
        told = f"{self.sizes} {self.blocks} {sorted(self.layers)}"
        return hashlib.blake2b(told.encode(), digest_size=12).hexdigest()

    def pruning(self) -> Pruning:
        """What is kept now."""

        def indices(mask: Tensor) -> tuple[int, ...]:
            return tuple(mask.nonzero().flatten().tolist())

        layers = tuple(
            Kept(*(indices(mask) for mask in self.masks[number])) if number in self.masks else Kept()
            for number in range(self.sizes.layers)
        )
        return with_whole_blocks(
            Pruning(self.sizes, layers, f"loraprune {self.settings.criterion}", self.settings.ratio,
                    self.base_digest, self.base_name)
        )  # fmt: skip

    def finalize(self, layers: Layers) -> Layers:
        """The adapter cut to the small model, which is the only one it belongs to."""
        return {component: shrunk(part, self.pruning()) for component, part in layers.items()}
