"""Any LoRAs beside one linear layer, frozen, each with a gate from outside (X-LoRA, arXiv 2402.07148).

    y = W0 x + gamma sum_n g_n s_n B_n A_n x = W0 x + B_cat (g[owner] * (A_cat x))

    A_cat (R, in)   the A_n on top of each other, R = sum r_n; an expert without this module has no rows
    B_cat (out, R)  the s_n B_n side by side
    owner (R,)      the expert of each rank

A gate is one number per token, so it multiplies r numbers instead of d. A DoRA expert, m / |V| (W0 + s B A) x with
V = W0 + s B A, is W0 x + d (W0 x) + (1 + d) s B A x with d = m / |V| - 1 (out,): the factor 1 + d is in B_cat, and the
rows d (N, out) add g d (W0 x). The norms are those of the expert's own training and stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adapters.errors import InputError
from adapters.formats.lora import LoraLayer
from adapters.layers.experts.classifier import Classifier, ClassifierOptions
from adapters.layers.experts.config import MoeConfig
from adapters.layers.experts.layer import ExpertLinear, Factors, Place
from adapters.layers.experts.passes import GatesFromBase
from adapters.layers.experts.routing import Record, Segment
from adapters.layers.sizes import device_of, sizes


class FrozenExperts(ExpertLinear):
    """Frozen experts beside a linear layer; the first one in the model also keeps the classifier.

    Its tensors: ``moeadapter_A`` (R, in), ``moeadapter_B`` (out, R), ``moeadapter_rows`` (N, out) where an expert is
    DoRA, and in the first layer ``moeadapter_router`` (the classifier: ``weight_{i}``, ``bias_{i}``).
    """

    moeadapter_A: Any
    moeadapter_B: Any
    moeadapter_rows: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.moeadapter_rows = nn.ParameterDict()
        self.adapter_layer_names = (*self.adapter_layer_names, "moeadapter_rows")
        self._owners: dict[str, Tensor] = {}

    def update_layer(self, adapter: str, place: Place, config: MoeConfig, inference_mode: bool = False) -> None:
        """Make room for an adapter's experts; all zeros, so that nothing changes."""
        frozen = config.frozen[place.position]
        outputs, inputs = sizes(self.get_base_layer())
        device, total = device_of(self.get_base_layer()), sum(frozen["ranks"])
        self.places[adapter], self.settings[adapter] = replace(place, rank=total), config
        for name, shape in (("A", (total, inputs)), ("B", (outputs, total))):
            self._tensors("", name)[adapter] = nn.Parameter(torch.zeros(shape, device=device))
        if frozen["dora"]:
            zeros = torch.zeros(len(frozen["ranks"]), outputs, device=device)
            self.moeadapter_rows[adapter] = nn.Parameter(zeros)
        self._owners[adapter] = torch.tensor(_owners(frozen["ranks"]), device="cpu")
        options = ClassifierOptions.of(config.classifier)
        if place.position == 0:
            assert options.width is not None
            assert isinstance(self.routing.source, GatesFromBase)
            self.routing.source.owners[adapter] = self
            self.moeadapter_router[adapter] = Classifier(
                options, len(config.experts), len(config.frozen), options.width, device
            )
        self.moeadapter_dropout[adapter] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        own = ("moeadapter_A", "moeadapter_B") if config.trained == "router" else ()
        self.frozen_peft_weight_names[adapter] = (*own, "moeadapter_rows")
        self.set_adapter(self.active_adapters or [adapter], inference_mode=inference_mode)

    def factors(self, adapter: str, role: str = "") -> Factors:
        """A_cat, B_cat and the rows."""
        rows = self.moeadapter_rows.get(adapter)
        return Factors(self.moeadapter_A[adapter], self.moeadapter_B[adapter], 1.0, rows)

    def owner(self, adapter: str) -> Tensor:
        """(R,) the expert of each rank, on the layer's device."""
        device = self.moeadapter_A[adapter].device
        if self._owners[adapter].device != device:
            self._owners[adapter] = self._owners[adapter].to(device)
        return self._owners[adapter]

    def as_lora(self, adapter: str, gates: Tensor) -> LoraLayer:
        """With constant gates (N,), one ordinary LoRA; see :func:`constant`."""
        found, settings = self.factors(adapter), self.settings[adapter]
        ranks = settings.frozen[self.places[adapter].position]["ranks"]
        weight = float(settings.classifier.get("weight", 1.0))
        rows = None if found.magnitude is None else found.magnitude.detach().cpu()
        return constant(found.A.detach().cpu(), found.B.detach().cpu(), rows, ranks, gates.tolist(), weight, self.path)

    def segments(self, batch: int) -> list[Segment]:
        """No experts in a scaling pass with gates 0."""
        return [Segment(None, 0, batch)] if self.routing.resting else super().segments(batch)

    def _update(self, adapter: str, x: Tensor, result: Tensor, segment: Segment) -> Tensor:
        rows, config = slice(segment.start, segment.stop), self.settings[adapter]
        found = self.factors(adapter)
        gates = self._gates(adapter, x, rows).to(found.A.dtype) * float(config.classifier.get("weight", 1.0))
        inner = self.dropped(adapter, x, found.A) @ found.A.T
        update = (inner * gates[..., self.owner(adapter)]) @ found.B.T
        if found.magnitude is not None:
            bias = getattr(self.get_base_layer(), "bias", None)
            product = result[rows] if bias is None else result[rows] - bias
            update = update + (gates @ found.magnitude) * product.to(update.dtype)
        return update.to(result.dtype)

    def _gates(self, adapter: str, x: Tensor, rows: slice) -> Tensor:
        """(batch, length, N), or what broadcasts to it."""
        place = self.places[adapter]
        self.routing.check_gradients()
        found = self.routing.gates(rows, place.position).to(x.device)
        if found.shape[-1] != place.experts:
            raise InputError(f"There are {place.experts} experts, but the gates are for {found.shape[-1]}.")
        if self.routing.recording and x.ndim == 3:
            shown = found.detach().float().expand(*x.shape[:-1], place.experts)
            mask, types = self.routing.mask(rows, x.shape[1]), self.routing.types(rows)
            self.routing.record(adapter, Record(self.path, place.layer, shown, shown, None, mask, types))
        return found


def _owners(ranks: list[int]) -> list[int]:
    """The expert of each rank."""
    return [expert for expert, rank in enumerate(ranks) for _ in range(rank)]


def constant(
    A: Tensor, B: Tensor, rows: Tensor | None, ranks: Sequence[int], gates: Sequence[float], weight: float, name: str
) -> LoraLayer:
    """Experts with constant gates g (N,): one LoRA of rank R, A = A_cat, B the columns of B_cat times gamma g.

    Raises:
        InputError: an expert with a gate is DoRA, whose mixture is no LoRA.
    """
    given = torch.tensor(list(gates), dtype=torch.float32)
    if rows is not None and bool((rows * given[:, None]).any()):
        raise InputError(
            f"An expert on '{name}' is DoRA, whose mixture with others is no LoRA: keep the X-LoRA as it is."
        )
    return LoraLayer(A.clone(), B * (given * weight)[_owners(list(ranks))], alpha=float(A.shape[0]))
