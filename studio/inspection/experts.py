"""Which expert of a mixture takes which tokens, for adapters, bases and data by name; as a table and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from adapters.errors import InputError, nearest
from adapters.progress import Monitor, Progress, Silent, check

if TYPE_CHECKING:
    from PIL import Image

    from adapters.layers.experts.usage import Batch
    from studio.datasets.texts import TextReport

ROWS, LENGTH, BATCH = 64, 512, 4
"""Rows of each file that are looked at by default, tokens of a row at most, and rows of one pass."""

PICTURES = "pictures"
"""Group of the tokens of pictures."""


@dataclass(frozen=True)
class Report:
    """What every router of a mixture did.

    Attributes:
        adapter, base: as they were named.
        experts: names of X-LoRA's experts; "1", "2" ... for others, as many as the largest layer has.
        groups: group -> its number of tokens.
        routers: plain values of :class:`adapters.layers.experts.usage.Usage`, with ``words`` (the tokens as text),
            ``busiest``, ``unused`` and ``apart``.
    """

    adapter: str
    base: str
    experts: list[str]
    groups: dict[str, int]
    routers: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def experts(
    adapter: str,
    data: Sequence[str] = (),
    base: str = "",
    by: str = "",
    rows: int = ROWS,
    monitor: Monitor | None = None,
) -> Report:
    """Run a mixture on rows of data and report its routers, group by group.

    Args:
        data: files of rows as for a training; none = those that the adapter was trained on, if they are still there.
        base: the model it belongs to; empty = the one that the adapter names.
        by: column whose values are the groups; empty = one group per file, called after it.
        rows: of each file at most.

    Raises:
        InputError: no mixture of experts, no data or a file twice, no such column, or a base that cannot be used.
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    from adapters.layers.experts.usage import usage
    from studio import library

    monitor = monitor or Silent()
    path = library.resolve_adapter(adapter)
    files = list(data) or trained_on(path)
    base = base or base_of(path)
    place = library.resolve_base(base)
    monitor.report(Progress("loading"))
    opened = _open_pictured(place) if _looks_at_pictures(place) else _open_language(place)
    adapted = opened.adapted(base)
    adapted.add("mixture", path)
    found = _Rows.of(files, by, rows, opened.understand)
    batches, groups, counts = opened.batches(found, monitor)
    with adapted.active({"mixture": 1.0}) as model:
        made = usage(model, batches, groups)
        names = _names(model, max(len(one.load) for one in made))
    routers = [
        {**asdict(one), "busiest": one.busiest, "unused": one.unused, "apart": one.apart,
         "words": [[_word(opened.tokenizer, token) for token in tokens] for tokens in one.tokens]}
        for one in made
    ]  # fmt: skip
    return Report(adapter, base, names, {group: counts[group] for group in groups if counts.get(group)}, routers)


def is_mixture(path: Path) -> bool:
    """Whether an adapter is a mixture of experts, of ours or of another program."""
    from adapters.formats.foreign_mixture import is_foreign
    from adapters.formats.mixture import mixture_config

    return mixture_config(path) is not None or is_foreign(path)


def trained_on(path: Path) -> list[str]:
    """The rows that an adapter was trained on.

    Raises:
        InputError: it is no mixture, or the rows are not known or not there any more.
    """
    from studio import jobs

    if not is_mixture(path):
        raise InputError(
            f"'{path.name}' is not a mixture of experts, so there is nothing that chooses between experts: inspect it "
            "with  studio inspect intruders."
        )
    config = path.parent / "config.yaml"  # beside an adapter that a job has made
    values = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    named = [str(values.get("data") or "")] if isinstance(values, dict) else []
    made = [job for job in jobs.list(200) if (job.result or {}).get("library") == path.name]
    named += [str(job.config.get("data") or "") for job in made]
    found = next((file for file in named if file and Path(file).expanduser().is_file()), None)
    if found is None:
        raise InputError(f"It is not known on which rows '{path.name}' was trained: name a file with --data.")
    return [found]


def base_of(path: Path) -> str:
    """The base that a mixture names.

    Raises:
        InputError: it names none.
    """
    from studio.library import scan

    named = str(scan.record(path, "adapter").notes.get("base_model") or "")
    if not named:
        raise InputError(f"'{path.name}' does not name its base: name it with --base.")
    return named


# ------------------------------------------------------------------------------------------------ rows and batches


@dataclass(frozen=True)
class _Rows:
    """Items of all files in order, the number of each one's group, and the groups' names."""

    items: list[Any]
    group: list[int]
    groups: list[str]

    @classmethod
    def of(cls, files: Sequence[str], by: str, rows: int, understand: Callable[[TextReport], list[Any]]) -> _Rows:
        from studio.datasets.texts import scan, usable_rows

        made, groups = cls([], [], []), dict[str, int]()
        for file, own in zip(files, [""] * len(files) if by else _apart(files), strict=True):
            report = usable_rows(scan(file), limit=rows)
            if by and by not in report.columns:
                raise InputError(
                    f"'{report.source}' has no column '{by}'{nearest(by, report.columns)}: it has "
                    f"{', '.join(report.columns)}."
                )
            named = {row.number: str(row.values.get(by)) if by else own for row in report.rows}
            for item in understand(report):
                made.items.append(item)
                made.group.append(groups.setdefault(named[item.number], len(groups)))
        made.groups.extend(groups)
        return made


def _apart(files: Sequence[str]) -> list[str]:
    """A name for each file's group: its stem, or as much of its path as tells the files apart.

    Raises:
        InputError: a file is named twice.
    """
    paths = [Path(file).expanduser().absolute() for file in files]
    deepest = max((len(path.parts) for path in paths), default=1)
    longer = (["/".join(path.parts[-count:]) for path in paths] for count in range(1, deepest + 1))
    for names in ([path.stem for path in paths], *longer):
        if len(set(names)) == len(names):
            return names
    twice = next(file for file, path in zip(files, paths, strict=True) if paths.count(path) > 1)
    raise InputError(f"The file '{twice}' is named twice: name each file once.")


@dataclass(frozen=True)
class _Opened:
    """A base with what is needed to look at its rows.

    Attributes:
        adapted: name for messages -> the model with adapters; ``understand``: a file's rows -> items.
        batches: rows -> (batches, names of the groups, tokens of each group, known once the batches are used up).
    """

    tokenizer: Any
    adapted: Callable[[str], Any]
    understand: Callable[[TextReport], list[Any]]
    batches: Callable[[_Rows, Monitor], tuple[Iterator[Batch], list[str], dict[str, int]]]


def _looks_at_pictures(place: str) -> bool:
    from studio.library import facts

    return Path(place).is_dir() and facts.is_vision_language_model(Path(place))


def _open_language(place: str) -> _Opened:
    from pipelines.language.adapters import AdaptedModel
    from pipelines.language.loading import open_model
    from studio.datasets.conversations import Columns, conversations
    from studio.datasets.encoding import encode_all
    from studio.training.language.data import Collate

    base = open_model(place)
    collate = Collate(base.tokenizer.pad_token_id)

    def batches(rows: _Rows, monitor: Monitor) -> tuple[Iterator[Batch], list[str], dict[str, int]]:
        items = [replace(item, number=number) for number, item in enumerate(rows.items)]  # files share numbers
        made = encode_all(items, base.tokenizer, max_length=LENGTH, too_long="cut", loss_on="all")
        kinds = [rows.group[number] for number in made.numbers]
        return _batches(made.samples, kinds, collate, rows.groups, base.device, monitor)

    return _Opened(
        base.tokenizer, lambda name: AdaptedModel(base.model, name),
        lambda report: conversations(report, Columns()), batches,
    )  # fmt: skip


def _open_pictured(place: str) -> _Opened:
    from pipelines.multimodal.adapters import AdaptedVision
    from pipelines.multimodal.loading import open_model
    from studio.datasets.conversations import Columns
    from studio.datasets.picture_questions import pictured
    from studio.training.tasks.vision_language import Collate, encode

    base = open_model(place)
    mark = base.model.config.image_token_id

    def batches(rows: _Rows, monitor: Monitor) -> tuple[Iterator[Batch], list[str], dict[str, int]]:
        samples = [encode(base, item)[0] | {"number": number} for number, item in enumerate(rows.items)]
        collate = Collate(base, dict(enumerate(rows.items)))
        return _batches(samples, rows.group, collate, rows.groups, base.device, monitor, mark)

    return _Opened(
        base.tokenizer, lambda name: AdaptedVision(base, name), lambda report: pictured(report, Columns()), batches
    )


def _batches(
    samples: Sequence[Mapping[str, Any]],
    kinds: Sequence[int],
    collate: Callable[[Sequence[Any]], Mapping[str, Any]],
    groups: Sequence[str],
    device: Any,
    monitor: Monitor,
    mark: int | None = None,
) -> tuple[Iterator[Batch], list[str], dict[str, int]]:
    """Batches with the group of every token; those of pictures (``mark``) have groups of their own, after the others.

    Raises:
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    import torch

    from adapters.layers.experts.usage import LEFT_OUT

    names = [*groups, *(f"{group}, {PICTURES}" for group in groups)] if mark is not None else list(groups)
    counts: dict[str, int] = {}

    def made() -> Iterator[Batch]:
        for start in range(0, len(samples), BATCH):
            check(monitor)
            monitor.report(Progress("reading", start, len(samples)))
            inputs = {name: value.to(device) for name, value in collate(samples[start : start + BATCH]).items()}
            inputs.pop("labels", None)
            ids = inputs["input_ids"]
            group = torch.tensor(kinds[start : start + BATCH], device=device)[:, None].expand_as(ids).clone()
            if mark is not None:
                group[ids == mark] += len(groups)
            group[inputs["attention_mask"] == 0] = LEFT_OUT
            for number, name in enumerate(names):
                counts[name] = counts.get(name, 0) + int((group == number).sum())
            yield inputs, group

    return made(), names, counts


def _names(model: Any, count: int) -> list[str]:
    from adapters.layers.experts import routing_of

    settings = next(iter(routing_of(model).configs.values()))
    named = [str(one["name"]) for one in settings.experts]
    return named or [str(number + 1) for number in range(count)]


def _word(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token])) or str(tokenizer.convert_ids_to_tokens(token))


# ------------------------------------------------------------------------------------------------ picture

CELL, ROW, LEFT, TOP, GAP, SIDE = 26, 17, 330, 70, 18, 190
"""Sizes of the picture, in pixels."""


def picture(report: Report) -> Image.Image:
    """Plot every router as a row: for each group a cell per expert, dark where the expert takes many tokens."""
    from PIL import Image, ImageDraw, ImageFont

    panels = list(report.groups)
    widest = max(len(router["load"]) for router in report.routers)
    wide = max(widest * CELL, 90)
    width = LEFT + len(panels) * (wide + GAP) + SIDE
    image = Image.new("RGB", (width, TOP + ROW * len(report.routers) + 54), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    title = f"Which expert takes which tokens: {Path(report.adapter).name}"
    draw.text((10, 8), title, fill="black", font=ImageFont.load_default(15))
    for panel, group in enumerate(panels):
        x = LEFT + panel * (wide + GAP)
        draw.text((x, TOP - 34), _fitting(f"{group} ({report.groups[group]} tokens)", wide), fill="black", font=font)
        for expert in range(widest):
            label = report.experts[expert] if widest == len(report.experts) else str(expert + 1)
            middle = (x + CELL * expert + CELL // 2, TOP - 4)
            draw.text(middle, _fitting(label, CELL), fill="#555", font=font, anchor="ms")
    right = LEFT + len(panels) * (wide + GAP)
    draw.text((right, TOP - 4), "busiest  entropy  apart", fill="#555", font=font, anchor="ls")
    for number, router in enumerate(report.routers):
        y = TOP + ROW * number
        name = router["module"] or "the whole model"
        name = name if len(name) < 50 else f"...{name[-47:]}"
        draw.text((LEFT - 8, y + ROW // 2), name, fill="black", font=font, anchor="rm")
        for panel, group in enumerate(panels):
            for expert, load in enumerate(router["groups"].get(group, ())):
                x = LEFT + panel * (wide + GAP) + CELL * expert
                box = (x, y, x + CELL - 2, y + ROW - 2)
                draw.rectangle(box, fill=shade(load, len(router["load"])), outline="#d5dae2")
        text = f"{router['busiest']:.1f}x        {router['entropy']:.2f}        {router['apart']:.2f}"
        draw.text((right, y + ROW // 2), text, fill="black", font=font, anchor="lm")
    y = TOP + ROW * len(report.routers) + 14
    for step in range(11):
        x = LEFT + CELL * step
        draw.rectangle((x, y, x + CELL - 2, y + ROW - 2), fill=shade(step / 10, 2))
    draw.text((LEFT - 8, y + ROW // 2), "no tokens", fill="black", font=font, anchor="rm")
    draw.text((LEFT + CELL * 11 + 4, y + ROW // 2), "twice its even share or more (middle: even)", fill="black",
              font=font, anchor="lm")  # fmt: skip
    return image


def depth(load: float, experts: int) -> float:
    """How dark a cell is: 0 without tokens, a half at an even share, 1 at twice as much or more."""
    return min(1.0, load * experts / 2)


def shade(load: float, experts: int) -> tuple[int, int, int]:
    """White to dark blue, by :func:`depth`."""
    part = depth(load, experts)
    return tuple(round(255 + part * (end - 255)) for end in (24, 60, 120))  # type: ignore[return-value]


def _fitting(text: str, pixels: int) -> str:
    most = max(1, pixels // 6)
    return text if len(text) <= most else text[: most - 1] + "…"
