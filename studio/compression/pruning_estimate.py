"""What pruning will need and give, before any weight is read: sizes, memory of every phase, time.

Sizes are exact, because the counts of heads and channels do not depend on which of them go. Memory and time are those
of :mod:`studio.training.estimate` on the base that is trained on, with what else is in memory in each phase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adapters.compression import loram, loraprune
from adapters.compression.slicing import members
from adapters.compression.structure import Pruning, Reduction, reduction, sizes_of
from adapters.errors import InputError
from studio import library
from studio.cli.output import duration, size
from studio.compression import layers as figures
from studio.compression import ready, small_bases
from studio.compression.layers import Left
from studio.compression.pruning_schema import LoramConfig, LoraPruneConfig, PruningConfig
from studio.training import estimate as training

FULL = 16
"""Bytes of a weight that learns in fp32: itself, its gradient, two moments of AdamW."""


@dataclass(frozen=True)
class PruningEstimate:
    """Of a pruning.

    Attributes:
        pruning: the counts at its end.
        files, base_files: bytes of the small and the whole base, in the precision of the base's files.
        memory: phase -> bytes at its peak; ``seconds``: phase -> time.
        keeps: the small base is what is made; otherwise an adapter.
        advice: what to expect and to do.
    """

    pruning: Pruning
    files: int
    base_files: int
    memory: Mapping[str, int]
    seconds: Mapping[str, float]
    keeps: bool
    advice: str
    ratios: Reduction = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", reduction(self.pruning))

    @property
    def facts(self) -> list[tuple[str, str]]:
        """(what, how much)."""
        small, whole = self.ratios.small, self.ratios.whole
        phases = ", ".join(f"{name} {size(number)}" for name, number in self.memory.items())
        times = ", ".join(f"{name} {duration(number)}" for name, number in self.seconds.items())
        return [
            ("Result" if self.keeps else "Learns on", f"{small / 1e6:.4g} of {whole / 1e6:.4g} million parameters "
             f"({small / whole:.0%}); files of {size(self.files)} instead of {size(self.base_files)}"),
            ("Memory", f"{size(max(self.memory.values()))} at most ({phases})"),
            ("Time", f"{times}; loading and measuring are extra"),
        ]  # fmt: skip

    @property
    def layers(self) -> Sequence[Left]:
        """Heads and channels that stay in every layer."""
        return figures.of_pruning(self.pruning)

    def as_json(self) -> dict[str, Any]:
        """The numbers."""
        return {"bytes": self.files, "base_bytes": self.base_files, "memory": dict(self.memory),
                "seconds": dict(self.seconds), "counts": self.pruning.counts(), "ratios": asdict(self.ratios),
                "advice": self.advice}  # fmt: skip


def of_loram(config: LoramConfig) -> PruningEstimate:
    """The estimate of LoRAM.

    Raises:
        InputError: a base that cannot be pruned so far, or whose shapes cannot be read.
    """
    device, dtype = training.chosen(config)
    whole = _whole(config, dtype)
    sizes = sizes_of(whole.config)
    cut = config.prune if config.pattern == "groups" else 0.0
    pruning = loram.sized(sizes, cut, config.whole_first, config.whole_last)
    small = training.shapes_of(config, dtype, pruning)
    speed = training.measured_speed(device, dtype)
    learning = training.estimate(training.look_at_language(config, dtype, pruning), config, dtype, device, speed)
    weights = _bytes(whole)
    memory = {"cutting": weights + _bytes(small)}
    seconds: dict[str, float] = {}

    def spent(counted: tuple[int, int, float], passes: int) -> float:
        _, operations, flops = counted
        return passes * (flops / (speed * training.EFFICIENCY) + operations * training.OVERHEAD[device.split(":")[0]])

    chosen = loram.blocks(sizes, config.prune, config.whole_first, config.whole_last)
    if config.importance == "wanda" and chosen:
        counted = training.count_language(whole, config.batch_size, config.max_length)
        memory["importance"] = weights
        seconds["importance"] = spent(counted, config.importance_batches)
    if config.importance == "taylor" and chosen:
        scored = [module.weight for _, number, _, module in members(whole) if number in chosen]
        for weight in scored:
            weight.requires_grad_(True)
        counted = training.count_language(whole, config.batch_size, config.max_length)
        gradients = sum(weight.numel() * weight.element_size() for weight in scored)
        memory["importance"] = weights + gradients + counted[0]
        seconds["importance"] = spent(counted, config.importance_batches)
    if config.align_data:
        full = small.float().requires_grad_(True)
        if not sizes.tied:
            full.get_output_embeddings().requires_grad_(False)
        counted = training.count_language(full, config.align_batch, config.max_length)
        memory["alignment"] = sum(p.numel() * (FULL if p.requires_grad else 4) for p in full.parameters()) + counted[0]
        seconds["alignment"] = spent(counted, config.align_steps)
    memory["training"], seconds["training"] = learning.total, learning.seconds
    files, base_files = _files(config, pruning)
    return PruningEstimate(pruning, files, base_files, memory, seconds, False, _loram_advice(config, pruning))


def of_loraprune(config: LoraPruneConfig) -> PruningEstimate:
    """The estimate of LoRAPrune.

    Raises:
        InputError: as :func:`of_loram`.
    """
    from studio.compression.methods.loraprune import settings

    device, dtype = training.chosen(config)
    whole = _whole(config, dtype)
    pruning = loraprune.sized(sizes_of(whole.config), settings(config))
    speed = training.measured_speed(device, dtype)
    learning = training.estimate(training.look_at_language(config, dtype), config, dtype, device, speed)
    cut = [module.weight.numel() for _, number, _, module in members(whole) if pruning.layers[number].channels]
    judging = 4 * (sum(cut) if config.criterion == "gradient" else 3 * max(cut, default=0))
    share = reduction(pruning)
    memory = {"training": learning.total + judging, "cutting": round(_bytes(whole) * (1 + share.small / share.whole))}
    files, base_files = _files(config, pruning)
    advice = _loraprune_advice(config, pruning)
    return PruningEstimate(pruning, files, base_files, memory, {"training": learning.seconds}, True, advice)


def _whole(config: PruningConfig, dtype: str) -> Any:
    """The whole base without values.

    Raises:
        InputError: one that is pruned or quantised already, or not like Llama.
    """
    ready.base_to_prune(config)
    try:
        found = training.shapes_of(config, dtype)
    except (ValueError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"The configuration of '{config.base}' cannot be read ({error}).") from None
    return found


def _bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _files(config: PruningConfig, pruning: Pruning) -> tuple[int, int]:
    """Bytes of the small and the whole base's weights, in the precision of its files."""
    found, stored = reduction(pruning), small_bases.stored_dtype(config)
    place = Path(library.resolve_language(config.base))
    whole = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    each = stored.itemsize if stored else whole / found.whole
    return round(found.small * each), whole or round(found.whole * each)


def _heads(config: PruningConfig, pruning: Pruning) -> str:
    """A remark where the share is too small for a single head."""
    heads = pruning.sizes.kv_heads
    if not config.prune or any(count < heads for count, _ in pruning.counts()):
        return ""
    return f" Only channels go: {config.prune:g} of {heads} key-value heads is less than one."


def _loram_advice(config: LoramConfig, pruning: Pruning) -> str:
    found = reduction(pruning)
    if config.pattern != "groups":
        told = "Zeros save no memory here: this is for comparison, and for hardware that skips them."
    elif found.small < 0.7 * found.whole and not config.align_data:
        told = "A small model cut so far hardly writes, and its adapter fits the whole one less: give general text "
        told += "(align_data) to train it first."
    else:
        told = "The recovered adapter usually gains less than one trained on the whole base."
    told += _heads(config, pruning) if config.pattern == "groups" else ""
    if config.validation_data or config.validation_split:
        return told
    return told + " Hold rows out (validation_split), or nobody knows whether the recovered adapter helps."


def _loraprune_advice(config: LoraPruneConfig, pruning: Pruning) -> str:
    found = reduction(pruning)
    first, last = config.prune_warmup * config.steps, (1 - config.prune_cooldown) * config.steps
    events = 1 + sum(first < step < last for step in range(0, config.steps, config.prune_every))  # one exact at the end
    few = f" Only {events} prunings fit into {config.steps} steps: take more steps." if events < 5 else ""
    few += _heads(config, pruning)
    if found.small >= 0.85 * found.whole:
        return "Expect a small loss on general text." + few
    if found.small >= 0.7 * found.whole:
        return "Expect a loss that shows on all text but your rows: use varied rows, or train afterwards." + few
    return "Expect a large loss on all text but your rows: train the result on general text afterwards." + few
