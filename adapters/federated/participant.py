"""The client's part of a federation, as a plugin of the training it runs.

Before the training the server's tensors are put into the injected adapters and what the rule does not train is frozen;
after it, what was trained is collected. Names and shapes are those of :mod:`adapters.federated.state`; kernels of
convolutions are flattened.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters.errors import InputError
from adapters.federated.facts import Facts
from adapters.federated.state import A, B, Factors, R, State
from adapters.initialise.statistics import capture_gradients
from adapters.layers.variant import core_of, pair, set_core, set_residual
from adapters.learn.ffa import freeze_a
from adapters.plugin import Handles, Need, Plugin, matrices_of, no_decay


class Participant(Plugin):
    """Starts a training from the server's tensors and collects what it trained.

    Args:
        facts: of the server's rule.
        received: what the server sent for this round; None = begin as the training itself does.
        fixed: frozen factors, sent once: A of FFA-LoRA, A and B of Fed-SB.
        residual: layer -> factors added to the base so far.
        seed: of factors drawn anew (FLoRA).
        recipe: entries of the adapter's recipe.
    """

    name = "federated"

    def __init__(
        self,
        facts: Facts,
        received: State | None = None,
        fixed: State | None = None,
        residual: Mapping[str, Factors] | None = None,
        seed: int = 0,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        self.facts, self.received, self.fixed = facts, received, fixed or {}
        self.residual, self.seed, self.recipe = residual or {}, seed, recipe or {}

    def initialise(self, handles: Handles) -> None:
        """Put the tensors in place.

        Raises:
            InputError: the server's tensors do not belong to this model.
        """
        self.layers, self.adapter, self.models = matrices_of(handles), handles.adapter, handles.models
        known = {**(self.received or {}), **self.fixed}
        for name, layer in self.layers.items():
            if self.received is not None and self.facts.redraws:
                self._redraw(name, layer)
            for ending, parameter in zip((A, B), pair(layer, self.adapter), strict=True):
                if name + ending in known:
                    _put(parameter, known[name + ending], name + ending, self.facts.ragged)
            if name in self.residual:
                set_residual(layer, *self.residual[name], self.adapter)
            if self.facts.trains == "R":
                rank = layer.r[self.adapter]
                set_core(layer, known.get(name + R, torch.zeros(rank, rank)), self.adapter)
        if self.facts.trains == "B":
            for model in handles.models.values():
                freeze_a(model, self.adapter)
        whole = dict(_whole(handles.models))
        for name, parameter in whole.items():
            if self.received is not None:
                if name not in self.received:
                    raise InputError(f"The server sent no '{name}', which this client trains: the models differ.")
                _put(parameter, self.received[name], name)
        strange = [name for name in known if name not in whole and name.rsplit(".", 1)[0] not in self.layers]
        if strange:
            raise InputError(f"The server sent '{strange[0]}', which this client's model does not have.")

    def after_inject(self, handles: Handles) -> None:
        cores = [core for layer in self.layers.values() if (core := core_of(layer, self.adapter)) is not None]
        no_decay(handles, cores)  # decay would pull towards W0, not towards the start

    def recorded(self) -> Mapping[str, Any]:
        return {"federated": dict(self.recipe)} if self.recipe else {}

    def collected(self) -> dict[str, Tensor]:
        """What the rule sends: copies in fp32 on the CPU."""
        found: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            down, up = pair(layer, self.adapter)
            if self.facts.trains == "A and B":
                found[name + A] = _copy(down)
            if self.facts.trains != "R":
                found[name + B] = _copy(up)
            core = core_of(layer, self.adapter)
            if core is not None:
                found[name + R] = core.detach().float().cpu().clone()
        return found | {name: parameter.detach().float().cpu().clone() for name, parameter in _whole(self.models)}

    def frozen(self) -> dict[str, Tensor]:
        """What the rule sends once: A of FFA-LoRA."""
        if self.facts.trains != "B":
            return {}
        return {name + A: _copy(pair(layer, self.adapter)[0]) for name, layer in self.layers.items()}

    def scales(self) -> dict[str, float]:
        """Layer -> s."""
        return {name: float(layer.scaling[self.adapter]) for name, layer in self.layers.items()}

    def inputs(self) -> dict[str, list[int]]:
        """Layer -> shape of A without its rank: (in,), or (in, height, width) of a convolution."""
        return {name: list(pair(layer, self.adapter)[0].shape[1:]) for name, layer in self.layers.items()}

    def _redraw(self, name: str, layer: Any) -> None:
        generator = torch.Generator().manual_seed(self.seed ^ zlib.crc32(name.encode()))
        down, up = pair(layer, self.adapter)
        fresh = torch.empty(down.shape)
        nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            down.copy_(fresh)
            up.zero_()


class Gradients(Plugin):
    """Measures the gradient of every adapted weight, without training (Fed-SB's start).

    Args:
        count: batches to sum over, or all of a run that has fewer.
    """

    name = "federated-gradients"

    def __init__(self, count: int) -> None:
        self.count = count
        self.found: dict[str, Tensor] = {}

    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    def initialise(self, handles: Handles) -> None:
        layers, look = matrices_of(handles), handles.calibration
        assert look is not None
        bases = {name: layer.get_base_layer() for name, layer in layers.items()}
        losses = list(look.losses(self.count))
        means = capture_gradients(bases, losses, len(losses))
        self.found = {name: gradient * len(losses) for name, gradient in means.items()}
        for model in handles.models.values():
            model.zero_grad(set_to_none=True)


def _whole(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters trained as a whole, by component and name."""
    for component, model in models.items():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                yield f"{component}.{name}", parameter


@torch.no_grad()
def _put(parameter: Tensor, value: Tensor, name: str, ragged: bool = False) -> None:
    """Copy ``value`` into ``parameter``; a client of a lower rank takes the first rows of A and columns of B."""
    if ragged and name.endswith(A):
        value = value[: parameter.shape[0]]
    elif ragged and name.endswith(B):
        value = value[:, : parameter.shape[1]]
    if value.numel() != parameter.numel() or value.shape[0] != parameter.shape[0]:
        raise InputError(
            f"'{name}' from the server has the shape {tuple(value.shape)}, this client's {tuple(parameter.shape)}: "
            "rank, targets and base must be the server's."
        )
    parameter.copy_(value.reshape(parameter.shape))


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().float().flatten(1).cpu().clone()
