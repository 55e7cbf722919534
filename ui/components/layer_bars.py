"""Bars per layer of a smaller base: bits of its matrices, or what is left of its heads and channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from studio.compression.layers import Left
from ui import markup

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 170, 34, 22


def of(figures: Iterable[Left]) -> str:
    """One picture per figure."""
    return "".join(bars(one.values, one.title, one.shape) for one in figures)


def bars(values: Mapping[str, float], title: str, shape: str) -> str:
    """An SVG with one bar per entry; each says its value."""
    if not values:
        return ""
    top = max(values.values()) or 1.0
    room, high = WIDTH - LEFT, HEIGHT - BOTTOM - 10
    step = room / len(values)
    every = -(-len(values) // 20)
    parts = [
        f'<text x="{LEFT - 6}" y="16" text-anchor="end">{markup.text(shape.format(top))}</text>'
        f'<text x="{LEFT - 6}" y="{HEIGHT - BOTTOM}" text-anchor="end">0</text>'
    ]
    for number, (name, value) in enumerate(values.items()):
        tall = high * value / top
        x, told = LEFT + number * step, f"layer {name}: {shape.format(value)}"
        parts.append(
            f'<rect class="bar" fill="currentColor" opacity="0.75" x="{x:.1f}" y="{HEIGHT - BOTTOM - tall:.1f}" '
            f'width="{max(1.0, step * 0.8):.1f}" height="{tall:.1f}"><title>{markup.text(told)}</title></rect>'
        )
        if number % every == 0:
            middle = x + step * 0.4
            parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{markup.text(name)}</text>')
    said = f"{title}: " + ", ".join(f"{name} {shape.format(value)}" for name, value in values.items())
    return (
        f'<figure class="as-plot"><figcaption><strong>{markup.text(title)}</strong></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{markup.text(said)}">{"".join(parts)}</svg>'
        "</figure>"
    )
