"""The plan of a call: the chosen composition applied to its adapters, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from adapters.errors import InputError
from pipelines.diffusion import methods
from pipelines.diffusion.families import Family
from pipelines.diffusion.methods.context import MethodContext
from pipelines.diffusion.methods.properties import Properties
from pipelines.diffusion.methods.step import TextAdapters
from pipelines.diffusion.rack import Loaded, joined_layers
from pipelines.diffusion.regions.region import Region, RegionOptions, check_regions
from pipelines.diffusion.regions.scope import check_scope
from pipelines.diffusion.report import Plan, report_region
from pipelines.diffusion.schedule import Positions
from pipelines.diffusion.text import resolve_mode, text_adapters

Places = tuple[Region, ...] | Literal["auto", "own"]


@dataclass(frozen=True)
class Composition:
    """The choice made by :meth:`~pipelines.diffusion.pipeline.MultiLoRAPipeline.compose`.

    Its arguments, resolved; ``adapters`` None = all loaded ones, ``regions`` "own" = those they were loaded with.
    """

    method: str = methods.usual(regional=False)
    adapters: tuple[str, ...] | None = None
    tau: int = 1
    te_mode: str = "auto"
    adapter_batch: int | None = None
    regions: Places = ()
    options: RegionOptions = field(default_factory=RegionOptions)
    fold: bool = True

    @property
    def properties(self) -> Properties:
        """The method's properties."""
        return methods.properties(self.method)

    def cross_only(self, loaded: Sequence[Loaded]) -> tuple[str, ...]:
        """Names of the adapters that only act in cross-attention, sorted."""
        if not self.properties.regional or self.options.scope != "cross":
            return ()
        return tuple(sorted({name for region in placed_regions(self, loaded) for name in region.adapters}))


Texts = list[list[TextAdapters]]
"""For each step, the name of the encoding of each of its predictions."""


def make_plan(
    composition: Composition,
    loaded: Sequence[Loaded],
    family: Family,
    positions: Positions,
    guided: bool,
    memory: int,
    prompt: str | None,
    embed: Callable[[str], Tensor],
    denoisers: Sequence[str],
) -> tuple[Plan, Texts]:
    """The plan of a call, and the encoding of each prediction.

    Args:
        composition: the chosen composition.
        loaded: its adapters, in order.
        family: of the base model.
        positions: of the denoiser calls.
        guided: every prediction has two halves.
        memory: bytes of the adapters' joined matrices.
        prompt: None while only planning.
        embed: text -> its mean-pooled embedding, for methods that weight adapters by the prompt.
        denoisers: attributes of the base's denoising networks.

    Raises:
        InputError: the composition is not possible.
    """
    method, known = composition.method, composition.properties
    mode = resolve_mode(composition.te_mode, method)
    with_words = [item.report.name for item in loaded if item.file.embeddings]
    if with_words and not known.layer_text:
        raise InputError(
            f"'{with_words[0]}' has a word with an embedding per layer, which only regions inside the network support: "
            f"choose {', '.join(methods.names(lambda other: other.layer_text))}."
        )
    rows = strengths(loaded, positions)
    regions = placed_regions(composition, loaded)
    numbers = {item.report.name: i for i, item in enumerate(loaded)}
    steps = methods.plan_steps(
        method,
        rows,
        tau=composition.tau,
        members=[tuple(numbers[name] for name in region.adapters) for region in regions],
        factors=region_factors(loaded, regions, positions),
        context=MethodContext(
            names=tuple(numbers),
            layers=tuple(joined_layers(item.file, denoisers) for item in loaded),
            triggers=tuple(item.report.triggers for item in loaded),
            prompt=prompt,
            embed=embed,
        ),
    )
    in_text = {
        i: item.report.te_weight
        for i, item in enumerate(loaded)
        if item.report.te_weight != 0 and any(part not in denoisers for part in item.file.parts)
    }
    texts = [text_adapters(step, mode, method, in_text) for step in steps]
    plan = Plan(
        method=method,
        adapters=tuple(numbers),
        te_mode=mode,
        steps=tuple(steps),
        guided=guided,
        adapter_batch=composition.adapter_batch,
        encodings=len(regions) + 1 if regions else len({active for row in texts for active in row}),
        memory=memory,
        regions=tuple(report_region(region) for region in regions),
        options=composition.options.to_dict() if known.regional else {},
        warnings=tuple(_scope_warnings(composition, loaded, regions, family.denoiser)),
    )
    return plan, texts


def placed_regions(composition: Composition, loaded: Sequence[Loaded]) -> tuple[Region, ...]:
    """The regions of a composition; automatic ones are one per adapter, without a place yet.

    Raises:
        InputError: an adapter was loaded with a region but the method has none, or a method needs regions and no
            adapter with one is left.
    """
    own = tuple(item.report.region for item in loaded if item.report.region)
    if own and not composition.properties.regional:
        regional = methods.names(lambda known: known.regional)
        raise InputError(
            f"'{own[0].title}' was loaded with a region, which '{composition.method}' does not support: "
            f"compose with {', '.join(regional)}."
        )
    if composition.regions == "auto":
        return tuple(Region((item.report.name,)) for item in loaded)
    if composition.regions == "own":
        check_regions(composition.method, own, [item.report.name for item in loaded])
        return own
    return composition.regions


def strengths(loaded: Sequence[Loaded], positions: Positions) -> methods.Strengths:
    """Weight times schedule of every adapter at every step (for a DoRA adapter only the schedule, 0 or 1).

    Raises:
        InputError: the schedule of a DoRA adapter has a factor other than 0 and 1.
    """
    factors = [positions.factors(item.report.schedule, item.report.schedule_by) for item in loaded]
    rows = []
    for k in range(len(positions.step)):
        row = []
        for i, item in enumerate(loaded):
            factor = factors[i][k]
            if item.report.dora and factor not in (0, 1):
                raise InputError(
                    f"'{item.report.name}' is a DoRA adapter: its schedule can switch it on and off (1 and 0) but not "
                    f"fade it (got {factor:g}); use weight to set its strength."
                )
            if item.report.dora:
                factor = factor if item.report.weight != 0 else 0.0
            else:
                factor *= item.report.weight
            row.append(factor)
        rows.append(tuple(row))
    return tuple(rows)


def region_factors(loaded: Sequence[Loaded], regions: Sequence[Region], positions: Positions) -> list[list[float]]:
    """Scale times schedule of every region at every step.

    Raises:
        InputError: a region of a DoRA adapter has a factor other than 0 and 1.
    """
    factors = [positions.factors(region.schedule, region.schedule_by) for region in regions]
    rows = [[region.scale * own[k] for region, own in zip(regions, factors, strict=True)]
            for k in range(len(positions.step))]  # fmt: skip
    dora = {item.report.name for item in loaded if item.report.dora}
    for i, region in enumerate(regions):
        faded = next((row[i] for row in rows if row[i] not in (0, 1)), None)
        if faded is not None and dora.intersection(region.adapters):
            raise InputError(
                f"'{', '.join(dora.intersection(region.adapters))}' is a DoRA adapter: a region can switch it on and "
                f"off (1 and 0) but not fade it (got {faded:g}); use weight to set its strength."
            )
    return rows


def _scope_warnings(
    composition: Composition, loaded: Sequence[Loaded], regions: Sequence[Region], denoiser: str
) -> list[str]:
    if not regions or composition.options.scope != "cross":
        return []
    placed = {name for region in regions for name in region.adapters}
    return check_scope({item.report.name: item.file for item in loaded if item.report.name in placed}, denoiser)
