"""The routing context: what the routers of a model are told, and what they decided in the last forward pass.

One plain object per base model, shared by all its expert layers. Hooks on the *base model* open it before a forward
pass and close it after: PEFT's wrapper reaches the base in several ways, ``generate`` calls it many times, and an
adapter that is injected directly has no wrapper at all. Layers that run after it is closed (when checkpointed layers
are computed again in the backward pass) record nothing.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapters.errors import InputError

if TYPE_CHECKING:
    from adapters.layers.experts.config import MoeConfig

TYPES_COLUMN = "task_types"
"""Column of a batch with the type of each sample: whole numbers (batch,). It never reaches the base model."""

REENTRANT = (
    "Reentrant gradient checkpointing loses the gradient of the routers: set use_reentrant to False "
    "(gradient_checkpointing_kwargs)."
)


@dataclass(frozen=True)
class Segment:
    """Samples ``start`` to ``stop`` (not included) of a batch, computed with one adapter; None = the base alone."""

    adapter: str | None
    start: int
    stop: int


@dataclass(frozen=True)
class Record:
    """What one router decided in one forward pass.

    Attributes:
        module: path of its module; ``layer``: number of its layer, None if it has none.
        logits, probabilities: (batch, length, N) in fp32.
        chosen: (batch, length, k), the chosen experts; None if all are used.
        mask: (batch, length), False for padding; None if all tokens count.
        types: (batch,), the samples' types; None if they were not given.
    """

    module: str
    layer: int | None
    logits: Tensor
    probabilities: Tensor
    chosen: Tensor | None
    mask: Tensor | None
    types: Tensor | None


@dataclass(eq=False)
class Routing:
    """Shared by the expert layers of one base model.

    Attributes:
        attention_mask: of the current forward pass, (batch, past and present length), or None.
        sample_types: (batch,), for the localized loss, set by :func:`sample_types`; ``batch_types``: those that came
        with
            the current batch, which go before.
        external_gates: for router "external": (batch, length, L, N), L routed places in the order of the model, or
            (batch, length, N) for all of them, or a tensor that broadcasts to either. They stay until the next ones.
        segments: which samples belong to which adapter; None = all to the active one.
        configs: adapter -> its configuration.
        records: adapter -> module path -> what its router decided in the last forward pass.
        collecting: whether this forward pass records for a loss; ``watching``: record in any case.
        open: whether a forward pass of the base model is running.
        resting: the experts are left out (the base's own pass of X-LoRA).
        source: called before a forward pass with the model and its arguments, to set ``external_gates``; returns the
            arguments.
    """

    attention_mask: Tensor | None = None
    sample_types: Tensor | None = None
    batch_types: Tensor | None = None
    external_gates: Tensor | None = None
    segments: Sequence[Segment] | None = None
    configs: dict[str, MoeConfig] = field(default_factory=dict)
    records: dict[str, dict[str, Record]] = field(default_factory=dict)
    collecting: bool = False
    watching: bool = False
    open: bool = False
    resting: bool = False
    source: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    _hooks: list[Any] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> Routing:
        """The context of a copied model: the same adapters, its own hooks, nothing of the last forward pass."""
        made = memo[id(self)] = Routing()
        made.configs, made._hooks = copy.deepcopy(self.configs, memo), copy.deepcopy(self._hooks, memo)
        made.source = copy.deepcopy(self.source, memo)
        return made

    # ------------------------------------------------------------------------------------------ hooks of the base
    def attach(self, model: nn.Module) -> None:
        """Put the hooks on the base model."""
        self._hooks = [
            model.register_forward_pre_hook(self.begin, with_kwargs=True),
            model.register_forward_hook(self.end),
        ]

    def detach(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before a forward pass of the base model; takes the column :data:`TYPES_COLUMN` out of its arguments.

        A look without gradients in training mode, as TRL's trainers take between the loss and its gradient, leaves the
        records of the pass before it.
        """
        self.batch_types = kwargs.get(TYPES_COLUMN)
        if torch.is_grad_enabled() or not model.training or self.watching:
            self.records = {}
        mask = _argument(model, "attention_mask", args, kwargs)
        self.attention_mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        wanted = any(config.collects for config in self.configs.values())
        self.collecting = wanted and model.training and torch.is_grad_enabled()
        self.open = True
        kwargs = {name: value for name, value in kwargs.items() if name != TYPES_COLUMN}
        return (args, kwargs) if self.source is None else self.source(model, args, kwargs)

    def end(self, model: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        """After a forward pass of the base model; adds the auxiliary loss to its output, if configured."""
        self.open = False
        if self.collecting and any(config.attach_aux_to_output for config in self.configs.values()):
            from adapters.layers.experts.losses import total

            aux = sum(total(self, name) for name, config in self.configs.items() if config.attach_aux_to_output)
            outputs["aux_loss"] = aux
            if outputs.get("loss") is not None:
                outputs["loss"] = outputs["loss"] + aux

    # ------------------------------------------------------------------------------------------ for the layers
    @property
    def recording(self) -> bool:
        return self.open and (self.collecting or self.watching)

    def check_gradients(self) -> None:
        """Raise :class:`InputError` if a layer runs without gradients in a pass that needs them."""
        gates = self.external_gates
        needed = self.collecting or (gates is not None and gates.requires_grad)
        if self.open and needed and not torch.is_grad_enabled():
            raise InputError(REENTRANT)

    def mask(self, rows: slice, length: int) -> Tensor | None:
        """(batch, length) of the tokens present in this pass, False for padding."""
        if self.attention_mask is None or self.attention_mask.shape[1] < length:
            return None
        return self.attention_mask[rows, -length:].bool()

    def types(self, rows: slice) -> Tensor | None:
        found = self.batch_types if self.batch_types is not None else self.sample_types
        return None if found is None else found[rows]

    def gates(self, rows: slice, position: int) -> Tensor:
        """(batch, length, N) (or broadcasting to it) for the routed place number ``position``."""
        found = self.external_gates
        if found is None:
            raise InputError("The router is 'external', but no gates were given: set external_gates first.")
        if found.ndim == 4:
            found = found[:, :, position]
        return found[rows] if found.ndim == 3 and found.shape[0] > 1 else found

    def record(self, adapter: str, found: Record) -> None:
        self.records.setdefault(adapter, {})[found.module] = found


def _argument(model: nn.Module, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An argument of ``model.forward``, however it was passed."""
    if name in kwargs or not args:
        return kwargs.get(name)
    names = list(inspect.signature(model.forward).parameters)
    return args[names.index(name)] if name in names and names.index(name) < len(args) else None


def routing_of(model: nn.Module) -> Routing:
    """The routing context of a model with expert layers, wrapped by PEFT or not.

    Raises:
        InputError: it has no expert layers.
    """
    found: Any = next((m.routing for m in model.modules() if isinstance(getattr(m, "routing", None), Routing)), None)
    if found is None:
        raise InputError("This model has no expert layers: add an adapter with a MoeConfig first.")
    assert isinstance(found, Routing)
    return found


@contextmanager
def sample_types(model: nn.Module, types: Tensor | None) -> Iterator[None]:
    """Inside, forward passes know the type of each sample: whole numbers (batch,)."""
    routing = routing_of(model)
    routing.sample_types = types
    try:
        yield
    finally:
        routing.sample_types = None


@contextmanager
def watched(model: nn.Module) -> Iterator[Routing]:
    """Inside, every forward pass leaves its records in the yielded context, in evaluation mode too."""
    routing = routing_of(model)
    before, routing.watching = routing.watching, True
    try:
        yield routing
    finally:
        routing.watching = before
