"""LoRAs of one shape as vectors x in R^D, and back.

The vector holds every layer's A and B in the order of (component, module), whatever the order in the file. Before
learning, the r rank-1 terms of a layer are brought to one gauge, because B A = (B G) (G^-1 A) for every G in GL(r) and
averages over different gauges mean nothing. Of the terms b_k a_k^T,

    balanced     a_k <- t a_k,  b_k <- b_k / t,  t = sqrt(|b_k| / |a_k|), so that |a_k| = |b_k|; the largest entry of
                 a_k is positive
    aligned      balanced, then in the order (Hungarian method) and with the signs that make
                 sum_k |<a_k, a'_k> + <b_k, b'_k>| with a reference's terms largest

leave B A as it is. A general G is not undone: adapters should start from the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adapters.errors import FamilyError, InputError
from adapters.formats.lora import LoraFile, LoraLayer, group_dict
from adapters.generation.settings import Gauge

BASE = "base_model_name_or_path"
KEPT = (BASE, "task_type")
"""Entries of PEFT's configuration that an adapter made from a vector gets too."""

ORIGIN = ("name", "family", "architecture", "digest")
"""Entries of a recipe's base that an adapter made from a vector gets too."""


@dataclass(frozen=True)
class LayerShape:
    """What a layer is besides its values; shapes of A (r, in...) and B (out, r...)."""

    component: str
    module: str
    A: tuple[int, ...]
    B: tuple[int, ...]
    alpha: float
    rslora: bool
    embedding: bool
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.component}.{self.module}"


@dataclass(frozen=True)
class LoraCodec:
    """The layers of a LoRA in the order of its vector.

    Attributes:
        layers: in the order of (component, module).
        config: PEFT's entries that adapters made from vectors get: the base and the kind of task, if known.
        origin: what the first adapter's recipe says of its base (:data:`ORIGIN`), with the digest of its weights; empty
            if the adapter has no recipe.
    """

    layers: tuple[LayerShape, ...]
    config: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, file: LoraFile) -> LoraCodec:
        """The codec of a LoRA and of all with the same layers.

        Raises:
            InputError: no layers, DoRA, or tensors besides A and B.
        """
        if file.is_dora():
            raise InputError("The adapter is DoRA, whose magnitudes depend on the base: use plain LoRAs.")
        if more := (*file.words, *file.embeddings, *(name for own in file.copies.values() for name in own)):
            raise InputError(f"The adapter holds more than LoRA layers ('{more[0]}'): use plain LoRAs.")
        layers = tuple(_shape(component, module, layer) for component, module, layer in file.layers())
        if not layers:
            raise InputError("The adapter has no layers.")
        return cls(layers, _texts(file.config, KEPT), _texts(file.recipe().get("base"), ORIGIN))

    @property
    def size(self) -> int:
        """D."""
        return sum(length for _, length in self.tensors())

    @property
    def base(self) -> str:
        """The base that the adapters name; empty if they name none."""
        return self.config.get(BASE) or self.origin.get("name", "")

    @property
    def digest(self) -> str:
        """The digest of the base's weights; empty if the adapters say none."""
        return self.origin.get("digest", "")

    def check_base(self, name: str, digest: str, label: str) -> None:
        """Refuse another base: by the digests of the weights if both are known, else by the names.

        Args:
            name, digest: of the base; empty if unknown.
            label: what it is the base of, for the message.

        Raises:
            FamilyError: the bases differ.
        """
        if self.digest and digest:
            if self.digest != digest:
                raise FamilyError(
                    f"{label} is for a base with other weights ('{name or 'unnamed'}', {digest[:12]}) than the "
                    f"adapters of the generator ('{self.base or 'unnamed'}', {self.digest[:12]})."
                )
        elif self.base and name and self.base != name:
            raise FamilyError(f"{label} is for the base '{name}', the generator's adapters are for '{self.base}'.")

    def tensors(self) -> Iterator[tuple[str, int]]:
        """(name, number of entries) of each tensor in the order of the vector."""
        for layer in self.layers:
            yield f"{layer.name}.A", _count(layer.A)
            yield f"{layer.name}.B", _count(layer.B)

    def check(self, file: LoraFile, label: str = "An adapter") -> None:
        """Refuse a LoRA with other layers, shapes, ranks or scales, of another base, or with values not finite.

        Raises:
            InputError: with the first difference.
            FamilyError: it names another base.
        """
        other = LoraCodec.of(file)
        self.check_base(other.base, other.digest, label)
        mine, its = ({layer.name: layer for layer in codec.layers} for codec in (self, other))
        if missing := sorted(mine.keys() ^ its.keys()):
            raise InputError(f"{label} has other layers than the others: '{missing[0]}' is in only one of them.")
        for name, layer in mine.items():
            if its[name] != replace(layer, dtype=its[name].dtype):
                raise InputError(
                    f"{label} differs in '{name}': {_told(its[name])}, the others have {_told(layer)}. All adapters of "
                    "a generator need the same shapes, rank and alpha."
                )
        for component, module, pair in file.layers():
            if not bool(pair.A.isfinite().all() and pair.B.isfinite().all()):
                raise InputError(f"{label} holds values that are not finite in '{component}.{module}'.")

    def flatten(self, file: LoraFile) -> Tensor:
        """The LoRA as a vector (D,) in fp32.

        Raises:
            InputError: see :meth:`check`.
        """
        self.check(file)
        found = (file.parts[layer.component][layer.module] for layer in self.layers)
        return torch.cat([side.detach().cpu().float().flatten() for layer in found for side in (layer.A, layer.B)])

    def unflatten(self, vector: Tensor, metadata: Mapping[str, str] | None = None) -> LoraFile:
        """The LoRA of a vector (D,), in the dtypes of the first adapter.

        Raises:
            InputError: another length, or values that are not finite.
        """
        if vector.shape != (self.size,):
            raise InputError(f"The vector has the shape {tuple(vector.shape)}, this LoRA has ({self.size},).")
        if not bool(vector.isfinite().all()):
            raise InputError("The vector holds values that are not finite.")
        made: dict[tuple[str, str], LoraLayer] = {}
        start = 0
        for layer in self.layers:
            sides = []
            for shape in (layer.A, layer.B):
                part = vector[start : start + _count(shape)]
                sides.append(part.to(getattr(torch, layer.dtype), copy=True).reshape(shape))
                start += _count(shape)
            made[layer.component, layer.module] = LoraLayer(
                sides[0], sides[1], layer.alpha, layer.rslora, embedding=layer.embedding
            )
        return LoraFile(group_dict(made), metadata=dict(metadata or {}), config=dict(self.config))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {"layers": [asdict(layer) for layer in self.layers], "config": dict(self.config),
                "origin": dict(self.origin)}  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraCodec:
        """The codec that :meth:`to_dict` described.

        Raises:
            KeyError, TypeError, ValueError: the values describe none.
        """
        layers = tuple(
            LayerShape(
                component=str(one["component"]),
                module=str(one["module"]),
                A=_sizes(one["A"]),
                B=_sizes(one["B"]),
                alpha=float(one["alpha"]),
                rslora=bool(one["rslora"]),
                embedding=bool(one["embedding"]),
                dtype=str(one["dtype"]),
            )
            for one in values["layers"]
        )
        if not layers or any(layer.dtype not in _DTYPES or layer.A[0] != layer.B[1] for layer in layers):
            raise ValueError("no layers, or layers that fit no LoRA")
        return cls(layers, _texts(values["config"], KEPT), _texts(values.get("origin"), ORIGIN))


_DTYPES = ("float32", "float16", "bfloat16")


def in_gauge(file: LoraFile, gauge: Gauge, reference: LoraFile | None = None) -> LoraFile:
    """The same LoRA in one gauge; its updates B A stay.

    Args:
        reference: for "aligned": a LoRA of the same shapes in the gauge "balanced".
    """
    if gauge == "none":
        return file
    made: dict[tuple[str, str], LoraLayer] = {}
    for component, module, layer in file.layers():
        one = balanced(layer)
        if gauge == "aligned" and reference is not None:
            one = aligned(one, reference.parts[component][module])
        made[component, module] = one
    return file.with_parts(group_dict(made), file.flat)


def balanced(layer: LoraLayer) -> LoraLayer:
    """The layer with |a_k| = |b_k| and the largest entry of a_k positive; terms that are zero stay as they are."""
    A, B = _terms(layer)
    norms_a, norms_b = A.norm(dim=1), B.norm(dim=1)
    alive = (norms_a > 0) & (norms_b > 0)
    t = torch.where(alive, (norms_b / norms_a).sqrt(), torch.ones_like(norms_a))
    largest = A.gather(1, A.abs().argmax(1, keepdim=True)).squeeze(1)
    sign = torch.where(largest < 0, -1.0, 1.0).to(A)
    return _layer(layer, A * (t * sign)[:, None], B * (sign / t)[:, None])


def aligned(layer: LoraLayer, reference: LoraLayer) -> LoraLayer:
    """The layer with its terms in the order and with the signs of the reference's."""
    from scipy.optimize import linear_sum_assignment

    A, B = _terms(layer)
    first, second = _terms(reference)
    products = first @ A.T + second @ B.T  # (reference's term, own term)
    rows, columns = linear_sum_assignment(-products.abs().numpy())
    order = torch.as_tensor(columns)
    sign = torch.where(products[torch.as_tensor(rows), order] < 0, -1.0, 1.0).to(A)
    return _layer(layer, A[order] * sign[:, None], B[order] * sign[:, None])


def _terms(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """Rows a_k (r, in) and b_k (r, out) in fp64."""
    return layer.A.detach().cpu().double().flatten(1), layer.B.detach().cpu().double().flatten(1).T


def _layer(layer: LoraLayer, A: Tensor, B: Tensor) -> LoraLayer:
    return replace(
        layer,
        A=A.reshape(layer.A.shape).to(layer.A.dtype),
        B=B.T.reshape(layer.B.shape).to(layer.B.dtype),
    )


def _shape(component: str, module: str, layer: LoraLayer) -> LayerShape:
    dtype = str(layer.A.dtype).removeprefix("torch.")
    return LayerShape(
        component, module, tuple(layer.A.shape), tuple(layer.B.shape), float(layer.alpha), layer.rslora,
        layer.embedding, dtype if dtype in _DTYPES else "float32",
    )  # fmt: skip


def _sizes(values: Any) -> tuple[int, ...]:
    sizes = tuple(int(value) for value in values)
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"{sizes} is no shape of a LoRA's tensor")
    return sizes


def _texts(values: Any, names: Sequence[str]) -> dict[str, str]:
    """The entries ``names`` of a table that are not empty, as text; {} for anything that is no table."""
    return {name: str(values[name]) for name in names if values.get(name)} if isinstance(values, Mapping) else {}


def _count(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _told(layer: LayerShape) -> str:
    kind = "rsLoRA" if layer.rslora else "LoRA"
    return f"A {tuple(layer.A)}, B {tuple(layer.B)}, alpha {layer.alpha:g}, {kind}"
