"""Reports on loaded adapters, and plans of calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from adapters.formats.coverage import Coverage, told
from pipelines.diffusion.distillation.mark import Mark
from pipelines.diffusion.folding import Folds
from pipelines.diffusion.methods.step import Step
from pipelines.diffusion.regions.region import Region
from pipelines.diffusion.schedule import By


@dataclass(frozen=True)
class LoraReport:
    """A loaded adapter.

    Attributes:
        name: in this pipeline.
        path, sha256, format: the file it came from.
        layers: number of layers per component, all of them in use.
        coverage: component -> which share of its linear layers that is.
        ranks: the different ranks, ascending.
        dora: it has DoRA layers (its schedule can only switch it on and off).
        parameters: number of parameters.
        weight, te_weight: strength in the denoiser and in the text encoders.
        triggers: trigger words.
        blocks: factor per block prefix.
        schedule, schedule_by: keyframes (position, factor), by "step" or "sigma".
        distilled: what is built into it, if it is distilled.
        region: its own region, if it was loaded with one.
    """

    name: str
    path: str
    sha256: str
    format: str
    layers: Mapping[str, int]
    ranks: tuple[int, ...]
    dora: bool
    parameters: int
    weight: float
    te_weight: float
    triggers: tuple[str, ...] = ()
    blocks: Mapping[str, float] = field(default_factory=dict)
    schedule: tuple[tuple[float, float], ...] = ()
    schedule_by: By = "step"
    distilled: Mark | None = None
    region: Region | None = None
    coverage: Mapping[str, Coverage] = field(default_factory=dict)

    def __str__(self) -> str:
        layers = told(self.coverage)
        ranks = "/".join(map(str, self.ranks))
        kind = "DoRA" if self.dora else "LoRA"
        built_in = f"; {self.distilled}" if self.distilled else ""
        place = f"; {report_region(self.region)}" if self.region else ""
        return (
            f"{self.name}: {kind} of rank {ranks} on {layers}, weight {self.weight:g} ({self.format}){built_in}{place}"
        )


@dataclass(frozen=True)
class RegionReport:
    """A region: its place (a box, a mask, or neither if found automatically), adapters, texts and strength."""

    name: str
    box: tuple[float, float, float, float] | None
    masked: bool
    adapters: tuple[str, ...]
    prompt: str
    negative: str | None
    scale: float
    schedule: tuple[tuple[float, float], ...]
    schedule_by: By = "step"

    def __str__(self) -> str:
        numbers = ", ".join(f"{edge:.3g}" for edge in self.box) if self.box else ""
        place = f"box {numbers}" if self.box else "mask" if self.masked else "found automatically"
        text = f"'{self.prompt}'" if self.prompt else "the whole prompt"
        faded = f" x {self.scale:g}" if self.scale != 1 else ""
        times = f" by {'noise level' if self.schedule_by == 'sigma' else 'schedule'}" if self.schedule else ""
        return f"region {self.name}: {place}; {', '.join(self.adapters)}{faded}{times}; {text}"


def report_region(region: Region) -> RegionReport:
    """The report on a region."""
    return RegionReport(
        region.title, region.box, region.mask is not None, region.adapters, region.prompt, region.negative,
        region.scale, tuple(region.schedule), region.schedule_by,
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a call will do.

    Attributes:
        method, adapters, te_mode: the composition.
        steps: the steps, with the gates of each.
        guided: every prediction has two halves (unconditional and conditional).
        adapter_batch: predictions per call of the denoiser; None = all.
        encodings: number of prompt encodings.
        memory: bytes of the adapters' joined matrices.
        regions, options: where adapters act and how (regional methods).
        warnings: what may surprise, one sentence each.
        folds: what is folded into the weights.
        reports: on the adapters, in order.
    """

    method: str
    adapters: tuple[str, ...]
    te_mode: str
    steps: tuple[Step, ...]
    guided: bool
    adapter_batch: int | None
    encodings: int
    memory: int
    regions: tuple[RegionReport, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    folds: Folds = field(default_factory=Folds)
    reports: tuple[LoraReport, ...] = ()

    @property
    def gates(self) -> list[tuple[float, ...]]:
        """Strength of every adapter at every step."""
        return [step.gates for step in self.steps]

    @property
    def forwards(self) -> int:
        """Denoiser predictions per picture and guidance half, over all steps."""
        return sum(step.forwards for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for JSON."""
        return {
            "method": self.method,
            "adapters": list(self.adapters),
            "te_mode": self.te_mode,
            "steps": len(self.steps),
            "gates": [list(row) for row in self.gates],
            "forwards": self.forwards,
            "samples": self.forwards * (2 if self.guided else 1),
            "adapter_batch": self.adapter_batch,
            "encodings": self.encodings,
            "memory": self.memory,
            "folded_memory": self.folds.memory,
            "layers": {report.name: told(report.coverage) for report in self.reports},
            "regions": [asdict(region) for region in self.regions],
            "options": dict(self.options),
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        """A table: one line per run of equal steps."""
        halves = " x 2 (guidance)" if self.guided else ""
        lines = [
            f"{self.method} of {', '.join(self.adapters) or 'no adapter'}; text encoders {self.te_mode}",
            f"{len(self.steps)} steps, {self.forwards} predictions per picture{halves}, "
            f"{self.encodings} prompt encodings, {self.memory / 2**20:.1f} MiB of adapters{self._folded()}",
            *(f"  {report.name} changes {told(report.coverage)}" for report in self.reports),
            *(f"  {region}" for region in self.regions),
        ]
        if self.regions:
            parts = [name for name in ("self_mask", "reinit", "refine") if self.options.get(name)]
            lines.append(f"  scope {', '.join([self.options['scope'], *parts])}")
        for first, last, step in _runs(self.steps):
            used = ", ".join(f"{self.adapters[i]} {step.gates[i]:g}" for i in step.active) or "base model only"
            separate = " (one prediction per region, blended)" if step.rows else " (one prediction each, averaged)"
            how = separate if step.separate and step.forwards > 1 else ""
            lines.append(f"  step {first}{f'-{last}' if last > first else ''}: {used}{how}")
        return "\n".join([*lines, *(f"  note: {text}" for text in self.warnings)])

    def _folded(self) -> str:
        if self.folds.missing:
            return f" (not enough memory for {self.folds.missing / 2**20:.1f} MiB of folded weights: slower)"
        return f", {self.folds.memory / 2**20:.1f} MiB of folded weights" if self.folds.memory else ""


def _runs(steps: tuple[Step, ...]) -> list[tuple[int, int, Step]]:
    """Neighbouring equal steps as (first, last, step)."""
    runs: list[tuple[int, int, Step]] = []
    for k, step in enumerate(steps):
        if runs and runs[-1][2] == step:
            runs[-1] = (runs[-1][0], k, step)
        else:
            runs.append((k, k, step))
    return runs
