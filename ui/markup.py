"""Small pieces of HTML shared by the pages. Everything from users or files passes through :func:`text`."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from urllib.parse import quote


def text(value: object) -> str:
    """``value`` as text that cannot become markup."""
    return html.escape(str(value), quote=True)


def file_url(path: str | Path | None, version: object = "") -> str:
    """Address (relative to the page) under which the app serves ``path``; empty for no path."""
    if not path:
        return ""
    suffix = f"?v={quote(str(version))}" if version != "" else ""
    return f"gradio_api/file={quote(str(Path(path).absolute()))}{suffix}"


def shown(picture: str | Path, video: str | Path | None, words: str, look: str) -> str:
    """A picture described by ``words``, or its video with controls, with the class ``look``."""
    if video is None:
        return f'<img class="{look}" alt="{text(words)}" src="{text(file_url(picture))}">'
    return (
        f'<video class="{look}" controls loop playsinline aria-label="{text(words)}" '
        f'poster="{text(file_url(picture))}" src="{text(file_url(video))}"></video>'
    )


def tag(word: str, tone: str = "") -> str:
    """A small rounded label."""
    return f'<span class="as-tag {tone}">{text(word)}</span>'


_WIDE = 28


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """A definition list of the pairs that have a value."""
    rows = "".join(
        f"<div{' class=wide' if len(str(value)) > _WIDE else ''}><dt>{text(name)}</dt><dd>{text(value)}</dd></div>"
        for name, value in pairs
        if value not in (None, "", [], {}, ())
    )
    return f'<dl class="as-facts">{rows}</dl>'


def empty(title: str, hint: str) -> str:
    """What an empty area shows: what it is for and what to do."""
    return f'<div class="as-empty">{_OVERLAP}<h3>{text(title)}</h3><p>{text(hint)}</p></div>'


def notice(sentence: str, tone: str = "error") -> str:
    """A sentence in a coloured box (``error`` or ``info``); nothing for an empty sentence."""
    return f'<div class="as-notice {tone}" role="status">{text(sentence)}</div>' if sentence else ""


def heading(title: str, hint: str = "") -> str:
    """Title of a card with a line of help."""
    return f'<div class="as-heading"><h2>{text(title)}</h2>{f"<p>{text(hint)}</p>" if hint else ""}</div>'


def file_size(count: float | None) -> str:
    """A number of bytes, readable."""
    if not count:
        return ""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f}\u00a0{unit}" if unit != "MB" else f"{count:.1f}\u00a0{unit}"
        count /= 1000
    return f"{count:.1f}\u00a0GB"


def duration(seconds: float | None) -> str:
    """Seconds, readable: ``8 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if seconds is None or seconds < 0:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def seconds_since_epoch(moment: float | datetime | str | None) -> float | None:
    """A time as seconds since the epoch, whatever its form."""
    if moment is None or moment == "":
        return None
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    return moment.timestamp() if isinstance(moment, datetime) else float(moment)


def ago(moment: float | datetime | str | None, now: float | None = None) -> str:
    """How long ago, readable."""
    then = seconds_since_epoch(moment)
    if then is None:
        return ""
    passed = (time.time() if now is None else now) - then
    if passed < 45:
        return "just now"
    if passed < 3600:
        return f"{max(1, round(passed / 60))} min ago"
    if passed < 86400:
        return f"{round(passed / 3600)} h ago"
    return f"{round(passed / 86400)} d ago"


_OVERLAP = (
    '<svg class="as-mark" viewBox="0 0 48 48" aria-hidden="true"><circle class="a" cx="18" cy="18" r="13"/>'
    '<circle class="b" cx="30" cy="18" r="13"/><circle class="c" cx="24" cy="29" r="13"/></svg>'
)


def header() -> str:
    """The wordmark and the switch between light and dark mode."""
    return (
        f'<header class="as-header"><a class="as-brand" href="compose" aria-label="Adapter Studio, start page">'
        f"{_OVERLAP}<span>Adapter<b>Studio</b></span></a>"
        '<button type="button" class="as-theme" data-theme-switch aria-label="Switch between light and dark">'
        '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M12 3a9 9 0 1 0 9 9 7 7 0 0 1-9-9z"/></svg>'
        "</button></header>"
    )
