"""A transcript with times, and its forms as text, JSON and subtitles."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LOOP = 2.4
"""Text that zlib makes more than this many times smaller repeats itself; Whisper's own bound."""


@dataclass(frozen=True)
class Segment:
    """A piece of text and when it is said, in seconds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """What was said.

    Attributes:
        segments: in order.
        seconds: length of the sound.
        language: code of the language, empty for an English-only model.
    """

    segments: tuple[Segment, ...]
    seconds: float
    language: str = ""

    @property
    def text(self) -> str:
        return " ".join(text for segment in self.segments if (text := segment.text.strip()))

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "text": self.text, "language": self.language, "seconds": round(self.seconds, 3),
            "segments": [
                {"start": round(one.start, 3), "end": round(one.end, 3), "text": one.text.strip()}
                for one in self.segments
            ],
        }  # fmt: skip


def as_text(transcript: Transcript) -> str:
    """One line per segment."""
    return "".join(f"{one.text.strip()}\n" for one in transcript.segments)


def as_json(transcript: Transcript) -> str:
    return json.dumps(transcript.as_dict(), ensure_ascii=False, indent=2) + "\n"


def as_srt(transcript: Transcript) -> str:
    """SubRip: numbered cues, a comma before the milliseconds."""
    cues = [
        f"{number}\n{clock(one.start, ',')} --> {clock(one.end, ',')}\n{_cue(one.text)}\n"
        for number, one in enumerate(transcript.segments, 1)
    ]
    return "\n".join(cues)


def as_vtt(transcript: Transcript) -> str:
    """WebVTT."""
    cues = [f"{clock(one.start, '.')} --> {clock(one.end, '.')}\n{_escaped(_cue(one.text))}\n"
            for one in transcript.segments]  # fmt: skip
    return "\n".join(["WEBVTT\n", *cues])


FORMATS: dict[str, Callable[[Transcript], str]] = {"text": as_text, "json": as_json, "srt": as_srt, "vtt": as_vtt}
"""Forms by name."""

ENDINGS = {"text": "txt", "json": "json", "srt": "srt", "vtt": "vtt"}
"""Endings of their files."""


def clock(seconds: float, point: str = ".") -> str:
    """Hours, minutes, seconds and milliseconds: 01:02:03.400."""
    whole = round(seconds * 1000)
    return f"{whole // 3_600_000:02}:{whole // 60_000 % 60:02}:{whole // 1000 % 60:02}{point}{whole % 1000:03}"


def loops(text: str) -> bool:
    """Whether a text repeats itself, as a Whisper does that has lost its way."""
    data = text.encode()
    return len(data) > 0 and len(data) / len(zlib.compress(data)) > LOOP


def _cue(text: str) -> str:
    return " ".join(text.split())


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
