"""Parses ``--region PLACE=ADAPTERS[*scale][@start-end][: prompt]``, one region of a picture, and ``--lora ...#PLACE``,
an adapter with its own region."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from adapters.errors import InputError
from studio.composition import lora_option

FORM = "PLACE=ADAPTER[*scale][@start-end][: prompt]"

PLACES = {
    "all": (0.0, 0.0, 1.0, 1.0),
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "top": (0.0, 0.0, 1.0, 0.5),
    "bottom": (0.0, 0.5, 1.0, 1.0),
}
"""Named boxes."""

_COLUMN = re.compile(r"(\d{1,3})/([1-9]\d{0,2})")
_RANGE = re.compile(lora_option.TIMES)
_SCALE = re.compile(rf"(.*)\*({lora_option.NUMBER})")


def parse(text: str) -> dict[str, Any]:
    """The values of one :class:`~studio.composition.region_schema.Region`.

    PLACE is ``left``, ``right``, ``top``, ``bottom``, ``all``, a column such as ``2/3`` (from the left), four numbers
    ``x0,y0,x1,y1`` between 0 and 1, or a mask picture; several adapters are joined by ``+``.

    Raises:
        InputError: a part is missing or wrong.
    """
    place, equals, rest = text.partition("=")
    adapters, _, prompt = rest.partition(":")
    if not equals or not place.strip() or not adapters.strip():
        raise InputError(f"--region needs {FORM}, as in \"left=fox: a fox\", got '{text}'.")
    region: dict[str, Any] = _place(place.strip(), f"--region '{text}'")
    adapters = adapters.strip()
    if match := _RANGE.fullmatch(adapters):
        adapters = match.group(1)
        region |= lora_option.window("--region", text, *match.groups()[1:])
    if match := _SCALE.fullmatch(adapters):
        adapters = match.group(1)
        region["scale"] = float(match.group(2))
    region["adapters"] = [name.strip() for name in adapters.split("+") if name.strip()]
    if prompt.strip():
        region["prompt"] = prompt.strip()
    return region


def of_adapter(text: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The adapter that ``--lora`` names, and its region if it ends in ``#PLACE``.

    Raises:
        InputError: a part is missing or wrong.
    """
    adapter, mark, place = text.rpartition("#")
    if not mark:
        return lora_option.parse(text), None
    use = lora_option.parse(adapter)
    use.setdefault("name", Path(use["path"]).stem)
    return use, {**_place(place.strip(), f"--lora '{text}'"), "adapters": [use["name"]]}


def of_adapters(texts: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The adapters that several ``--lora`` name, and their regions.

    An adapter given several times with places is one adapter in several regions, with its strength in each.

    Raises:
        InputError: as :func:`of_adapter`; the first of several strengths is 0.
    """
    uses: list[dict[str, Any]] = []
    regions: list[dict[str, Any]] = []
    placed: dict[str, dict[str, Any]] = {}
    for text in texts:
        use, region = of_adapter(text)
        if region is not None:
            regions.append(region)
            first = placed.setdefault(json.dumps({**use, "weight": None}, sort_keys=True), use)
            if first is not use:
                region["scale"] = _ratio(use.get("weight", 1.0), first.get("weight", 1.0), text)
                continue
        uses.append(use)
    return uses, regions


def _ratio(weight: float, first: float, text: str) -> float:
    if first == 0:
        raise InputError(f"--lora '{text}': give this adapter a strength other than 0 in its first region.")
    return weight / first


def read(text: str) -> dict[str, Any]:
    """The values of ``--regions``: "auto", "none", or a YAML file with a list of regions (or with ``regions:`` and
    other settings). Mask paths in a file are relative to it.

    Raises:
        InputError: there is no such file, or no regions in it.
    """
    if text in ("auto", "none"):
        return {"regions": "auto" if text == "auto" else []}
    file = Path(text).expanduser()
    if not file.is_file():
        raise InputError(f"--regions needs 'auto', 'none' or a YAML file; '{text}' does not exist.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"'{file}' is not valid YAML: {error}") from None
    if isinstance(values, list):
        values = {"regions": values}
    if not isinstance(values, dict) or "regions" not in values:
        raise InputError(f"'{file}' holds no regions: it must be a list of them, or have the key 'regions'.")
    for region in values["regions"] if isinstance(values["regions"], list) else []:
        mask = region.get("mask") if isinstance(region, dict) else None
        if isinstance(mask, str) and not mask.startswith("data:") and (file.parent / mask).is_file():
            region["mask"] = str(file.parent / mask)
    return values


def _place(place: str, said: str) -> dict[str, Any]:
    if place in PLACES:
        return {"box": list(PLACES[place])}
    if match := _COLUMN.fullmatch(place):
        column, count = int(match[1]), int(match[2])
        if not 1 <= column <= count:
            raise InputError(f"{said}: columns are counted from 1 to {count}, as in 1/{count}; got {place}.")
        return {"box": [(column - 1) / count, 0.0, column / count, 1.0]}
    parts = place.split(",")
    if re.fullmatch(lora_option.NUMBER, parts[0].strip()):
        try:
            box = [float(part) for part in parts]
        except ValueError:
            box = []
        if len(box) != 4:
            raise InputError(f"{said}: a box is four numbers x0,y0,x1,y1 between 0 and 1.")
        return {"box": box}
    if not Path(place).expanduser().is_file():
        raise InputError(
            f"{said}: '{place}' is not a mask picture, a box x0,y0,x1,y1, a column such as 2/3 or one of "
            f"{', '.join(PLACES)}."
        )
    return {"mask": place}
