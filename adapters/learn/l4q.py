"""L4Q: Parameter Efficient Quantization-Aware Fine-Tuning on Large Language Models, arXiv 2402.04902, as a training.

    y = Wq x,   Wq = round to n bits of (W0 + s B A), steps and offsets per group (:mod:`adapters.compression.l4q`)

Trained: A, B, steps and offsets; the latter without weight decay, at a rate of their own, in fp32. Stored: A and B as
an ordinary LoRA, which alone is only the change before rounding ("dense delta"), and beside it ``l4q.safetensors``
with all that the rounding needs, exactly. ``studio compress l4q ADAPTER`` makes the integer base of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from adapters.catalogue import Method
from adapters.compression import L4Q_FILE
from adapters.compression.l4q import SMALLEST, FakeQuantised, Grid, merged, start
from adapters.compression.storage import storage
from adapters.errors import InputError
from adapters.layers.variant import pair
from adapters.options import Option, Rule, Training
from adapters.plugin import Handles, Plugin, layers_of

METHOD = Method(
    name="l4q",
    title="L4Q",
    summary="Trains the adapter through the rounding to few bits: the merged model needs no second rounding.",
    stage="learn",
    makes="integer base",
    paper="L4Q, arXiv 2402.04902",
    entry="adapters.learn.l4q:L4QPlugin",
    training=Training(
        key="l4q_bits",
        options=(
            Option("l4q_bits", 0, ge=0, le=8, help="l4q: round the merged weights to this many bits (2 to 8); 0 = "
                   "off. Make the integer base with  studio compress l4q ADAPTER.", advanced=False),
            Option("l4q_group", 64, ge=1, help="l4q: inputs that share a step and an offset."),
            Option("l4q_rate", 0.05, ge=0, le=1, help="l4q: learning rate of steps and offsets, as a share."),
        ),
        refused=(
            Rule("l4q_bits == 1", "l4q rounds to 2 to 8 bits: set l4q_bits to 2 or more"),
            Rule("dropout > 0", "l4q merges the adapter before every product, and dropout cannot be merged: set "
                 "dropout to 0"),
            Rule("use_dora", "l4q merges a plain LoRA: switch use_dora off"),
            Rule("init != 'default'", "l4q starts at the whole weight: set init to 'default'"),
            Rule("grad_rule != 'plain'", "l4q has gradients of its own: set grad_rule to 'plain'"),
            Rule("perturb != 'none'", "l4q merges before every product, without a perturbation: set perturb to 'none'"),
            Rule("quantization not in ('none', False, None)", "l4q rounds the whole weights itself: set "
                 "quantization to 'none'"),
            Rule("continue_from", "steps and offsets are not continued: leave continue_from empty"),
            Rule("optimizer not in ('adamw', 'sgd')", "l4q gives steps a rate of their own: choose adamw or sgd"),
        ),
    ),
)  # fmt: skip

STEP, ZERO = "l4q_step", "l4q_zero"
"""Names of the parameters in the layer."""


class L4QLinear(LoraLinear):
    """PEFT's LoRA layer with the product through the rounding; plain adapters become one by :func:`attach`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y of the rounded merged weight; of the base where adapters are switched off."""
        base: Any = self.get_base_layer()
        if self.disable_adapters or self.merged:
            found: Tensor = base(x, *args, **kwargs)
            return found
        adapter = self.active_adapters[0]
        A, B = pair(self, adapter)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        grid: Any = self.l4q_grid
        factor = (grid.group * max(grid.high, 1)) ** -0.5
        y: Tensor = FakeQuantised.apply(
            x, base.weight, A, B, getattr(self, STEP)[adapter], getattr(self, ZERO)[adapter], self.scaling[adapter],
            grid, factor,
        )  # fmt: skip
        return y if base.bias is None else y + base.bias.to(y.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the merged weight would not be rounded."""
        raise InputError("An L4Q layer is merged by  studio compress l4q, which rounds it as it was trained.")


def attach(layer: Any, grid: Grid, adapter: str = "default") -> None:
    """Make a plain LoRA layer (B = 0) an :class:`L4QLinear` that starts as the rounded base.

    Raises:
        InputError: another kind of layer, a weight in few bits, or groups that do not fill its rows.
    """
    base = layer.get_base_layer()
    if type(layer) is not LoraLinear or type(base) is not nn.Linear or storage(base):
        kind = storage(base) or type(base).__name__
        raise InputError(f"l4q rounds ordinary linear layers, not {kind}: leave it out of the targets.")
    A, B = pair(layer, adapter)
    step, zero = start(merged(base.weight, A, B, layer.scaling[adapter]), grid)
    changed: Any = layer
    changed.__class__ = L4QLinear
    changed.l4q_grid = grid
    setattr(layer, STEP, nn.ParameterDict({adapter: nn.Parameter(step)}))
    setattr(layer, ZERO, nn.ParameterDict({adapter: nn.Parameter(zero)}))
    layer.adapter_layer_names = (*layer.adapter_layer_names, STEP, ZERO)  # PEFT freezes and activates them with A, B


def _head(model: Any) -> Any:
    """The layer that writes tokens, or None."""
    return getattr(model, "get_output_embeddings", lambda: None)()


class L4QPlugin(Plugin):
    """L4Q: every adapted layer through the rounding."""

    name = "l4q"

    def configure(self, config: Any) -> None:
        self.grid = Grid(config.l4q_bits, config.l4q_group)
        self.rate = config.l4q_rate
        if getattr(config, "task", "causal") != "causal" or config.kind != "train-language":
            raise InputError("l4q makes the integer base of a language model that writes: set l4q_bits to 0.")
        if getattr(config, "method", "lora") != "lora":
            raise InputError("l4q merges one plain LoRA: set method to 'lora', or l4q_bits to 0.")

    def initialise(self, handles: Handles) -> None:
        self.layers, self.adapter = layers_of(handles), handles.adapter
        heads = {id(head.weight) for model in handles.models.values() if (head := _head(model)) is not None}
        for name, layer in self.layers.items():
            if id(layer.get_base_layer().weight) in heads:
                raise InputError(f"l4q leaves the output layer whole: take '{name}' out of the targets.")
            try:
                attach(layer, self.grid, self.adapter)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None

    @property
    def learnt(self) -> list[Tensor]:
        """Steps and offsets."""
        return [getattr(layer, kind)[self.adapter] for layer in self.layers.values() for kind in (STEP, ZERO)]

    def after_inject(self, handles: Handles) -> None:
        """Give steps and offsets a rate of their own and no decay, which would pull steps to zero."""
        if handles.optimizer is None:
            return
        ours = {id(parameter) for parameter in self.learnt}
        for group in list(handles.optimizer.param_groups):
            mine = [parameter for parameter in group["params"] if id(parameter) in ours]
            if not mine:
                continue
            rest = [parameter for parameter in group["params"] if id(parameter) not in ours]
            if rest:
                group["params"] = rest
                group = {key: value for key, value in group.items() if key != "params"}
                handles.optimizer.add_param_group({**group, "params": mine})
                group = handles.optimizer.param_groups[-1]
            group["lr"] *= self.rate
            group["weight_decay"] = 0.0
            if "initial_lr" in group:
                group["initial_lr"] = group["lr"]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for layer in self.layers.values():
            getattr(layer, STEP)[self.adapter].clamp_(min=SMALLEST)

    def _exact(self, layer: Any) -> dict[str, Tensor]:
        """All that the rounding needs, in the precision of the training; ``base`` is the first row of W0, which tells
        its precision and whether it is the same model."""
        A, B = pair(layer, self.adapter)
        return {
            "A": A, "B": B, "scale": torch.tensor(layer.scaling[self.adapter], dtype=torch.float64),
            "step": getattr(layer, STEP)[self.adapter], "zero": getattr(layer, ZERO)[self.adapter],
            "base": layer.get_base_layer().weight[:1],
        }  # fmt: skip

    def beside(self) -> Mapping[str, Mapping[str, Tensor]]:
        tensors = {
            f"{name.partition('.')[2]}.{kind}": tensor.detach().cpu().clone()
            for name, layer in self.layers.items()
            for kind, tensor in self._exact(layer).items()
        }
        return {L4Q_FILE: tensors | {"bits": torch.tensor(self.grid.bits), "group": torch.tensor(self.grid.group)}}
