"""Regions and their options as given by the user, and the checks that need no model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from adapters.errors import InputError, nearest
from pipelines.diffusion import methods
from pipelines.diffusion.checks import check_weight
from pipelines.diffusion.schedule import By, Keyframes, check_keyframes

Box = tuple[float, float, float, float]
Scope = Literal["cross", "spatial"]

CROSS_LAYERS = ("attn2.to_k", "attn2.to_v", "attn2.to_out.0")
"""Layers of an adapter that the scope "cross" uses."""

PARTS = ("self_mask", "reinit", "refine")
"""LoRA-Composer's parts, which can be switched on and off."""


@dataclass(frozen=True)
class Region:
    """A part of the picture with its own adapters.

    Attributes:
        adapters: names of loaded adapters that act only here and in other regions that name them.
        box: x0, y0, x1, y1 as fractions of width and height; the end is exclusive.
        mask: instead of a box: file, ``data:`` URI, PIL image or tensor (height, width) in [0, 1], 1 inside.
        prompt, negative: prompts of this region ("" and None = those of the call).
        scale: factor on the weights of its adapters.
        schedule, schedule_by: keyframes (position, factor), by "step" or "sigma".
        words: words of the prompt that name the subject (default: its adapters' trigger words).
        name: its name (default: its adapters' names).
    """

    adapters: tuple[str, ...]
    box: Box | None = None
    mask: Any = None
    prompt: str = ""
    negative: str | None = None
    scale: float = 1.0
    schedule: Keyframes = ()
    schedule_by: By = "step"
    words: tuple[str, ...] = ()
    name: str = ""

    @property
    def title(self) -> str:
        return self.name or "+".join(self.adapters)


@dataclass(frozen=True)
class RegionOptions:
    """How regions are used; None = the method's default.

    Attributes:
        scope: "cross" (cross-attention layers of an adapter) or "spatial" (all its layers, masked).
        self_mask: regions do not attend to each other.
        reinit: start from rearranged noise.
        refine: correct the latents by attention losses.
        gaussian, fill_loss, region_loss: terms of the refinement.
        refine_rate: its step size (20 in the paper's code).
        trust_region: largest correction per step, as a share of the latents' norm; None = no limit.
        capture: factor by which the grid of the attention maps is smaller than the latents; None = 4, or less for small
            pictures.
        auto_steps: share of the steps used to find automatic regions.
    """

    scope: Scope | None = None
    self_mask: bool | None = None
    reinit: bool | None = None
    refine: bool | None = None
    gaussian: bool = True
    fill_loss: bool = True
    region_loss: bool = True
    refine_rate: float = 20.0
    trust_region: float | None = 0.05
    capture: int | None = None
    auto_steps: float = 0.3

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class PlacedRegion:
    """The place of a region in a picture: ``mask`` is a PIL image ("L") of the picture's size, white inside."""

    name: str
    box: Box | None
    mask: Any
    adapters: tuple[str, ...] = field(default=())


def check_regions(
    method: str, regions: str | Sequence[Region | Mapping[str, Any]] | None, adapters: Iterable[str]
) -> tuple[Region, ...] | Literal["auto"]:
    """The regions as :class:`Region` objects, with every value checked.

    Raises:
        InputError: regions for a method without them or none for one that needs them, a region without adapters or
            with unknown ones, without a place or with an invalid one, or a value that is not finite.
    """
    if not methods.properties(method).regional:
        if regions:
            regional = ", ".join(methods.names(lambda known: known.regional))
            raise InputError(f"'{method}' has no regions: choose {regional}, or leave the regions out.")
        return ()
    if not regions:
        raise InputError(f"'{method}' needs regions: give some, or 'auto'.")
    known = tuple(adapters)
    if isinstance(regions, str):
        if regions != "auto":
            raise InputError(f"regions is a list of regions or 'auto', got '{regions}'.")
        if not known:
            raise InputError("Automatic regions need at least one adapter.")
        return "auto"
    return tuple(_checked(region, number, known) for number, region in enumerate(regions, 1))


def check_own_region(given: Region | Mapping[str, Any], name: str) -> Region:
    """The region that an adapter is loaded with, checked.

    Raises:
        InputError: it names other adapters, or as :func:`check_regions`.
    """
    values = dict(given if isinstance(given, Mapping) else vars(given))
    if values.get("adapters") not in (None, (), [], name, (name,), [name]):
        raise InputError(f"The region of '{name}' is for this adapter only: give shared ones to compose(regions=...).")
    return _checked({**values, "adapters": (name,)}, 1, (name,))


def check_options(method: str, flow: bool, options: Mapping[str, Any]) -> RegionOptions:
    """The options with scope and parts resolved, except ``refine``, which may depend on the model.

    Raises:
        InputError: an unknown option, one that the method or family does not support, or a value out of range.
    """
    known = [item.name for item in fields(RegionOptions)]
    for name in options:
        if name not in known:
            raise InputError(f"compose has no option '{name}'{nearest(name, known)}.")
    made = RegionOptions(**options)
    kind = methods.properties(method)
    if not kind.regional:
        if made != RegionOptions():
            changed = [item.name for item in fields(made) if getattr(made, item.name) != item.default]
            raise InputError(f"'{method}' has no regions, so {', '.join(changed)} would have no effect: leave it out.")
        return made
    if made.scope not in (None, "cross", "spatial"):
        raise InputError(f"Unknown scope '{made.scope}': use cross or spatial.")
    own: Scope = kind.scope
    if not kind.any_scope and made.scope not in (None, own):
        others = methods.names(lambda known: known.layer_text and (known.any_scope or known.scope == made.scope))
        raise InputError(f"'{method}' always has the scope '{own}': choose {_listed(others)}.")
    chosen = [name for name in PARTS if getattr(made, name)]
    if kind.regions == "predictions" and chosen:
        others = methods.names(lambda known: known.parts)
        raise InputError(
            f"'{method}' makes separate predictions and has no {', '.join(chosen)}: use {_listed(others)}."
        )
    if flow and (not kind.transformers or made.reinit or made.refine):
        able = methods.names(lambda known: known.regional and known.transformers)
        unable = methods.names(lambda known: known.regional and not known.transformers)
        raise InputError(
            f"This family has no separate cross-attention, which {_listed(unable, 'and')}, and reinit and refine, "
            f"need: use {_listed(able)}."
        )
    for name in ("refine_rate", "trust_region", "auto_steps"):
        value = getattr(made, name)
        if value is not None and check_weight(value, name) <= 0:
            raise InputError(f"{name} must be above 0, got {value}.")
    if made.auto_steps > 1:
        raise InputError(f"auto_steps is a share of the steps, at most 1, got {made.auto_steps}.")
    if made.capture is not None and made.capture < 1:
        raise InputError(f"capture must be at least 1, got {made.capture}.")
    whole = kind.parts
    return replace(
        made,
        scope=made.scope or own,
        self_mask=whole if made.self_mask is None else made.self_mask,
        reinit=whole if made.reinit is None else made.reinit,
        refine=False if made.refine is None and not whole else made.refine,
    )


def _listed(names: Sequence[str], last: str = "or") -> str:
    """'a', 'b' or 'c'."""
    quoted = [f"'{name}'" for name in names]
    return f" {last} ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def _checked(given: Region | Mapping[str, Any], number: int, known: Sequence[str]) -> Region:
    if isinstance(given, Mapping):
        names = [item.name for item in fields(Region)]
        for key in given:
            if key not in names:
                raise InputError(f"Region {number} has no value '{key}'{nearest(str(key), names)}.")
        if "adapters" not in given:
            raise InputError(f"Region {number} has no adapters.")
        given = Region(**given)
    adapters = (given.adapters,) if isinstance(given.adapters, str) else tuple(given.adapters)
    if not adapters:
        raise InputError(f"Region {number} has no adapter.")
    for name in adapters:
        if name not in known:
            raise InputError(
                f"Region {number} names the adapter '{name}'{nearest(name, known)}, which is not part of the "
                f"composition (which has {', '.join(known) or 'none'})."
            )
    if len(set(adapters)) != len(adapters):
        raise InputError(f"Region {number} names an adapter twice.")
    title = given.name or "+".join(adapters)
    mask = given.mask if not isinstance(given.mask, str | Path) or str(given.mask) else None
    if (given.box is None) == (mask is None):
        raise InputError(f"Region {number} ('{title}') needs a box or a mask, but not both.")
    box = None if given.box is None else check_box(given.box, f"Region {number} ('{title}')")
    words = (given.words,) if isinstance(given.words, str) else tuple(given.words)
    return replace(
        given,
        adapters=adapters,
        box=box,
        mask=mask,
        scale=check_weight(given.scale, f"The scale of region {number}"),
        schedule=check_keyframes(given.schedule or (), f"region {number}", given.schedule_by),
        words=words,
    )


def check_box(box: Sequence[float], what: str) -> Box:
    """The box as four floats.

    Raises:
        InputError: not four numbers in [0, 1], or an empty box.
    """
    numbers = tuple(float(edge) for edge in box)
    if len(numbers) != 4 or not all(math.isfinite(edge) and 0 <= edge <= 1 for edge in numbers):
        raise InputError(f"{what}: a box is x0, y0, x1, y1 between 0 and 1, got {list(box)}.")
    x0, y0, x1, y1 = numbers
    if x1 <= x0 or y1 <= y0:
        raise InputError(f"{what}: a box needs x0 < x1 and y0 < y1, got {list(box)}.")
    return x0, y0, x1, y1
