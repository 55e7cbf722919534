"""The demonstration: the shipped adapters on the shipped base model, every method side by side."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import files
from adapters.errors import InputError
from adapters.progress import Monitor, Progress, check
from studio import catalogue, library
from studio.composition import job as compose
from studio.composition import methods
from studio.composition.schema import ComposeConfig
from studio.library import Record

if TYPE_CHECKING:
    from PIL import Image

BASE = "tinymoji"
SAMPLER, STEPS = "dpm++", 10
"""As many subjects are recognised as with the base's own sampler in twice the steps."""
PAIR_PROMPT = "a flat icon of {} left of {}"
LEFT_AND_RIGHT = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
"""The regions of two subjects."""
PAIR_CANVAS = (128, 64)
"""Width and height of a picture of two subjects: each has the room of a picture of one."""

_CELL, _LABEL, _TITLE, _GAP = 128, 22, 34, 6
_WIDTH = _GAP + 5 * (2 * _CELL + _GAP)


@dataclass(frozen=True)
class Scene:
    """One row of the demonstration: a prompt that needs two adapters."""

    prompt: str
    pair: tuple[Record, Record]


@dataclass(frozen=True)
class Cell:
    """One picture: its column's name, its adapters and its method."""

    label: str
    adapters: tuple[Record, ...]
    method: str


def run(out: Path, monitor: Monitor, base: str = BASE, steps: int = STEPS, seed: int = 0) -> dict[str, Any]:
    """Draw every scene with the base alone, each adapter alone and every method; returns the paths.

    Writes ``<scene>-<column>.png`` (each with its recipe) and ``grid.png`` into ``out``.

    Raises:
        adapters.errors.InputError: there are no shipped adapters.
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    begun = time.monotonic()
    family = next((record.family for record in library.bases() if record.name == base), None)
    shipped = [record for record in library.adapters() if record.read_only and not record.problem]
    rows = scenes([record for record in shipped if family in (None, record.family)])
    out.mkdir(parents=True, exist_ok=True)
    total = sum(len(columns(scene)) for scene in rows)
    pictures: list[list[tuple[str, Path]]] = []
    done = 0
    for number, scene in enumerate(rows, start=1):
        line = []
        for cell in columns(scene):
            check(monitor)
            monitor.report(Progress("composing", done, total, message=f"{scene.prompt}: {cell.label}"))
            target = out / f"{number}-{_slug(cell.label)}.png"
            line.append((cell.label, _draw(_config(scene, cell, base, steps, seed), target)))
            done += 1
        pictures.append(line)
    monitor.report(Progress("composing", done, total))
    grid = out / "grid.png"
    files.write(grid, lambda part: _grid(rows, pictures).save(part), sync=False)
    return {
        "grid": str(grid),
        "pictures": [str(path) for line in pictures for _, path in line],
        "prompts": [scene.prompt for scene in rows],
        "seconds": round(time.monotonic() - begun, 1),
    }


def scenes(records: Sequence[Record]) -> list[Scene]:
    """Rows for these adapters: a pair of subjects, and a subject in a style.

    Raises:
        InputError: there are fewer than two adapters.
    """
    styles = [record for record in records if _is_style(record)]
    subjects = [record for record in records if record not in styles]
    found = [_two_subjects(*subjects[:2])] if len(subjects) > 1 else []
    if styles and subjects:
        found.append(_in_style(subjects[-1], styles[0]))
    if not found:
        raise InputError("The demonstration needs the shipped adapters, which this installation does not have.")
    return found


def columns(scene: Scene) -> list[Cell]:
    """The pictures of one row."""
    usual = methods.usual(regional=False)
    alone = [Cell("base", (), usual), *(Cell(record.name, (record,), usual) for record in scene.pair)]
    return [*alone, *(Cell(method.name, scene.pair, method.name) for method in catalogue.stage("compose")
                      if _suits(method.name, scene))]  # fmt: skip


def _suits(method: str, scene: Scene) -> bool:
    """Whether a method suits a scene: regions need two subjects; some methods need a subject and a style."""
    styled = _is_style(scene.pair[1])
    known = methods.known(method)
    return not styled if known.regional else styled or not known.pair


def _two_subjects(left: Record, right: Record) -> Scene:
    return Scene(PAIR_PROMPT.format(_thing(left), _thing(right)), (left, right))


def _in_style(subject: Record, style: Record) -> Scene:
    return Scene(f"a {_word(style)} icon of {_thing(subject)}", (subject, style))


def _is_style(record: Record) -> bool:
    mode = ((record.recipe or {}).get("config") or {}).get("mode")
    return mode == "style" or (mode is None and record.name.startswith("style"))


def _word(record: Record) -> str:
    return record.triggers[0] if record.triggers else record.name


def _thing(record: Record) -> str:
    word = _word(record)
    return f"{'an' if word[:1].lower() in 'aeio' else 'a'} {word}"


def _config(scene: Scene, cell: Cell, base: str, steps: int, seed: int) -> ComposeConfig:
    uses = [{"name": record.name, "path": record.name, "triggers": list(record.triggers)} for record in cell.adapters]
    values: dict[str, Any] = {"prompt": scene.prompt, "adapters": uses, "method": cell.method}
    if not _is_style(scene.pair[1]):
        values["width"], values["height"] = PAIR_CANVAS
    if methods.known(cell.method).regional:
        halves = zip(cell.adapters, LEFT_AND_RIGHT, strict=True)
        values["regions"] = [{"adapters": [record.name], "box": box} for record, box in halves]
    if methods.known(cell.method).any_scope:
        values["scope"] = "spatial"  # the shipped adapters act in every attention layer, not in cross-attention alone
    values |= {"base": base, "scheduler": SAMPLER, "steps": steps, "seed": seed}
    return ComposeConfig.parse(values, source="the demonstration")


def _draw(config: ComposeConfig, target: Path) -> Path:
    from adapters.progress import Silent

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".drawing-") as folder:
        result = compose.run(config, Path(folder), Silent())
        return Path(result["images"][0]).replace(target)


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text)


def _grid(rows: Sequence[Scene], pictures: Sequence[Sequence[tuple[str, Path]]]) -> Image.Image:
    """All pictures in one, each under its label, below their prompt."""
    from PIL import Image, ImageDraw, ImageFont

    small, large = ImageFont.load_default(13), ImageFont.load_default(16)
    shown = [list(_wrapped([(label, _scaled(path)) for label, path in line])) for line in pictures]
    height = sum(_TITLE + len(lines) * (_CELL + _LABEL + _GAP) for lines in shown)
    made = Image.new("RGB", (_WIDTH, height), "white")
    pen, top = ImageDraw.Draw(made), 0
    for scene, lines in zip(rows, shown, strict=True):
        pen.text((_GAP, top + _GAP), scene.prompt, fill="black", font=large)
        top += _TITLE
        for line in lines:
            left = _GAP
            for label, picture in line:
                pen.text((left, top + 3), label, fill=(90, 90, 90), font=small)
                made.paste(picture, (left, top + _LABEL))
                left += picture.width + _GAP
            top += _CELL + _LABEL + _GAP
    return made


def _wrapped(cells: Sequence[tuple[str, Image.Image]]) -> Iterator[list[tuple[str, Image.Image]]]:
    """The cells in rows that fit the grid."""
    line: list[tuple[str, Image.Image]] = []
    for cell in cells:
        if line and _GAP + sum(picture.width + _GAP for _, picture in [*line, cell]) > _WIDTH:
            yield line
            line = []
        line.append(cell)
    yield line


def _scaled(path: Path) -> Image.Image:
    """A picture as high as the grid's cells."""
    from PIL import Image

    with Image.open(path) as picture:
        return picture.resize((round(_CELL * picture.width / picture.height), _CELL))
