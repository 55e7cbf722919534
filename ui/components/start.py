"""The picture that a composition starts from, with the part to redraw painted on it.

The component's value is None, or a dict of the picture: "id" (its path below the uploads folder), "name", "url" (of a
copy that every browser shows), "size" in words, "pixels" [width, height], "mask" (a ``data:`` URI, empty = all of it).
A component of our own because ``gr.ImageEditor`` keeps the paint on the server only until the next run, so that it
would not survive a reload.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from adapters.errors import InputError
from studio.composition.picture_schema import PictureFields
from ui import pictures
from ui.components import canvas, schema_form
from ui.errors import errors_shown, say
from ui.events import PRIVATE
from ui.theme import script

Started = dict[str, Any]

KNOWN = schema_form.fields(PictureFields)
USUAL = 0.6
"""The form's initial strength; diffusers' defaults lie between 0.3 and 1."""



@dataclass
class Start:
    """The part of the form."""

    more: gr.Accordion
    drop: gr.File
    picture: gr.HTML
    strength: gr.Slider

    @property
    def inputs(self) -> list[Any]:
        """What :func:`read` takes."""
        return [self.picture, self.strength]

    @property
    def outputs(self) -> list[Any]:
        """What :func:`shown` gives."""
        return [self.more, self.picture, self.strength]


def draw() -> Start:
    """Draw it inside the current group."""
    with gr.Accordion("Start from a picture", open=False, elem_classes="as-more", elem_id="start") as more:
        drop = gr.File(label="Drop a picture here", show_label=False, height=120, elem_id="start-drop",
                       file_types=["image", *sorted(pictures.SUFFIXES)])  # fmt: skip
        picture = gr.HTML(None, html_template='<div class="as-canvas as-start"></div>', js_on_load=script("start"),
                          apply_default_css=False, elem_id="start-picture")  # fmt: skip
        strength = gr.Slider(0.05, 1, value=USUAL, step=0.05, label="Strength", elem_id="strength",
                             info="How much of the picture is redrawn: small stays close to it, 1 keeps nothing. "
                             "Only this share of the steps runs.")  # fmt: skip
    return Start(more, drop, picture, strength)


def wire(start: Start) -> None:
    """A dropped picture becomes the start."""

    @errors_shown
    def dropped(file: str | None) -> Any:
        if not file:
            return gr.skip()
        item, remarks = pictures.started(Path(file))
        for remark in remarks:
            say(f"{item['name']}: {remark}.", title="Picture read")
        return None, {**item, "mask": ""}

    start.drop.upload(dropped, start.drop, [start.drop, start.picture], **PRIVATE)


def read(item: Mapping[str, Any] | None, strength: float) -> dict[str, Any]:
    """The fields of a composition.

    Raises:
        InputError: the picture is not one that was uploaded, or its mask was not painted here.
    """
    if not item:
        return {}
    mask = item.get("mask") or ""
    if mask and not canvas.is_mask(mask):
        raise InputError("The mask was not painted here: paint it again.")
    return {"image": str(pictures.uploaded(str(item.get("id", "")))), "mask": mask, "strength": strength}


def size(item: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """Width and height of the picture; None without one."""
    pixels = item.get("pixels") if item else None
    return (int(pixels[0]), int(pixels[1])) if isinstance(pixels, list | tuple) and len(pixels) == 2 else None


def shown(item: Started | None, strength: float | None = None) -> list[Any]:
    """Updates of :attr:`Start.outputs`."""
    return [gr.update(open=True) if item else gr.skip(), item, USUAL if strength is None else strength]


def kept(item: Any) -> Started | None:
    """The picture the browser kept, if its file still exists."""
    return next(iter(pictures.still_here([item])), None) if isinstance(item, dict) else None


def of_recipe(config: Mapping[str, Any]) -> Started | None:
    """The start picture in a recipe."""
    if not config.get("image"):
        return None
    item, _ = pictures.started(pictures.taken("start.png", config["image"]))
    mask = config.get("mask") or ""
    return {**item, "name": "start picture", "mask": mask if canvas.is_mask(mask) else ""}


def of_picture(path: Path) -> Started:
    """A picture that the studio made, as a start."""
    item, _ = pictures.started(pictures.taken(path.name, path))
    return {**item, "mask": ""}
