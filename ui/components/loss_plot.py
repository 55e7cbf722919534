"""The loss of a training job as a plot in the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence

from studio import jobs
from studio.jobs import Job
from ui import markup
from ui.components.axes import HEIGHT, WIDTH, Axes, room

_MOST_POINTS = 400


def of_job(job: Job) -> str:
    """The plot of a training job so far."""
    rows = [row for row in jobs.history(job.id) if row.stage == "training"]
    losses = [(row.step, row.loss) for row in rows if row.loss is not None]
    checks = [(row.step, row.metrics["validation_loss"]) for row in rows if "validation_loss" in row.metrics]
    return loss_plot(losses, checks, total=max((row.total for row in rows), default=0))


def loss_plot(points: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]] = (), total: int = 0) -> str:
    """SVG of (step, loss) points with their running average; ``total`` is where the run will end."""
    points = [point for point in points if math.isfinite(point[1])]
    if not points:
        return ""
    everything = [*points, *validation]
    low, high = room([loss for _, loss in everything])
    axes = Axes(0, max(total, everything[-1][0], 2), low, high)
    points_shown = thin(points)
    smooth = thin(running_average(points))
    end = axes.place(smooth[-1])
    parts = [
        axes.grid(whole=True),
        f'<path class="raw" d="{axes.path(points_shown)}"/>',
        f'<path class="smooth" d="{axes.path(smooth)}"/>',
        f'<path class="check" d="{axes.path(validation)}"/>' if validation else "",
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


def thin(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """So many points as a plot can show, the last one among them."""
    stride = max(1, math.ceil(len(points) / _MOST_POINTS))
    return [*points[:-1:stride], points[-1]]
