"""The loss of a training job as a drawing that takes its colours from the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from studio import jobs
from studio.jobs import Job
from ui import markup

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 14, 28
_MOST_POINTS = 400


def of_job(job: Job) -> str:
    """The plot of a training job so far."""
    rows = jobs.history(job.id)
    losses = [(row.step, row.loss) for row in rows if row.loss is not None]
    checks = [(row.step, row.metrics["validation_loss"]) for row in rows if "validation_loss" in row.metrics]
    return loss_plot(losses, checks, total=int(job.config.get("steps") or 0))


def loss_plot(points: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]] = (), total: int = 0) -> str:
    """SVG of (step, loss) points with their running average; ``total`` is where the run will end."""
    points = [point for point in points if math.isfinite(point[1])]
    if not points:
        return ""
    everything = [*points, *validation]
    low, high = _range([loss for _, loss in everything])
    last = max(total, everything[-1][0], 2)

    def place(point: tuple[int, float]) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * point[0] / last
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - point[1]) / (high - low)
        return x, y

    thin = _thin(points)
    smooth = _thin(running_average(points))
    end = place(smooth[-1])
    parts = [
        _grid(low, high, last),
        f'<path class="raw" d="{_path(map(place, thin))}"/>',
        f'<path class="smooth" d="{_path(map(place, smooth))}"/>',
        f'<path class="check" d="{_path(map(place, validation))}"/>' if validation else "",
        f'<circle class="end" cx="{end[0]:.1f}" cy="{end[1]:.1f}" r="4"/>',
    ]
    said = f"Loss {points[-1][1]:.4f} at step {points[-1][0]}, average {smooth[-1][1]:.4f}"
    legend = '<span class="smooth">average</span><span class="raw">each step</span>'
    legend += '<span class="check">validation</span>' if validation else ""
    return (
        f'<figure class="as-plot"><figcaption><strong>Loss</strong><span class="now">{smooth[-1][1]:.4f}</span>'
        f'<span class="legend">{legend}</span></figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{markup.text(said)}">{"".join(parts)}</svg></figure>'
    )


def running_average(points: Sequence[tuple[int, float]], keep: float = 0.9) -> list[tuple[int, float]]:
    """Exponential average without the bias of its start."""
    average, weight, result = 0.0, 0.0, []
    for step, loss in points:
        average = keep * average + (1 - keep) * loss
        weight = keep * weight + (1 - keep)
        result.append((step, average / weight))
    return result


def _range(losses: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(losses)
    high = ordered[min(len(ordered) - 1, math.ceil(len(ordered) * 0.98))]
    low = ordered[0]
    room = (high - low) * 0.08 or abs(high) * 0.1 or 0.1
    return max(0.0, low - room) if low >= 0 else low - room, high + room


def _thin(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    stride = max(1, math.ceil(len(points) / _MOST_POINTS))
    return [*points[:-1:stride], points[-1]]


def _path(places: Iterable[tuple[float, float]]) -> str:
    pairs = [f"{x:.1f} {max(TOP, y):.1f}" for x, y in places]
    return "M" + "L".join(pairs)


def _grid(low: float, high: float, last: int) -> str:
    lines = []
    for part in range(5):
        y = TOP + (HEIGHT - TOP - BOTTOM) * part / 4
        loss = high - (high - low) * part / 4
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:.3g}</text>')
    for part in range(5):
        step = round(last * part / 4)
        x = LEFT + (WIDTH - LEFT - RIGHT) * part / 4
        anchor = "end" if part == 4 else "middle"
        lines.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{step}</text>')
    return "".join(lines)
