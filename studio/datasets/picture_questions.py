"""Rows of pictures with questions and answers, as a vision-language model learns them.

A row has a picture (a path relative to the file, several of them, or the bytes that data sets keep) with a question and
an answer, or a conversation of ``messages`` in which pictures stand as parts or as ``<image>``. Everything a language
row may have (:mod:`studio.datasets.conversations`) is read the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import InputError
from pipelines import pictures
from pipelines.multimodal.messages import PLACE
from studio.datasets.conversations import (
    MESSAGES,
    PROMPTS,
    Columns,
    Conversation,
    Unfit,
    column_of,
    conversations,
    each,
)
from studio.datasets.texts import Row, TextReport, on_hub

IMAGES = ("image", "images", "image_path", "picture", "pictures", "file_name", "img")
MARK = "<image>"
"""What rows write where a picture belongs."""

_PICTURE_PARTS = ("image", "image_url", "input_image")
_TEXT_PARTS = ("text", "input_text")


@dataclass(frozen=True)
class Picture:
    """A picture of a row: where its file is, or what the data set holds instead of a file."""

    path: Path | None = None
    content: Any = None

    @property
    def name(self) -> str:
        return self.path.name if self.path is not None else ""

    def open(self) -> Any:
        """The picture as RGB; raises :class:`pipelines.pictures.PictureError`."""
        if self.path is not None:
            return pictures.open_picture(self.path)
        return pictures.open_picture(self.content) if isinstance(self.content, bytes) else pictures.to_rgb(self.content)

    def digest(self) -> str:
        """SHA-256 of the file, or of the pixels of a picture without one."""
        kept = self.path.read_bytes() if self.path is not None else self.content
        return hashlib.sha256(kept if isinstance(kept, bytes) else kept.tobytes()).hexdigest()


@dataclass(frozen=True)
class Pictured:
    """A conversation with its pictures, in the order of their places (:data:`~pipelines.multimodal.messages.PLACE`)."""

    talk: Conversation
    pictures: tuple[Picture, ...]

    @property
    def number(self) -> int:
        return self.talk.number


def without_places(text: str) -> str:
    """A text of a :class:`Pictured` row without the marks of its pictures' places."""
    return text.replace(PLACE, "")


def pictured(
    report: TextReport, columns: Columns, image_column: str = "", system: str = "", skip_broken: bool = False
) -> list[Pictured]:
    """Every row as a conversation about its pictures; what is not used is named in ``report.remarks``.

    Args:
        image_column: column of the picture's path; empty = one of the usual names.

    Raises:
        InputError: missing columns, or (unless ``skip_broken``) rows that cannot be used, by number: no picture, no
            such file, places and pictures that do not match, an address on the network.
    """
    images = column_of(report, image_column, IMAGES)
    talks = column_of(report, columns.messages, MESSAGES)
    asked = column_of(report, columns.prompt, PROMPTS)
    if not talks and not (images and asked):
        raise InputError(
            f"'{report.source}' has the columns {', '.join(report.columns)}, but training needs 'image', 'question' "
            "and 'answer', or 'messages' with pictures: rename them, or say which is which (image_column, "
            "question_column ...)."
        )
    folder = None if on_hub(report.source) else Path(report.source).expanduser().absolute().parent
    found: dict[int, tuple[Picture, ...]] = {}

    def placed(row: Row) -> Row:
        values = dict(row.values)
        given = [_picture(one, folder) for one in _listed(values.pop(images, None) if images else None)]
        row_pictures = _Pictures(given, folder)
        if talks:
            values[talks] = _in_messages(values.get(talks), row_pictures)
        else:
            values[asked] = _in_question(values.get(asked), row_pictures)
        found[row.number] = row_pictures.finished()
        return Row(row.number, values)

    report.rows = each(report, placed, skip_broken)
    made = conversations(report, columns, system, skip_broken)
    if not all(isinstance(item, Conversation) for item in made):
        raise InputError(f"'{report.source}' has no answers: rows need 'question' and 'answer', or 'messages'.")
    return [Pictured(item, found[item.number]) for item in made if isinstance(item, Conversation)]


def _listed(value: Any) -> list[Any]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _picture(value: Any, folder: Path | None) -> Picture:
    """One picture as a row names it: a path, a data: URI, bytes, or an open picture."""
    if isinstance(value, Mapping):  # as data sets keep it
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, bytes) or hasattr(value, "tobytes"):
        return Picture(content=value)
    if not isinstance(value, str) or not value.strip():
        raise Unfit(f"the picture is not a path but {type(value).__name__}")
    if pictures.is_uri(value):
        return Picture(content=pictures.content_of(value))
    if "://" in value:
        raise Unfit(f"'{value}' is an address on the network: save the picture beside the file")
    path = Path(value).expanduser()
    path = path if path.is_absolute() or folder is None else folder / path
    if not path.is_file():
        raise Unfit(f"there is no picture '{value}'")
    return Picture(path)


class _Pictures:
    """The pictures of a row while they get their places."""

    def __init__(self, given: list[Picture], folder: Path | None) -> None:
        self.rest, self.folder = list(given), folder
        self.placed: list[Picture] = []

    def take(self) -> str:
        """Place the next of the row's pictures."""
        if not self.rest:
            raise Unfit(f"it has more places ({MARK}) than pictures")
        self.placed.append(self.rest.pop(0))
        return PLACE

    def take_own(self, value: Any) -> str:
        """Place a picture that a message brings itself."""
        self.placed.append(_picture(value, self.folder))
        return PLACE

    def all(self) -> str:
        """Place all that are left, if none has a place yet."""
        return "" if self.placed else "".join(self.take() for _ in list(self.rest))

    def finished(self) -> tuple[Picture, ...]:
        if not self.placed:
            raise Unfit("it has no picture")
        if self.rest:
            raise Unfit(f"{len(self.rest)} of its pictures have no place ({MARK})")
        return tuple(self.placed)


def _in_question(value: Any, given: _Pictures) -> Any:
    if not isinstance(value, str):
        return value
    text = _in_text(value, given)
    return f"{given.all()}{text}"


def _in_messages(turns: Any, given: _Pictures) -> Any:
    """The turns with a place in the text for every picture; pictures without a place come first."""
    if not isinstance(turns, list):
        return turns
    made = [_in_turn(turn, given) for turn in turns]
    if not given.placed:
        for turn in made:
            if isinstance(turn, dict) and str(turn.get("role", turn.get("from", ""))).lower() in ("user", "human"):
                key = "content" if "content" in turn else "value"
                turn[key] = f"{given.all()}{turn.get(key) or ''}"
                break
    return made


def _in_turn(turn: Any, given: _Pictures) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    key = "content" if "content" in turn else "value"
    value = turn.get(key)
    if isinstance(value, list):
        return {**turn, key: "".join(_in_parts(value, given))}
    return {**turn, key: _in_text(value, given)} if isinstance(value, str) else dict(turn)


def _in_parts(parts: list[Any], given: _Pictures) -> Iterator[str]:
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind in _TEXT_PARTS:
            yield _in_text(str(part.get("text") or ""), given)
        elif kind in _PICTURE_PARTS:
            own = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key)), None)
            yield given.take() if own is None else given.take_own(own)
        else:
            raise Unfit(f"a message has a part of type '{kind}': only text and image are read")


def _in_text(text: str, given: _Pictures) -> str:
    if PLACE in text:
        raise Unfit("a text contains U+FFFC, which stands for a picture")
    pieces = text.split(MARK)
    return pieces[0] + "".join(given.take() + piece for piece in pieces[1:])
