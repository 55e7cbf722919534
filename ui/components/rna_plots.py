"""Plots of classified transcripts: how many have which probability, and where their longest reading frames are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ui import markup

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 200, 46, 34, 14
MOST = 40
"""Transcripts of a map."""

ROW, NAMES, NUMBERS = 22, 150, 92


def histogram(counts: Sequence[int], labels: Sequence[str], threshold: float) -> str:
    """Bars of transcripts by probability of the second label, coloured by the label they get, with the threshold."""
    if not sum(counts):
        return ""
    top, step = max(counts), (WIDTH - LEFT - 12) / len(counts)
    high = HEIGHT - BOTTOM - TOP
    parts = [
        f'<text x="{LEFT - 8}" y="{TOP + 8}" text-anchor="end">{top}</text>'
        f'<text x="{LEFT - 8}" y="{HEIGHT - BOTTOM}" text-anchor="end">0</text>'
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
    ]
    for number, count in enumerate(counts):
        low = number / len(counts)
        tall = high * count / top
        kind = "second" if low + 0.5 / len(counts) >= threshold else "first"
        said = f"{low:.2f} to {low + 1 / len(counts):.2f}: {count}"
        parts.append(
            f'<rect class="{kind}" x="{LEFT + number * step + 1:.1f}" y="{HEIGHT - BOTTOM - tall:.1f}" '
            f'width="{step - 2:.1f}" height="{tall:.1f}"><title>{said}</title></rect>'
        )
    for at in (0, 0.25, 0.5, 0.75, 1):
        x = LEFT + at * (WIDTH - LEFT - 12)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{at:g}</text>')
    x = LEFT + threshold * (WIDTH - LEFT - 12)
    parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    said = f"Transcripts by probability of {labels[1]}, threshold {threshold:g}"
    return (
        f'<figure class="as-plot as-rna"><figcaption><strong>Probability of {markup.text(labels[1])}</strong>'
        f'<span class="now">threshold {threshold:g}</span>{_legend(labels)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{markup.text(said)}">{"".join(parts)}</svg>'
        "</figure>"
    )


def orf_map(rows: Sequence[Mapping[str, str]], labels: Sequence[str]) -> str:
    """The first transcripts as bars of their lengths with the longest reading frame on them."""
    shown = rows[:MOST]
    if not shown:
        return ""
    longest = max(int(row["length"]) for row in shown)
    room, height = WIDTH - NAMES - NUMBERS, ROW * len(shown) + 8
    parts = []
    for number, row in enumerate(shown):
        y, length = number * ROW + 4, int(row["length"])
        parts.append(f'<text x="{NAMES - 8}" y="{y + 13}" text-anchor="end">{markup.text(_short(row["id"]))}</text>')
        parts.append(
            f'<rect class="whole" x="{NAMES}" y="{y + 6}" width="{max(1, room * length / longest):.1f}" height="5"/>'
        )
        words = f"{length} nt"
        if row["orf_start"]:
            start, end = int(row["orf_start"]) - 1, int(row["orf_end"])
            kind = "second" if row["label"] == labels[1] else "first"
            said = (
                f"{row['id']}: {row['label'] or 'no label'}, ORF {start + 1} to {end} on strand {row['orf_strand']}, "
                f"{row['orf_length']} of {length} nt"
                + ("" if row["orf_complete"] == "yes" else ", without a stop codon")
            )
            parts.append(
                f'<rect class="{kind}{"" if row["orf_complete"] == "yes" else " open"}" '
                f'x="{NAMES + room * start / longest:.1f}" y="{y + 2}" '
                f'width="{max(1.5, room * (end - start) / longest):.1f}" height="13" rx="2">'
                f"<title>{markup.text(said)}</title></rect>"
            )
        parts.append(f'<text x="{WIDTH - 8}" y="{y + 13}" text-anchor="end">{words}</text>')
    note = f"the first {len(shown)} of {len(rows)} shown" if len(rows) > len(shown) else f"{len(shown)} transcripts"
    return (
        '<figure class="as-plot as-rna"><figcaption><strong>Longest reading frames</strong>'
        f'<span class="now">{note}</span>{_legend(labels)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Longest reading frame of each transcript, '
        f'coloured by its label">{"".join(parts)}</svg></figure>'
    )


def _legend(labels: Sequence[str]) -> str:
    return (
        f'<span class="legend"><span class="first">{markup.text(labels[0])}</span>'
        f'<span class="second">{markup.text(labels[1])}</span></span>'
    )


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
