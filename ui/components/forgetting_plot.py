"""Plots of the losses over lambda for softened intruders and for the shrunk update (the control)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ui import markup
from ui.components.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, Point, room

Rows = Sequence[Mapping[str, Any]]
"""A forgetting job's rows: variant, strength (lambda, or the control's factor), norm, losses."""

TITLES = {"old": "What the base knew", "new": "What was learnt"}
LINES = {"soft": "intruders scaled", "shrunk": "all shrunk"}


def forgetting_plot(rows: Rows, strength: float) -> str:
    """A curve over lambda per kind of data, and old against new if both were measured; ``strength`` is marked."""
    kinds = [kind for kind in TITLES if rows and kind in rows[0]["losses"]]
    drawn = [_over_lambda(rows, kind, strength) for kind in kinds]
    if len(kinds) == 2:
        drawn.append(_against(rows))
    return f'<section class="as-forgetting" aria-label="Forgetting">{"".join(drawn)}</section>' if drawn else ""


def pairs(rows: Rows) -> list[tuple[float, Mapping[str, Any], Mapping[str, Any]]]:
    """(lambda, the softened adapter, the update shrunk to its size), from the largest lambda down."""
    found = []
    for number, row in enumerate(rows):
        if row["variant"] == "adapter":
            found.append((1.0, row, row))
        elif row["variant"] == "intruders scaled":
            found.append((float(row["strength"]), row, rows[number + 1]))
    return sorted(found, key=lambda pair: -pair[0])


def _over_lambda(rows: Rows, kind: str, strength: float) -> str:
    lines = {
        "soft": [(at, soft["losses"][kind]) for at, soft, _ in pairs(rows)],
        "shrunk": [(at, shrunk["losses"][kind]) for at, _, shrunk in pairs(rows)],
    }
    base = float(rows[0]["losses"][kind])
    first, last = (end([at for at, _ in lines["soft"]]) for end in (min, max))
    low, high = room([base, *(loss for line in lines.values() for _, loss in line)], 1)
    axes = Axes(min(first, 0), max(last, first + 0.01, 1), low, high)
    y = axes.place((0, base))[1]
    words = f'<text x="{LEFT + 4}" y="{y - 5:.1f}">the base</text>'
    rule = f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>{words}'
    x = axes.place((min(max(strength, axes.first), axes.last), low))[0]
    rule += f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    said = "; ".join(f"lambda {at:g}: {loss:.3g}" for at, loss in lines["soft"])
    return _figure(TITLES[kind], "loss over lambda", axes, lines, rule, f"{TITLES[kind]}, loss: {said}")


def _against(rows: Rows) -> str:
    def point(row: Mapping[str, Any]) -> Point:
        return float(row["losses"]["new"]), float(row["losses"]["old"])

    lines = {
        "soft": [point(soft) for _, soft, _ in pairs(rows)],
        "shrunk": [point(shrunk) for _, _, shrunk in pairs(rows)],
    }
    both = [one for line in lines.values() for one in line]
    axes = Axes(*room([x for x, _ in both], 1), *room([y for _, y in both], 1))
    said = "Loss on what the base knew against loss on what was learnt"
    return _figure("Old against new", "lower left is better", axes, lines, "", said)


def _figure(title: str, words: str, axes: Axes, lines: Mapping[str, Sequence[Point]], rule: str, said: str) -> str:
    parts = [axes.grid(), rule]
    for name, points in lines.items():
        parts.append(f'<path class="{name}" d="{axes.path(points)}"/>')
        parts += [
            f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in (axes.place(p) for p in points)
        ]
    legend = "".join(f'<span class="{name}">{text}</span>' for name, text in LINES.items())
    return (
        f'<figure class="as-plot"><figcaption><strong>{title}</strong><span class="now">{words}</span><span '
        f'class="legend">{legend}</span></figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{markup.text(said)}">{"".join(parts)}</svg></figure>'
    )
