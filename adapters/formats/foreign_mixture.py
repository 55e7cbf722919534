"""Mixtures of LoRA experts as other programs store them: one description, whatever the layout.

A mixture is not one LoRA: a router decides token by token how much of each expert acts. Its files are recognised here
so that the library can name them, and read as a :class:`Mixture`, from which :mod:`adapters.layers.experts` builds a
model. How many experts there are and of which rank is taken from the tensors' shapes; the configurations of these
programs often do not say, or say something else.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from adapters.errors import InputError
from adapters.formats.format import Format
from adapters.formats.header import CONFIG
from adapters.formats.lora import LoraFile

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats.header import Header

Method = Literal["mixlora", "mola", "loramoe", "llava-mole", "x-lora"]

TITLES: Mapping[Method, str] = {
    "mixlora": "MixLoRA", "mola": "MoLA", "loramoe": "LoRAMoE", "llava-mole": "LLaVA-MoLE", "x-lora": "X-LoRA",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class MixtureLayer:
    """The experts of one linear layer; a single one without a router is a plain LoRA.

    Attributes:
        A: (N, r, in).
        B: (N, out, r).
        scale: s of every expert, y = W0 x + sum_e gate_e s B_e A_e x.
    """

    A: Tensor
    B: Tensor
    scale: float

    @property
    def experts(self) -> int:
        return int(self.A.shape[0])

    @property
    def rank(self) -> int:
        return int(self.A.shape[1])


@dataclass(frozen=True, eq=False)
class MixtureRouter:
    """Logits of the experts: x W^T + b.

    Attributes:
        weight: (N, in).
        bias: (N,), or None.
    """

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of trained experts, as read from a file.

    Attributes:
        method: whose it is.
        format: name of the format.
        layers: module path -> its experts. Some programs leave out the first parts of a path ("layers.0.mlp.up_proj"):
            a module of the model ends with it.
        routers: path of the linear layer, or of the feed-forward block -> its router.
        top_k: experts per token; None = the method's own number, or all.
        dense: every expert acts, weighted by its probability.
        dropout: with which the experts were trained.
        activation: of the feed-forward blocks, if the file names one; it must be the base's.
        base: the base that the file names, or empty.
        notes: what the file cannot give, as sentences.
        path: where it was read from.
    """

    method: Method
    format: str
    layers: Mapping[str, MixtureLayer]
    routers: Mapping[str, MixtureRouter]
    top_k: int | None = None
    dense: bool = False
    dropout: float = 0.0
    activation: str = ""
    base: str = ""
    notes: tuple[str, ...] = ()
    path: Path | None = None

    def experts(self) -> tuple[int, ...]:
        """The different numbers of experts, ascending; plain LoRAs are left out."""
        return tuple(sorted({layer.experts for name, layer in self.layers.items() if self.router_of(name)})) or (1,)

    def router_of(self, module: str) -> str:
        """The path of the router of a linear layer: its own, or its block's; empty for a plain LoRA."""
        block = module.rpartition(".")[0]
        return module if module in self.routers else block if block in self.routers else ""


@dataclass(frozen=True)
class Outline:
    """What the library shows of a mixture, from its header alone.

    Attributes:
        method: whose it is.
        experts: different numbers of experts, ascending.
        ranks: different ranks, ascending.
        modules: paths of the adapted linear layers.
        base: the base that the file names, or empty.
    """

    method: Method
    experts: tuple[int, ...]
    ranks: tuple[int, ...]
    modules: tuple[str, ...]
    base: str = ""


class MixtureFormat(Format):
    """A layout of expert files. It is read as a mixture, never as one LoRA."""

    method: Method
    writes = False
    order = 8  # before PEFT directories, which some of them look like

    @abstractmethod
    def outline(self, head: Header) -> Outline:
        """What the header shows; raises :class:`InputError` (the reason alone) if it is not understood."""

    @abstractmethod
    def mixture(self, head: Header) -> Any:
        """The :class:`Mixture` (or X-LoRA's own description); raises :class:`InputError`."""

    def read(self, head: Header) -> LoraFile:
        raise InputError(
            f"'{head.path.name}' is a {TITLES[self.method]} mixture of experts, whose effect differs from token to "
            "token: it is used with its language model, and cannot be mixed, merged or converted as one LoRA."
        )


class NumberedExperts(MixtureFormat):
    """A PEFT directory whose linear layers have numbered experts; its configuration says it is a LoRA and gives alpha.

    Attributes:
        expert, router: of keys, with the groups ``module`` and ``side``, ``expert`` or ``kind``.
        acting: which experts act, as fields of :class:`Mixture`, and what the file does not say.
        counted: the entry of the configuration that gives the number of experts; "" for none.
    """

    expert: re.Pattern[str]
    router: re.Pattern[str]
    acting: ClassVar[Mapping[str, Any]]
    counted = ""

    def recognises(self, head: Header) -> bool:
        return self.counted in head.config or any(self.expert.match(name) for name in head.shapes)

    def outline(self, head: Header) -> Outline:
        base = text(head.config, "base_model_name_or_path")
        return outlined(self.method, head.shapes, head.config, self.expert, self.router, base)

    def mixture(self, head: Header) -> Mixture:
        """The mixture; raises :class:`InputError` if it is damaged or incomplete."""
        tensors, source = tensors_of(head)
        if not (config := head.config):
            raise InputError(
                f"{source} is a {self.title} mixture, but '{CONFIG}', which holds its alpha, is missing: copy the "
                "whole directory."
            )
        halves, gates, strange = sorted_keys(tensors, self.expert, self.router, None)
        refuse_strange(strange, source, self.title)
        alpha = number(config, "lora_alpha", source)
        layers = {name: layer_of(name, pair, alpha, False, source) for name, pair in halves.items()}
        if self.counted:
            check_said(config, self.counted, (layer.experts for layer in layers.values()), "experts", source)
        routers = routers_of(gates, layers, source)
        base = text(config, "base_model_name_or_path")
        return Mixture(self.method, self.name, layers, routers, base=base, path=head.path, **self.acting)


def is_foreign(path: Path) -> bool:
    """Whether a mixture of another program is at ``path``; False for what cannot be opened."""
    from adapters.formats.format import recognise
    from adapters.formats.reading import header_of

    try:
        return isinstance(recognise(header_of(path)), MixtureFormat)
    except InputError:
        return False


def tensors_of(head: Header) -> tuple[dict[str, Tensor], str]:
    """All tensors of a mixture's file, and its name for errors.

    Raises:
        InputError: the weights are missing, damaged, not finite, or a pickle of more than tensors.
    """
    from adapters.formats.tensors import check_finite, read_tensors

    file = head.weights
    if file is None:
        raise InputError(f"'{head.path}' has a configuration, but no weights (adapter_model.bin or .safetensors).")
    tensors, _ = read_tensors(file)
    source = f"'{file}'"
    if not tensors:
        raise InputError(f"{source} holds no tensors.")
    check_finite(tensors, source)
    return tensors, source


@dataclass
class Halves:
    """A and B of one linear layer while its file is read: number of the expert -> tensor. A plain LoRA is expert 0."""

    A: dict[int, Any] = field(default_factory=dict)
    B: dict[int, Any] = field(default_factory=dict)


def sorted_keys(
    tensors: Mapping[str, Any], pattern: re.Pattern[str], router: re.Pattern[str], skipped: re.Pattern[str] | None
) -> tuple[dict[str, Halves], dict[str, dict[str, Any]], list[str]]:
    """(module -> halves, place -> {"weight", "bias"}, keys that are neither).

    Args:
        pattern: of experts' keys, with groups ``module``, ``expert`` (may be absent) and ``side`` (A or B).
        router: with groups ``module`` and ``kind``.
        skipped: keys that are rightly left out.
    """
    layers: dict[str, Halves] = {}
    routers: dict[str, dict[str, Any]] = {}
    strange: list[str] = []
    for key, tensor in tensors.items():
        if (found := pattern.match(key)) is not None:
            halves = layers.setdefault(found["module"], Halves())
            side = halves.A if found["side"] == "A" else halves.B
            side[int(found["expert"] or 0)] = tensor
        elif (found := router.match(key)) is not None:
            routers.setdefault(found["module"], {})[found["kind"]] = tensor
        elif skipped is None or not skipped.search(key):
            strange.append(key)
    return layers, routers, strange


def layer_of(name: str, halves: Halves, alpha: float, rslora: bool, source: str) -> MixtureLayer:
    """The experts of one linear layer, with all shapes checked.

    Raises:
        InputError: an expert or a half of one is missing, or shapes differ or do not multiply.
    """
    import torch

    shapes = shapes_of(name, halves, source)
    rank = shapes[0][0][0]
    if len(set(shapes)) > 1:
        other = next(number for number, pair in enumerate(shapes) if pair != shapes[0])
        raise InputError(
            f"{source}: expert {other} of '{name}' has the shapes {shapes[other][0]} and {shapes[other][1]}, expert 0 "
            f"has {shapes[0][0]} and {shapes[0][1]}."
        )
    order = sorted(halves.A)
    A, B = (torch.stack([side[e].float() for e in order]) for side in (halves.A, halves.B))
    return MixtureLayer(A, B, alpha / (math.sqrt(rank) if rslora else rank))


def shapes_of(name: str, halves: Halves, source: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes of A (r, in) and B (out, r) of each expert; ``halves`` may hold tensors or shapes.

    Raises:
        InputError: an expert or a half of one is missing, or they do not multiply.
    """
    numbers = sorted(halves.A.keys() | halves.B.keys())
    lost = next((e for e in range(numbers[-1] + 1) if e not in halves.A or e not in halves.B), None)
    if lost is not None:
        side = "A" if lost not in halves.A else "B"
        raise InputError(
            f"{source}: '{name}' has experts up to number {numbers[-1]}, but {side} of expert {lost} is missing: the "
            "file is not complete."
        )
    found = [(_shape(halves.A[e]), _shape(halves.B[e])) for e in numbers]
    for e, (a, b) in enumerate(found):
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise InputError(f"{source}: A {a} and B {b} of expert {e} in '{name}' do not multiply to a linear layer.")
    return found


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(getattr(tensor, "shape", tensor))


def routers_of(
    found: Mapping[str, Mapping[str, Any]], layers: Mapping[str, MixtureLayer], source: str
) -> dict[str, MixtureRouter]:
    """The routers, checked against the experts of their layers.

    Raises:
        InputError: a router without experts, experts without a router, or sizes that differ.
    """
    made: dict[str, MixtureRouter] = {}
    for place, parts in found.items():
        weight, bias = parts.get("weight"), parts.get("bias")
        if weight is None or weight.ndim != 2 or (bias is not None and tuple(bias.shape) != (weight.shape[0],)):
            raise InputError(f"{source}: the router of '{place}' is not one matrix (experts, inputs).")
        made[place] = MixtureRouter(weight.float(), None if bias is None else bias.float())
        inside = {name: layer for name, layer in layers.items() if place in (name, name.rpartition(".")[0])}
        if not inside:
            raise InputError(f"{source}: the router of '{place}' has no experts.")
        for name, layer in inside.items():
            if layer.experts != weight.shape[0]:
                raise InputError(
                    f"{source}: the router of '{place}' is for {weight.shape[0]} experts, but '{name}' has "
                    f"{layer.experts}."
                )
    for name, layer in layers.items():
        if layer.experts > 1 and name not in made and name.rpartition(".")[0] not in made:
            raise InputError(f"{source}: '{name}' has {layer.experts} experts, but no router.")
    return made


def refuse_strange(keys: list[str], source: str, title: str) -> None:
    """Raise :class:`InputError` if there are ``keys`` that the layout does not have."""
    if keys:
        shown = ", ".join(f"'{key[:80]}'" for key in keys[:3])
        raise InputError(
            f"{source} is a {title} mixture with {len(keys)} keys that are not understood ({shown}"
            f"{', ...' if len(keys) > 3 else ''})."
        )


def outlined(
    method: Method,
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    pattern: re.Pattern[str],
    router: re.Pattern[str],
    base: str = "",
) -> Outline:
    """The outline of a file whose experts' keys match ``pattern``; a shape () is not known.

    Raises:
        InputError: experts are missing or do not fit together; the message is the reason alone.
    """
    layers, routers, _ = sorted_keys(shapes, pattern, router, None)
    counts: set[int] = set()
    ranks: set[int] = set()
    for name, halves in layers.items():
        if () not in halves.A.values():
            ranks |= {a[0] for a, _ in shapes_of(name, halves, "it")}
        if name in routers or name.rpartition(".")[0] in routers:
            counts.add(len(halves.A))
    said = config.get("r")
    ranks |= {rank for rank in (said if isinstance(said, list) else [said]) if isinstance(rank, int) and not ranks}
    many = config.get("num_experts", config.get("lora_nums"))
    counts |= {many} if isinstance(many, int) and not counts else set()
    return Outline(method, tuple(sorted(counts)) or (1,), tuple(sorted(ranks)), tuple(sorted(layers)), base)


def number(config: Mapping[str, Any], entry: str, source: str, default: float | None = None) -> float:
    """A positive, finite number of a configuration.

    Raises:
        InputError: it is missing, or no such number.
    """
    value = config.get(entry, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise InputError(f"{source}: the {entry} of its configuration, '{str(value)[:40]}', is not a positive number.")
    return float(value)


def text(config: Mapping[str, Any], entry: str) -> str:
    """A text of a configuration; empty if it is none."""
    value = config.get(entry)
    return value if isinstance(value, str) else ""


def check_said(config: Mapping[str, Any], entry: str, found: Iterable[int], what: str, source: str) -> None:
    """Refuse a configuration that says another number than the tensors show (where it says one).

    Raises:
        InputError: naming both.
    """
    said = config.get(entry)
    counts = sorted(set(found))
    if isinstance(said, int) and not isinstance(said, bool) and counts and counts != [said]:
        raise InputError(
            f"{source}: its configuration says {said} {what}, but its tensors have {', '.join(map(str, counts))}: the "
            "weights and the configuration do not belong together."
        )
