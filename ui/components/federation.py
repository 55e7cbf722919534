"""A federation in pictures: who has what, rounds with the shared adapter and every client, bytes, epsilon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studio.cli.output import size
from studio.federation.history import WORTH
from studio.federation.partition_table import Part
from ui import markup
from ui.components.axes import HEIGHT, WIDTH, Axes, room

ROW, NAME, LAST, HEAD = 26, 150, 96, 8
HUES = (258, 18, 140, 205, 45, 330, 90, 175, 290, 60, 0, 230, 120, 310)
"""Hues of labels, in their order; they repeat."""

Rounds = Sequence[Mapping[str, Any]]


def who_has_what(parts: Sequence[Part]) -> str:
    """A bar for each client, as long as its rows, in the colours of its labels."""
    if not parts:
        return ""
    most = max(part.rows for part in parts) or 1
    names = sorted({label for part in parts for label in part.labels})
    hue = {label: HUES[number % len(HUES)] for number, label in enumerate(names)}
    free, drawn = WIDTH - NAME - LAST, []
    for number, part in enumerate(parts):
        y, x = HEAD + number * ROW, float(NAME)
        drawn.append(f'<text x="{NAME - 8}" y="{y + 15}" text-anchor="end">{markup.text(part.name[:22])}</text>')
        for label, count in (part.labels or {"": part.rows}).items():
            wide = free * count / most
            colour = f"hsl({hue[label]} 55% 58%)" if label else "currentColor"
            told = f"{part.name}: {count} of {label}" if label else f"{part.name}: {count}"
            drawn.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(0.5, wide):.1f}" height="{ROW - 6}" fill="{colour}" '
                f'opacity="0.85"><title>{markup.text(told)}</title></rect>'
            )
            x += wide
        tested = f" + {part.tested}" if part.tested else ""
        drawn.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{part.rows}{tested}</text>')
    said = "; ".join(f"{part.name} has {part.rows}: {part.text()}" for part in parts)
    tall = 2 * HEAD + len(parts) * ROW
    legend = "".join(
        f'<span style="--line: hsl({hue[label]} 55% 58%)">{markup.text(label)}</span>' for label in names[:16]
    )
    return (
        '<figure class="as-plot"><figcaption><strong>Who has what</strong><span class="now">rows to train on'
        f"{' + to measure on' if any(part.tested for part in parts) else ''}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {tall}" role="img" aria-label="{markup.text(said)}">{"".join(drawn)}</svg>'
        f'<figcaption><span class="legend">{legend}</span></figcaption></figure>'
    )


def curves(rounds: Rounds, total: int) -> str:
    """The shared adapter's measure by round: its mean, and every client's test data."""
    measured = [one for one in rounds if one.get("measured")]
    word = next((name for name in WORTH if any(name in m for one in measured for m in one["measured"].values())), "")
    if not word:
        return _losses(rounds, total)
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in measured:
        for client, values in one["measured"].items():
            if word in values:
                lines.setdefault(client, []).append((one["number"], values[word]))
    mean = []
    for one in measured:
        values = [found[word] for found in one["measured"].values() if word in found]
        mean.append((float(one["number"]), sum(values) / len(values)))
    return _plot(word.replace("_", " ").capitalize(), mean, lines, total)


def _losses(rounds: Rounds, total: int) -> str:
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in rounds:
        for client, values in one.get("clients", {}).items():
            if "loss" in values:
                lines.setdefault(client, []).append((one["number"], values["loss"]))
    mean = []
    for one in rounds:
        losses = [values["loss"] for values in one.get("clients", {}).values() if "loss" in values]
        if losses:
            mean.append((float(one["number"]), sum(losses) / len(losses)))
    return _plot("Clients' training loss", mean, lines, total) if mean else ""


def _plot(
    title: str, mean: Sequence[tuple[float, float]], lines: Mapping[str, Sequence[tuple[float, float]]], total: int
) -> str:
    low, high = room([value for line in lines.values() for _, value in line], 1.0)
    axes = Axes(0, max(total, 2), low, high)
    drawn = [axes.grid(whole=True)]
    for client, line in lines.items():
        drawn.append(f'<path class="raw" d="{axes.path(line)}"><title>{markup.text(client)}</title></path>')
        x, y = axes.place(line[-1])
        told = f"<title>{markup.text(client)}</title>"
        drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" opacity="0.5">{told}</circle>')
    drawn.append(f'<path class="smooth" d="{axes.path(mean)}"/>')
    x, y = axes.place(mean[-1])
    drawn.append(f'<circle class="end" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
    said = f"{title} {mean[-1][1]:.4g} after round {mean[-1][0]:g}; " + ", ".join(
        f"{client} {line[-1][1]:.4g}" for client, line in lines.items()
    )
    legend = '<span class="smooth">mean</span><span class="raw">each client</span>'
    return (
        f'<figure class="as-plot"><figcaption><strong>{markup.text(title)}</strong><span class="now">'
        f'{mean[-1][1]:.4g}</span><span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{markup.text(said)}">{"".join(drawn)}</svg>'
        "</figure>"
    )


def table(rounds: Rounds) -> str:
    """Every round: clients, bytes, what averaging leaves, epsilon, who was left out and why."""
    done = [one for one in rounds if one["number"] > 0]
    if not done:
        return ""
    private, biased = any(one.get("epsilon") for one in done), any(one.get("bias") is not None for one in done)
    head = ["round", "clients", "up", "down", *(["relative bias"] if biased else []), *(["epsilon"] if private else [])]
    rows = []
    for one in done:
        cells = [str(one["number"]), str(len(one["clients"])), size(one["up"]), size(one["down"])]
        if biased:
            cells.append("" if one.get("bias") is None else f"{one['bias']:.3g}")
        if private:
            cells.append(f"{max(one['epsilon'].values()):.3g}" if one.get("epsilon") else "")
        rows.append("<tr>" + "".join(f"<td>{markup.text(cell)}</td>" for cell in cells) + "</tr>")
    out = "".join(
        markup.notice(f"Round {one['number']} without {name}: {why}", "warning")
        for one in done for name, why in one.get("failed", {}).items()
    )  # fmt: skip
    sent = sum(one["up"] for one in done), sum(one["down"] for one in done)
    titles = "".join(f"<th>{word}</th>" for word in head)
    return (
        f'{out}<figure class="as-plot"><figcaption><strong>Sent</strong><span class="now">{size(sent[0])} up, '
        f'{size(sent[1])} down</span></figcaption><table class="as-rounds"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></figure>"
    )
