"""The picture's frame with regions drawn on it.

A region is a plain dict with the keys of :class:`studio.composition.region_schema.Region`; a painted one keeps its
mask as a ``data:`` URI. A component of our own because no maintained one does this: ``gr.ImageEditor`` has no movable
boxes, ``gradio_image_annotation`` has neither paint nor a frame without a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gradio as gr

from adapters.errors import InputError
from studio.composition.region_schema import Region
from ui.theme import script

Drawn = dict[str, Any]

MASK = "data:image/png;base64,"
"""Beginning of every mask that a page may send: never a path on this computer."""

LARGEST = 4_000_000
"""Maximum characters of a mask; one painted here has some ten thousand."""


def canvas(**options: Any) -> gr.HTML:
    """The component.

    Its event ``edit_found`` means that automatic places became ordinary regions, ``side_by_side`` that a column was
    drawn for each adapter (``count`` of them).
    """
    return gr.HTML(
        [], html_template='<div class="as-canvas"></div>', js_on_load=script("regions"), apply_default_css=False,
        elem_id="regions", mode="drawn", frame=[1, 1], picture="", found=[], **options,
    )  # fmt: skip


def read(drawn: Sequence[Mapping[str, Any]] | None) -> list[Drawn]:
    """The regions of a page as values for :class:`~studio.composition.region_schema.Region`.

    Raises:
        InputError: there are none, or one is not a region, lacks an adapter or a place, or has a foreign mask.
    """
    if not drawn:
        raise InputError("Draw a region first: drag a box on the frame, or let the adapters act everywhere.")
    return [_region(region, number) for number, region in enumerate(drawn, 1)]


def show(regions: Iterable[Mapping[str, Any]], names: Mapping[str, str]) -> list[Drawn]:
    """Regions of a recipe in the page's form; ``names`` maps its adapters' names to those of the library."""
    return [
        {
            **region, "adapters": [names[name] for name in region.get("adapters", ()) if name in names],
            "mask": region["mask"] if is_mask(region.get("mask")) else "",
        }
        for region in regions
    ]  # fmt: skip


def columns(adapters: Sequence[str]) -> list[Drawn]:
    """A region for each adapter, side by side."""
    edges = [round(number / len(adapters), 3) for number in range(len(adapters) + 1)]
    return [
        Region.parse({"adapters": [name], "box": (edges[number], 0, edges[number + 1], 1)}).model_dump(mode="json")
        for number, name in enumerate(adapters)
    ]


def _region(given: Mapping[str, Any], number: int) -> Drawn:
    region = {name: given[name] for name in Region.model_fields if name in given}
    if not region.get("adapters"):
        raise InputError(f"Region {number} has no adapter: attach one to it, or remove the region.")
    mask = region.get("mask") or ""
    if mask and not is_mask(mask):
        raise InputError(f"The mask of region {number} was not painted here: paint it again.")
    if not mask and not region.get("box"):
        raise InputError(f"Region {number} is empty: paint it, or draw a box instead.")
    return region


def is_mask(mask: object) -> bool:
    """Whether it is a mask as the page paints them."""
    return isinstance(mask, str) and mask.startswith(MASK) and len(mask) <= LARGEST
