"""What the routers of a mixture did while it was trained, below the loss: load and entropy, or X-LoRA's mean gates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from studio import jobs
from studio.jobs import Job
from ui import markup
from ui.components.axes import HEIGHT, WIDTH, Axes, Point, room
from ui.components.loss_plot import running_average, thin

TITLES = {
    "router_busiest": ("Busiest expert", "largest share of an expert, over an even one"),
    "router_entropy": ("Entropy of the routers", "1: they do not decide, 0: they are certain"),
}
GATE = "gate_"
COLOURS = 6
"""Colours of lines in the style sheet: more experts take turns with them."""


def of_job(job: Job) -> str:
    """The plots of a training so far; empty if it has no routers."""
    rows = [(row.step, row.metrics) for row in jobs.history(job.id) if row.stage == "training"]
    return router_plot(rows)


def router_plot(rows: Sequence[tuple[int, Mapping[str, float]]]) -> str:
    """(step, what was logged) as plots."""
    lines: dict[str, list[Point]] = {}
    for step, logged in rows:
        for name, value in logged.items():
            if (name in TITLES or name.startswith(GATE)) and math.isfinite(value):
                lines.setdefault(name, []).append((step, value))
    drawn = [_figure(*words, {"": lines[name]}) for name, words in TITLES.items() if name in lines]
    gates = {name.removeprefix(GATE): points for name, points in lines.items() if name.startswith(GATE)}
    if gates:
        drawn.append(_figure("Mean gates", "of each expert", gates))
    return f'<section class="as-routers" aria-label="Routers">{"".join(drawn)}</section>' if drawn else ""


def _figure(title: str, words: str, lines: Mapping[str, Sequence[Point]]) -> str:
    smooth = {name: running_average([(int(x), y) for x, y in points]) for name, points in lines.items()}
    everything = [point for points in smooth.values() for point in points]
    axes = Axes(0, max(2.0, *(x for x, _ in everything)), *room([y for _, y in everything], 1))
    paths = "".join(
        f'<path class="line c{number % COLOURS}" d="{axes.path(thin(points))}"/>'
        for number, points in enumerate(smooth.values())
    )
    now = ", ".join(f"{name} {points[-1][1]:.2f}".strip() for name, points in smooth.items())
    legend = "".join(
        f'<span class="c{number % COLOURS}">{markup.text(name)}</span>' for number, name in enumerate(smooth) if name
    )
    return (
        f'<figure class="as-plot"><figcaption><strong>{title}</strong><span class="now">{markup.text(now)}; {words}'
        f'</span><span class="legend">{legend}</span></figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{title}: {markup.text(now)}">{axes.grid(whole=True)}{paths}</svg></figure>'
    )
