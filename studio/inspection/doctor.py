"""The doctor for adapters by name: loads them, finds their trigger words, plots the result."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from adapters.inspection.doctor import Diagnosis, Subject

CELL, MARGIN, HEAD, ROW = 74, 150, 80, 26
"""Sizes of the picture, in pixels."""


def diagnose(
    adapters: Sequence[str | Path], prompt: str = "", weights: Sequence[float] = (), base: str = ""
) -> Diagnosis:
    """The doctor's report on adapters to be used together.

    Args:
        adapters: names in the library, or paths.
        prompt: the prompt to check for trigger words; empty = none.
        weights: their strengths (default 1).
        base: model that resolves module names; needed only for files with the block names of SDXL's original code.

    Raises:
        adapters.errors.InputError: no adapter, or one that cannot be read.
        adapters.errors.FamilyError: adapters of different base models.
    """
    from adapters.inspection import doctor

    strengths = [*weights, *[1.0] * (len(adapters) - len(weights))]
    taken: set[str] = set()
    subjects = [_subject(name, weight, base, taken) for name, weight in zip(adapters, strengths, strict=True)]
    return doctor.diagnose(subjects, prompt)


def report(adapters: Sequence[str | Path], prompt: str = "", weights: Sequence[float] = ()) -> dict[str, Any]:
    """:func:`diagnose` as plain values, for pages."""
    return diagnose(adapters, prompt, weights).to_dict()


def report_apart(adapters: Sequence[str | Path], prompt: str = "", weights: Sequence[float] = ()) -> dict[str, Any]:
    """:func:`report` in a separate process, so that the web app never loads torch."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(report, adapters, prompt, weights).result()


def picture(diagnosis: Diagnosis) -> Image.Image:
    """Plot the interference of every pair as a coloured table, and of the worst pairs block by block."""
    from PIL import Image, ImageDraw, ImageFont

    names = list(diagnosis.strengths)
    if len(names) < 2:
        raise InputError("A picture needs at least two adapters.")
    found = diagnosis.predicted()
    worst = diagnosis.pairs[:6]
    rows = [(f"{pair.first} + {pair.second}", _blocks(pair.overlap.layers)) for pair in worst]
    blocks = sorted({block for _, row in rows for block in row}, key=_order)
    side = HEAD + CELL * len(names)
    width = max(MARGIN + CELL * len(names), 2 * MARGIN + 60 * len(blocks), 480) + 20
    image = Image.new("RGB", (width, side + 66 + ROW * len(rows)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    top = max([*found.values(), 1e-9])
    for i, a in enumerate(names):
        _text(draw, (MARGIN - 8, HEAD + CELL * i + CELL // 2), a, font, "rm")
        _text(draw, (MARGIN + CELL * i + CELL // 2, HEAD - 8 - 16 * (i % 2)), a, font, "ms")
        for j, b in enumerate(names):
            if i == j:
                continue
            value = found.get((a, b), found.get((b, a), 0.0))
            _cell(draw, (MARGIN + CELL * j, HEAD + CELL * i, CELL, CELL), value, top, font)
    y = side + 50
    highest = max((value for _, row in rows for value in row.values()), default=1.0) or 1.0
    for number, block in enumerate(blocks):
        _text(draw, (2 * MARGIN + 60 * number + 30, y - 6), block, font, "ms")
    for number, (label, row) in enumerate(rows):
        _text(draw, (2 * MARGIN - 8, y + ROW * number + ROW // 2), label, font, "rm")
        for column, block in enumerate(blocks):
            box = (2 * MARGIN + 60 * column, y + ROW * number, 60, ROW)
            if block in row:
                _cell(draw, box, row[block], highest, font)
    title = "Predicted interference: share of each change in the other's subspace"
    draw.text((10, 12), title, fill="black", font=font, anchor="lt")
    draw.text((10, side + 12), "Block by block", fill="black", font=font, anchor="lt")
    return image


def _subject(name: str | Path, weight: float, base: str, taken: set[str]) -> Subject:
    from adapters import formats
    from adapters.inspection.doctor import Subject
    from studio import library
    from studio.adapter_files.fit_to_base import fitted
    from studio.library import scan

    path = library.resolve_adapter(name)
    file = formats.read(path)
    if base:
        file = fitted([file], base)[0]
    record = scan.record(path, "adapter")
    label = free = Path(str(name)).stem or "adapter"
    number = 2
    while free in taken:
        free, number = f"{label}-{number}", number + 1
    taken.add(free)
    return Subject(free, file, record.triggers, weight, str(record.notes.get("mode", "")))


def _blocks(layers: Any) -> dict[str, float]:
    """Block -> mean shared part of its layers, weighted by energy."""
    sums: dict[str, tuple[float, float]] = {}
    for name, layer in layers.items():
        block, weight = _block(name), layer.first * layer.second
        total, norm = sums.get(block, (0.0, 0.0))
        sums[block] = total + weight * layer.shared, norm + weight
    return {block: total / norm for block, (total, norm) in sums.items() if norm > 0}


def _block(name: str) -> str:
    component, _, module = name.partition(".")
    if component.startswith("text_encoder"):
        return "text" + component.removeprefix("text_encoder").replace("_", " ")
    match = re.match(r"(down|up)_blocks_(\d+)|(mid)_block|(single_)?transformer_blocks_(\d+)", module)
    if match is None:
        return "others"
    if match[1]:
        return f"{match[1]} {match[2]}"
    if match[3]:
        return "mid"
    return f"{'single' if match[4] else 'joint'} {int(match[5]) // 4 * 4}+"


def _order(block: str) -> tuple[int, int]:
    kind, _, number = block.partition(" ")
    kinds = ["text", "down", "mid", "up", "joint", "single", "others"]
    return kinds.index(kind) if kind in kinds else 9, int(re.sub(r"\D", "", number) or 0)


def _cell(draw: Any, box: tuple[int, int, int, int], value: float, top: float, font: Any) -> None:
    """A coloured cell with its number, from white (none) to dark red (the most)."""
    left, upper, width, height = box
    part = value / top
    colour = tuple(round(255 + (end - 255) * part) for end in (178, 34, 34))
    draw.rectangle((left, upper, left + width - 2, upper + height - 2), fill=colour)
    shade = "white" if part > 0.6 else "black"
    draw.text((left + width / 2, upper + height / 2), f"{value:.1%}", fill=shade, font=font, anchor="mm")


def _text(draw: Any, place: tuple[float, float], text: str, font: Any, anchor: str) -> None:
    draw.text(place, text if len(text) < 30 else f"{text[:28]}…", fill="black", font=font, anchor=anchor)
