"""Recordings with what is said in them, as a speech model learns them.

Rows name a sound (a path relative to their file, or the bytes that data sets keep) and its text. A folder has either
such rows in a file ``metadata.jsonl``, ``.csv`` or ``.tsv``, or beside every sound a text of its name (``a.wav``,
``a.txt``), in it or in folders below. Every sound is used or named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import InputError
from pipelines.speech import audio
from studio.datasets import texts
from studio.datasets.conversations import Unfit, column_of, each
from studio.datasets.texts import Row, TextReport

SOUNDS = ("audio", "sound", "file_name", "path", "file", "wav", "audio_path", "recording")
TEXTS = ("text", "sentence", "transcript", "transcription", "normalized_text", "raw_transcription")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv")


@dataclass(frozen=True)
class Utterance:
    """A recording and its text.

    Attributes:
        number: of its row.
        sound: its file, or a file's content.
    """

    number: int
    sound: Path | bytes
    text: str

    @property
    def name(self) -> str:
        return self.sound.name if isinstance(self.sound, Path) else f"row {self.number}"

    def open(self) -> audio.Sound:
        """The sound; raises :class:`InputError`."""
        return audio.read(self.sound)

    def digest(self) -> str:
        """SHA-256 of the file."""
        content = self.sound.read_bytes() if isinstance(self.sound, Path) else self.sound
        return hashlib.sha256(content).hexdigest()


def scan(source: str, split: str = "train") -> TextReport:
    """As :func:`studio.datasets.texts.scan`, and for folders of sounds."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return texts.scan(source, split)
    listed = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    report = texts.scan(str(listed)) if listed else TextReport(str(folder), "file")
    sounds = sorted(p for p in folder.rglob("*") if p.suffix.lower() in audio.SUFFIXES and p.is_file())
    if listed:
        _name_unused(report, folder, sounds)
        return report
    if not sounds:
        raise InputError(f"'{source}' holds no sound ({', '.join(audio.SUFFIXES)}).")
    for number, sound in enumerate(sounds, 1):
        name, words = str(sound.relative_to(folder)), sound.with_suffix(".txt")
        if not words.is_file():
            report.broken[number] = f"'{name}' has no text beside it ({words.name})"
            continue
        try:
            report.rows.append(Row(number, {"audio": name, "text": words.read_text(encoding="utf-8-sig").strip()}))
        except UnicodeDecodeError:
            report.broken[number] = f"'{words.name}' is not UTF-8 text"
    alone = sorted(p.name for p in folder.rglob("*.txt") if not any(p.with_suffix(s).is_file() for s in audio.SUFFIXES))
    if alone:
        report.remarks.append(f"{len(alone)} texts without a sound are not used ({', '.join(alone[:3])})")
    return report


def _name_unused(report: TextReport, folder: Path, sounds: list[Path]) -> None:
    column = column_of(report, "", SOUNDS)
    named = {(folder / str(row.values.get(column))).resolve() for row in report.rows}
    rest = [str(sound.relative_to(folder)) for sound in sounds if sound.resolve() not in named]
    if rest:
        report.remarks.append(f"{len(rest)} sounds are in no row and not used ({', '.join(rest[:3])})")


def utterances(
    report: TextReport, audio_column: str = "", text_column: str = "", skip_broken: bool = False
) -> list[Utterance]:
    """Every row as an utterance; sounds are opened later.

    Raises:
        InputError: missing columns, or (unless ``skip_broken``) rows without text or sound, by number.
    """
    sounds, words = column_of(report, audio_column, SOUNDS), column_of(report, text_column, TEXTS)
    if not sounds or not words:
        raise InputError(
            f"'{report.source}' has the columns {', '.join(report.columns)}, but training needs 'audio' and 'text': "
            "rename them, or say which is which (audio_column, text_column)."
        )
    place = Path(report.source).expanduser()
    folder = place.absolute() if place.is_dir() else place.absolute().parent

    def one(row: Row) -> Utterance:
        text = row.values.get(words)
        if not isinstance(text, str) or not text.strip():
            raise Unfit(f"'{words}' is empty")
        return Utterance(row.number, _sound(row.values.get(sounds), folder), text.strip())

    made: list[Utterance] = each(report, one, skip_broken)
    unused = [name for name in report.columns if name not in (sounds, words)]
    if unused:
        report.remarks.append(f"the columns {', '.join(unused)} are not used")
    return made


def _sound(value: Any, folder: Path) -> Path | bytes:
    if isinstance(value, Mapping):  # as data sets keep it
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value.strip():
        raise Unfit("it has no sound")
    place = folder / Path(value).expanduser()
    if not place.is_file():
        raise Unfit(f"there is no sound '{value}'")
    return place
