"""The adapters of a composition as rows with weight, active steps and trigger words.

A row is a plain dict ``{name, facts, preview, triggers, weight, start, end, schedule, te_weight, blocks}``. Rows from
the page are checked against the library: only names it knows go into a job.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gradio as gr

from adapters.errors import InputError
from studio.composition import distilled_adapters
from studio.library import Record, base_families
from ui import markup
from ui.theme import script

Row = dict[str, Any]
Keyframes = list[tuple[float, float]]


def rack() -> gr.HTML:
    """The component; custom event ``insert_word`` carries the trigger word that was clicked."""
    return gr.HTML(
        [], html_template='<ul class="as-rack" aria-label="Adapters in this picture"></ul>',
        js_on_load=script("adapter_rack"), apply_default_css=False, elem_id="rack",
    )  # fmt: skip


def new_row(record: Record) -> Row:
    """The row of an adapter just chosen."""
    return {
        "name": record.name, "facts": short_facts(record), "preview": markup.file_url(record.preview, record.modified),
        "triggers": list(record.triggers), "weight": 1.0, "start": 0.0, "end": 1.0, "schedule": [],
        "schedule_by": "step", "te_weight": None,
        "blocks": {}, "distilled": _distilled(record),
    }  # fmt: skip


def _distilled(record: Record) -> dict[str, Any] | None:
    """What is built into a distilled adapter, as plain values; None for others."""
    found = distilled_adapters.of(record.path)
    return vars(found) if found else None


def suit(rows: Sequence[Row] | None) -> distilled_adapters.Distilled | None:
    """The distilled adapter among the rows, if its weight is not 0."""
    found = [row["distilled"] for row in rows or () if row.get("distilled") and row.get("weight") != 0]
    return distilled_adapters.Distilled(**found[0]) if found else None


def short_facts(record: Record) -> str:
    """Family and rank in a few characters."""
    family = base_families.written(record.family)
    return " · ".join(filter(None, [family, f"rank {record.rank}" if record.rank else ""]))


def add(rows: Sequence[Row] | None, record: Record) -> list[Row]:
    """``rows`` and one more; an adapter that is already there is refused."""
    known = list(rows or ())
    if record.problem:
        raise InputError(f"'{record.name}' cannot be used: {record.problem}.")
    if any(row["name"] == record.name for row in known):
        raise InputError(f"'{record.name}' is already in the list: change its weight there.")
    return [*known, new_row(record)]


def uses(rows: Sequence[Row] | None, known: Iterable[Record]) -> list[dict[str, Any]]:
    """The rows as ``adapters`` of a composition; raises :class:`InputError` for what the library does not know."""
    by_name = {record.name: record for record in known}
    return [_use(row, by_name) for row in rows or ()]


def _use(row: Mapping[str, Any], known: Mapping[str, Record]) -> dict[str, Any]:
    name = str(row.get("name", ""))
    if name not in known:
        raise InputError(f"'{name}' is no longer in the library: remove it from the list or restore it there.")
    schedule = row.get("schedule") or keyframes(_number(row, "start", 0.0), _number(row, "end", 1.0))
    return {
        "name": name, "path": name, "weight": _number(row, "weight", 1.0),
        "te_weight": None if row.get("te_weight") is None else _number(row, "te_weight", 1.0),
        "triggers": list(known[name].triggers), "blocks": blocks(row), "schedule": schedule,
        "schedule_by": row.get("schedule_by", "step") if row.get("schedule") else "step",
    }  # fmt: skip


def blocks(row: Mapping[str, Any]) -> dict[str, float]:
    """The factors per block of a row: a mapping, or text with one ``prefix: factor`` per line."""
    given = row.get("blocks") or {}
    if not isinstance(given, str):
        return dict(given)
    found: dict[str, float] = {}
    for line in filter(None, map(str.strip, given.splitlines())):
        prefix, _, factor = line.rpartition(":")
        try:
            found[prefix.strip()] = float(factor)
        except ValueError:
            prefix = ""
        if not prefix.strip():
            raise InputError(
                f"Block factors of '{row.get('name')}': write one 'prefix: factor' per line, as in 'down_blocks.1: "
                f"0.5', got '{line}'."
            )
    return found


def rows_of(
    config: Mapping[str, Any], known: Iterable[Record], hashes: Mapping[str, str]
) -> tuple[list[Row], list[str]]:
    """Rows for the ``adapters`` of a recipe's configuration, and the names the library does not have.

    ``hashes`` gives the sha256 of the recipe's adapters by name, so that renamed ones are still found.
    """
    records = list(known)
    found: list[Row] = []
    missing: list[str] = []
    for use in config.get("adapters") or ():
        record = _match(use, records, hashes)
        if record is None:
            missing.append(str(use.get("name") or use.get("path")))
            continue
        by = use.get("schedule_by", "step")
        span = active_span(use.get("schedule") or []) if by == "step" else None
        found.append({
            **new_row(record), "weight": use.get("weight", 1.0), "te_weight": use.get("te_weight"),
            "blocks": use.get("blocks") or {}, "start": span[0] if span else 0.0, "end": span[1] if span else 1.0,
            "schedule": [] if span else use.get("schedule"), "schedule_by": by,
        })  # fmt: skip
    return found, missing


def renamed(config: Mapping[str, Any], known: Iterable[Record], hashes: Mapping[str, str]) -> dict[str, str]:
    """Name in a recipe -> name of the row, for the adapters that :func:`rows_of` finds."""
    records = list(known)
    found = {str(use.get("name")): _match(use, records, hashes) for use in config.get("adapters") or ()}
    return {name: record.name for name, record in found.items() if record is not None}


def _match(use: Mapping[str, Any], records: Sequence[Record], hashes: Mapping[str, str]) -> Record | None:
    wanted = hashes.get(str(use.get("name")), "")
    same_weights = [record for record in records if wanted and record.sha256 == wanted]
    same_place = [record for record in records if str(use.get("path")) in (record.name, str(record.path))]
    same_name = [record for record in records if record.name == use.get("name")]
    return next(iter([*same_weights, *same_place, *same_name]), None)


def _number(row: Mapping[str, Any], key: str, default: float) -> float:
    try:
        return float(row.get(key, default))
    except (TypeError, ValueError):
        raise InputError(f"The {key} of '{row.get('name')}' must be a number, got '{row.get(key)}'.") from None


def keyframes(start: float, end: float) -> Keyframes:
    """Full strength from ``start`` to ``end`` of the steps and none outside, as keyframes; empty for all steps."""
    if start <= 0 and end >= 1:
        return []
    before = [(0.0, 0.0), (start, 0.0)] if start > 0 else []
    after = [(end, 0.0), (1.0, 0.0)] if end < 1 else []
    return [*before, (max(start, 0.0), 1.0), (min(end, 1.0), 1.0), *after]


def active_span(schedule: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The (start, end) from which :func:`keyframes` made this schedule; None for any other schedule."""
    points = [(float(progress), float(strength)) for progress, strength in schedule]
    if not points:
        return 0.0, 1.0
    full = [progress for progress, strength in points if strength == 1.0]
    if not full or keyframes(full[0], full[-1]) != points:
        return None
    return full[0], full[-1]
