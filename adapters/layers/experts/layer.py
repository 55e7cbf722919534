"""The layers of a mixture of LoRA experts: beside a linear layer, and around a feed-forward block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from adapters.compression.storage import plain_weight
from adapters.errors import InputError
from adapters.layers.experts import compute
from adapters.layers.experts.config import MoeConfig
from adapters.layers.experts.gates import Gates, choose, one_expert, without_autocast
from adapters.layers.experts.routing import Record, Routing, Segment
from adapters.layers.experts.structure import Structure, finished, inner
from adapters.layers.sizes import device_of, sizes
from adapters.low_rank import shifted_row_norms_squared

PREFIX = "moeadapter_"


@dataclass(frozen=True)
class Place:
    """One place of one adapter, resolved for the model.

    Attributes:
        path: of the module; ``layer``: number of its layer, None if it has none.
        kind: "linear" or "block".
        experts, top_k, rank, scale: N, k, r and s there; N = 1 is a plain LoRA without a router.
        roles: of a block: the linear layers that get experts.
        position: number among the places with several experts, in the order of the model.
    """

    path: str
    kind: str
    layer: int | None
    experts: int
    top_k: int
    rank: int
    scale: float
    roles: tuple[str, ...] = ("",)
    position: int = 0


class Router(nn.Module):
    """Logits of the experts: x W^T (+ bias), W (N, in) kept and computed in fp32 (fp64 for fp64 inputs)."""

    def __init__(self, experts: int, width: int, bias: bool, start: str, device: Any = None) -> None:
        super().__init__()
        made = nn.Linear(width, experts, bias=bias, device=device, dtype=torch.float32)
        if start == "normal" and not made.weight.is_meta:
            nn.init.normal_(made.weight, std=0.02)
        self.weight, self.bias = made.weight, made.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) for x (..., in)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with without_autocast(x):
            return nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias)


@dataclass(frozen=True)
class Factors:
    """The experts of one linear layer: A (N, r, in), B (N, out, r), s, and m (N, out) of DoRA."""

    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None


class ExpertLayer(nn.Module, BaseTunerLayer):
    """What both kinds of places share: the tensors of each adapter, its router, and who is active.

    Attributes:
        path: of the module in the model.
        routing: the model's context.
        places: adapter -> its resolved place.
    """

    other_param_names = ("places", "settings", "moeadapter_dropout")
    roles: tuple[str, ...] = ("",)

    def __init__(self, base_layer: nn.Module, path: str, routing: Routing) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path, self.routing = path, routing
        self.places: dict[str, Place] = {}
        self.settings: dict[str, MoeConfig] = {}
        self._disable_adapters, self.merged_adapters, self._active_adapter = False, [], []
        self.frozen_peft_weight_names = {}
        names = []
        for role in self.roles:
            for kind in ("A", "B", "magnitude"):
                names.append(tensor_name(role, kind))
                setattr(self, names[-1], nn.ParameterDict())
        self.moeadapter_router = nn.ModuleDict()
        self.moeadapter_dropout = nn.ModuleDict()
        self.adapter_layer_names = (*names, "moeadapter_router")

    def linear(self, role: str) -> nn.Module:
        """The frozen linear layer of a role."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Numbers per token that the router sees."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------ adapters
    def update_layer(self, adapter: str, place: Place, config: MoeConfig, inference_mode: bool = False) -> None:
        """Add an adapter: A as ``nn.Linear`` starts, B zero, so that nothing changes."""
        base = self.get_base_layer()
        device = device_of(base)
        dtype = next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.float32)
        self.places[adapter], self.settings[adapter] = place, config
        for role in place.roles:
            outputs, inputs = sizes(self.linear(role))
            A = torch.empty(place.experts, place.rank, inputs, device=device, dtype=torch.float32)
            for expert in A:
                nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
            B = torch.zeros(place.experts, outputs, place.rank, device=device, dtype=dtype)
            self._tensors(role, "A")[adapter] = nn.Parameter(A.to(dtype))
            self._tensors(role, "B")[adapter] = nn.Parameter(B)
            if config.expert_kind == "dora":
                norms = plain_weight_rows(self.linear(role)).norm(dim=1)
                self._tensors(role, "magnitude")[adapter] = nn.Parameter(norms.repeat(place.experts, 1).to(dtype))
        if place.experts > 1 and config.routed:
            self.moeadapter_router[adapter] = Router(
                place.experts, self.width, config.router_bias, config.router_init, device
            )
        self.moeadapter_dropout[adapter] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        if config.trained == "router":
            self.frozen_peft_weight_names[adapter] = tuple(
                name for name in self.adapter_layer_names if name != "moeadapter_router"
            )
        self.set_adapter(self.active_adapters or [adapter], inference_mode=inference_mode)

    def _tensors(self, role: str, kind: str) -> Any:
        return getattr(self, tensor_name(role, kind))

    def factors(self, adapter: str, role: str = "") -> Factors:
        """The experts of a linear layer."""
        magnitudes = self._tensors(role, "magnitude")
        return Factors(
            self._tensors(role, "A")[adapter], self._tensors(role, "B")[adapter], self.places[adapter].scale,
            magnitudes.get(adapter),
        )  # fmt: skip

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the update depends on the token."""
        raise InputError(NO_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    # ------------------------------------------------------------------------------------------ forward
    def segments(self, batch: int) -> list[Segment]:
        """Which rows are computed with which adapter."""
        if getattr(self, "_is_replica", False) and self.training:
            raise InputError(
                "torch.nn.DataParallel shares one routing context between its replicas: train with DDP "
                "(accelerate launch), or on one device."
            )
        given = self.routing.segments
        if self.disable_adapters:
            return [Segment(None, 0, batch)]
        if given is not None:
            return [Segment(s.adapter if s.adapter in self.places else None, s.start, s.stop) for s in given]
        active = [name for name in self.active_adapters if name in self.places]
        return [Segment(name, 0, batch) for name in active] or [Segment(None, 0, batch)]

    def gates(self, adapter: str, x: Tensor, rows: slice) -> Gates:
        """The gates for x (batch, length, in); records them while the context is open."""
        place, config = self.places[adapter], self.settings[adapter]
        flat = x.reshape(-1, x.shape[-1])
        self.routing.check_gradients()
        if not config.routed:
            found = self.routing.gates(rows, place.position).to(x.device)
            if found.shape[-1] != place.experts:
                raise InputError(f"There are {place.experts} experts, but the gates are for {found.shape[-1]}.")
            return Gates(found.expand(*x.shape[:-1], place.experts).reshape(-1, place.experts), None, place.experts)
        if place.experts == 1:
            return one_expert(flat)
        logits = self.moeadapter_router[adapter](x)
        probabilities = logits.softmax(-1)
        gates = choose(probabilities.reshape(flat.shape[0], -1), config.router, place.top_k, config.gate)
        if self.routing.recording and x.ndim == 3:
            chosen = None if gates.chosen is None else gates.chosen.view(*x.shape[:-1], -1)
            mask, types = self.routing.mask(rows, x.shape[1]), self.routing.types(rows)
            self.routing.record(
                adapter, Record(self.path, place.layer, logits, probabilities, chosen, mask, types)
            )  # fmt: skip
        return gates

    def dropped(self, adapter: str, x: Tensor, like: Tensor) -> Tensor:
        """The experts' input: in their dtype, with dropout."""
        found: Tensor = self.moeadapter_dropout[adapter](x.to(like.dtype))
        return found


class ExpertLinear(ExpertLayer):
    """y = W0 x + sum_e gate_e s B_e A_e x; a DoRA expert adds (m/|V| - 1) W0 x + (m/|V|) s B A x instead."""

    def linear(self, role: str) -> nn.Module:
        return self.get_base_layer()

    @property
    def width(self) -> int:
        return sizes(self.get_base_layer())[1]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output for x (..., in)."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        updates = [
            (segment, self._update(segment.adapter, x[segment.start : segment.stop], result, segment))
            for segment in self.segments(x.shape[0])
            if segment.adapter is not None
        ]
        whole = [update for segment, update in updates if segment.stop - segment.start == x.shape[0]]
        return sum(whole, result) if len(whole) == len(updates) else _with_parts(result, updates)

    def _update(self, adapter: str, x: Tensor, result: Tensor, segment: Segment) -> Tensor:
        rows = slice(segment.start, segment.stop)
        found, config = self.factors(adapter), self.settings[adapter]
        gates = self.gates(adapter, x, rows)
        flat = self.dropped(adapter, x, found.A).reshape(-1, x.shape[-1])
        path = compute.linear_path(config.compute, flat, found.A, found.B)
        if found.magnitude is None:
            update = compute.mixed(flat, found.A, found.B, gates, path, found.scale)
        else:
            update = self._dora(flat, result[rows].reshape(flat.shape[0], -1), found, gates, path)
        return update.view(*x.shape[:-1], -1).to(result.dtype)

    def _dora(self, x: Tensor, result: Tensor, found: Factors, gates: Gates, path: str) -> Tensor:
        bias = getattr(self.get_base_layer(), "bias", None)
        product = (result if bias is None else result - bias).to(x.dtype)
        ratio = magnitude_ratio(self.get_base_layer(), found)
        B = found.B * (ratio * found.scale)[..., None]
        return compute.mixed(x, found.A, B, gates, path) + (gates.dense().to(x.dtype) @ (ratio - 1)) * product


class ExpertBlock(ExpertLayer):
    """A feed-forward block whose experts are the frozen block with a LoRA on each of its linear layers.

    y = FFN(x) + sum_e gate_e (FFN_e(x) - FFN(x)), which is sum_e gate_e FFN_e(x) where the gates sum to 1, and the base
    itself as long as the experts change nothing. The first linear layers run once per token, the last one too: it is
    linear, so the gates are applied before it. Only DoRA experts on the last layer, whose rows are scaled per expert,
    need it once per token and expert.
    """

    def __init__(self, base_layer: nn.Module, path: str, routing: Routing, structure: Structure) -> None:
        self.roles = tuple(structure.roles)
        super().__init__(base_layer, path, routing)
        self.structure = structure

    def linear(self, role: str) -> nn.Module:
        found: nn.Module = getattr(self.get_base_layer(), self.structure.roles[role])
        return found

    @property
    def width(self) -> int:
        return sizes(self.linear(self.roles[0]))[1]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The block's output for x (batch, length, in)."""
        segments = self.segments(x.shape[0])
        if all(segment.adapter is None for segment in segments):
            found: Tensor = self.base_layer(x, *args, **kwargs)
            return found
        if self.routing.segments is None and len(segments) > 1:
            raise InputError(
                f"Several adapters are active on the feed-forward block '{self.path}', whose experts are whole blocks: "
                "activate one of them."
            )
        first = {role: self.linear(role)(x) for role in self.roles if role != "down"}
        parts = [self._part(segment, x, first) for segment in segments]
        inputs, updates = (one[0] if len(parts) == 1 else torch.cat(one) for one in zip(*parts, strict=True))
        out = self.linear("down")(inputs)
        return finished(self.get_base_layer(), self.structure, (out + updates).to(out.dtype))

    def _part(self, segment: Segment, x: Tensor, first: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What goes through the last layer for some samples (batch, length, ff), and what is added to its output."""
        rows = slice(segment.start, segment.stop)
        x, first = x[rows], {role: out[rows] for role, out in first.items()}
        if segment.adapter is None:
            mixed = inner(self.get_base_layer(), self.structure, first)
            return mixed, x.new_zeros(*x.shape[:-1], sizes(self.linear("down"))[0])
        flat = {role: out.reshape(-1, out.shape[-1]) for role, out in first.items()}
        mixed, extra = self._mixed(segment.adapter, x, flat, rows)
        return mixed.view(*x.shape[:-1], -1), extra.view(*x.shape[:-1], -1)

    def _mixed(self, adapter: str, x: Tensor, first: Mapping[str, Tensor], which: slice) -> tuple[Tensor, Tensor]:
        place, block = self.places[adapter], self.get_base_layer()
        found = {role: self.factors(adapter, role) for role in place.roles}
        example = next(iter(found.values())).A
        gates = self.gates(adapter, x, which)
        flat = self.dropped(adapter, x, example).reshape(-1, x.shape[-1])
        path = compute.block_path(self.settings[adapter].compute, flat, *((f.A, f.B) for f in found.values()))
        rows = compute.sort(gates)
        given = rows.gathered(flat)
        each = {
            role: self._row(role, rows.gathered(out), given, found.get(role), rows, path) for role, out in first.items()
        }
        hidden = inner(block, self.structure, each)
        last, dtype = found.get("down"), next(iter(first.values())).dtype
        kept = None if gates.whole else inner(block, self.structure, first) * (1 - gates.total().to(flat.dtype))
        if last is not None and last.magnitude is not None:
            return self._scaled_last(adapter, hidden, last, rows, path, kept, dtype)
        mixed = rows.combined(hidden)
        mixed = mixed if kept is None else mixed + kept
        outputs = sizes(self.linear("down"))[0]
        extra = mixed.new_zeros(mixed.shape[0], outputs)
        if last is not None:
            dropped = self.dropped(adapter, hidden, last.A)
            extra = rows.combined(compute.by_expert(dropped, last.A, last.B, rows, path, last.scale))
        return mixed.to(dtype), extra

    def _row(self, role: str, out: Tensor, x: Tensor, found: Factors | None, rows: compute.Rows, path: str) -> Tensor:
        """The output of a first layer for each row: base (S, out) plus that of the row's expert."""
        if found is None:
            return out
        update = compute.by_expert(x, found.A, found.B, rows, path, found.scale)
        if found.magnitude is None:
            # a large tensor less, whose pages cost as much as the sum
            return update.add_(out) if update.dtype == torch.promote_types(update.dtype, out.dtype) else out + update
        bias = getattr(self.linear(role), "bias", None)
        ratio = magnitude_ratio(self.linear(role), found)[rows.expert]
        return ratio * (out + update) if bias is None else ratio * (out - bias + update) + bias

    def _scaled_last(
        self,
        adapter: str,
        hidden: Tensor,
        last: Factors,
        rows: compute.Rows,
        path: str,
        kept: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """With DoRA on the last layer: its output for each row, mixed; the shared one gets the base's part only."""
        down = self.linear("down")
        each = self._row("down", down(hidden.to(dtype)), self.dropped(adapter, hidden, last.A), last, rows, path)
        mixed = rows.combined(each)
        bias = getattr(down, "bias", None)
        if bias is not None:  # the shared product adds it once
            mixed = mixed - bias * rows.combined(torch.ones_like(each[:, :1]))
        rest = hidden.new_zeros(rows.tokens, hidden.shape[1]) if kept is None else kept
        return rest.to(dtype), mixed


NO_MERGE = (
    "A mixture of experts cannot be merged into the base, since its update depends on the token: keep it as an "
    "adapter, or export it as an ordinary LoRA where it has one expert."
)


def tensor_name(role: str, kind: str) -> str:
    """The attribute of a layer that holds a tensor: "moeadapter_A", "moeadapter_gate_A"."""
    return f"{PREFIX}{role}_{kind}" if role else f"{PREFIX}{kind}"


def plain_weight_rows(module: nn.Module) -> Tensor:
    """The frozen weight as (out, in), in fp32 or better."""
    weight = plain_weight(module)
    if weight.ndim != 2 or tuple(weight.shape) not in (sizes(module), sizes(module)[::-1]):
        raise InputError(
            f"DoRA needs the numbers of the weight, but this {type(module).__name__} keeps them in a form that "
            "cannot be read: use expert_kind 'lora'."
        )
    weight = weight.T if type(module).__name__ == "Conv1D" else weight
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def magnitude_ratio(module: nn.Module, found: Factors) -> Tensor:
    """m / |W0 + s B A| of each row of each expert: (N, out), the norm detached."""
    with torch.no_grad():
        weight = plain_weight_rows(module)
        squared = weight.square().sum(1)
        norms = [
            shifted_row_norms_squared(weight, (found.scale * B).to(weight.dtype), A.to(weight.dtype), squared).sqrt()
            for A, B in zip(found.A, found.B, strict=True)
        ]
    assert found.magnitude is not None
    return found.magnitude / torch.stack(norms).to(found.magnitude.dtype)


def _with_parts(result: Tensor, updates: list[tuple[Segment, Tensor]]) -> Tensor:
    """The result with each segment's update added to its rows."""
    parts, at = [], 0
    for segment, update in updates:
        parts += [result[at : segment.start], result[segment.start : segment.stop] + update]
        at = segment.stop
    return torch.cat([*parts, result[at:]])
