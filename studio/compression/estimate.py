"""What a compression will need and give, before it runs: bytes from the shapes, and what to expect of the quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from adapters.compression import L4Q_FILE
from adapters.errors import InputError
from studio.cli.output import size
from studio.compression.layers import Left
from studio.compression.schema import CompressL4qConfig, CompressLqConfig

if TYPE_CHECKING:
    from studio.compression.base import Base
    from studio.schema import JobConfig

GB = 1e9


class Forecast(Protocol):
    """What every estimate says."""

    @property
    def facts(self) -> list[tuple[str, str]]:
        """(what, how much), readable."""
        ...

    @property
    def advice(self) -> str:
        """What to expect and to do, in a sentence."""
        ...

    @property
    def layers(self) -> Sequence[Left]:
        """Figures per layer, where they are known before the run."""
        ...

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        ...


@dataclass(frozen=True)
class Estimate:
    """Of the new base's files.

    Attributes:
        bytes, base_bytes: of the new base and the old one.
        matrices, low_rank, rest: parts of ``bytes``: few-bit matrices, the low-rank part, everything else.
        bits: per weight of the matrices.
    """

    bytes: float
    base_bytes: float
    matrices: float
    low_rank: float
    rest: float
    bits: float
    layers: Sequence[Left] = ()

    @property
    def facts(self) -> list[tuple[str, str]]:
        """(what, how much)."""
        return [
            ("Files", f"{size(self.bytes)} instead of {size(self.base_bytes)}"),
            ("Matrices", f"{size(self.matrices)} at {self.bits:.2f} bits"),
            *([("Low-rank part", size(self.low_rank))] if self.low_rank else []),
            ("The rest", size(self.rest)),
        ]

    @property
    def advice(self) -> str:
        """What to expect of so many bits, in one sentence."""
        if self.bits >= 4:
            return "At 4 bits and more the model usually changes little."
        if self.bits >= 3:
            return "Between 3 and 4 bits expect a small loss; rows of your own data keep what matters to you."
        if self.bits >= 2.5:
            return "Below 3 bits expect a loss that shows: give rows, and train afterwards with init lq_lora."
        return "Near 2 bits the loss is large: train afterwards with init lq_lora, or take more bits."

    def as_json(self) -> dict[str, Any]:
        """The numbers."""
        return {name: value for name, value in asdict(self).items() if name != "layers"}


@dataclass(frozen=True)
class IntegerEstimate(Estimate):
    """Of an integer base, whose quality its training has measured already."""

    @property
    def advice(self) -> str:
        return "Its loss is the training's validation loss, which counted the rounding."


def estimated(config: CompressLqConfig) -> Estimate:
    """The estimate of LQ-LoRA; reads only the heads of the base's files.

    Raises:
        InputError: a base that cannot be compressed, or a size into which it does not fit.
    """
    from studio.compression.base import Base

    base = Base.of(config.base)
    low_rank = float(sum(2 * config.rank * (out + inputs) for out, inputs in base.matrices.values()))
    rest = float(base.bytes - sum(base.nbytes(f"{name}.weight") for name in base.matrices))
    bits = bits_of(config, base, low_rank + rest)
    matrices = base.count * bits / 8
    return Estimate(matrices + low_rank + rest, float(base.bytes), matrices, low_rank, rest, bits)


def of_l4q(config: CompressL4qConfig) -> Estimate:
    """The estimate of the integer base: layers that the adapter did not train stay as they are.

    Raises:
        InputError: a base that cannot be compressed, or an adapter that was not trained through a rounding.
    """
    from safetensors import safe_open

    from studio.compression.base import Base
    from studio.compression.ready import rounded

    base = Base.of(config.base)
    with safe_open(rounded(config.adapter) / L4Q_FILE, framework="pt") as opened:
        bits, group = (int(opened.get_tensor(name)) for name in ("bits", "group"))
        trained = [name.removesuffix(".step") for name in opened.keys() if name.endswith(".step")]  # noqa: SIM118
    per_weight = bits + 64 / group  # steps and offsets are fp32
    count = sum(out * inputs for out, inputs in (base.matrices[name] for name in trained if name in base.matrices))
    rest = float(base.bytes - sum(base.nbytes(f"{name}.weight") for name in trained if name in base.matrices))
    matrices = count * per_weight / 8
    return IntegerEstimate(matrices + rest, float(base.bytes), matrices, 0.0, rest, per_weight)


def bits_of(config: CompressLqConfig, base: Base, other: float) -> float:
    """Bits per weight of the matrices: as asked, or what is left of ``fit`` after ``other`` bytes.

    Raises:
        InputError: nothing useful is left.
    """
    if config.uniform:
        from adapters.compression.normal_float import Configuration

        return Configuration(int(config.uniform[2:])).bits_per_weight
    if config.fit is None:
        return config.bits
    bits = (config.fit * GB - other) * 8 / base.count
    if bits < 2.05:
        raise InputError(
            f"{config.fit:g} GB is too little: the rest of the model and a low-rank part of rank {config.rank} take "
            f"{other / GB:.3g} GB, and the matrices at least {base.count * 2.05 / 8 / GB:.3g}: lower the rank, or take "
            "a smaller base."
        )
    return min(bits, 8.0)


def sentence(found: Forecast) -> str:
    """The estimate as text."""
    return "; ".join(f"{what}: {much}" for what, much in found.facts) + f". {found.advice}"


@dataclass(frozen=True)
class Told:
    """A forecast as plain values."""

    facts: Sequence[tuple[str, str]]
    advice: str
    layers: Sequence[Left]


def told(config: JobConfig) -> Told:
    """The forecast of a compression as plain values.

    Raises:
        InputError: as the kind's estimate.
    """
    from studio.jobs import kinds

    found: Forecast = kinds.find(config.kind).foreseen(config)
    return Told(found.facts, found.advice, found.layers)
