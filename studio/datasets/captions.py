"""Captions: where they are read from, and how they become the prompts of a training."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import InputError
from studio.datasets.folders import shown

COLUMNS = ("text", "caption", "prompt")
"""Columns of metadata.jsonl and metadata.csv that may hold the caption."""

ENDINGS = (".txt", ".caption", ".cap", ".tags")
"""Extensions (in lower case) of files with the caption of the picture of the same name, in order of precedence."""

METADATA = ("metadata.jsonl", "metadata.csv")

# Longer byte order marks first: UTF-32's begins like UTF-16's.
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"),
          (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))  # fmt: skip
_SHOWN = 5


@dataclass
class Captions:
    """Caption by picture, the file it comes from, all caption files, and sentences on what was not used."""

    texts: dict[Path, str] = field(default_factory=dict)
    sources: dict[Path, Path] = field(default_factory=dict)
    files: set[Path] = field(default_factory=set)
    remarks: list[str] = field(default_factory=list)


def read_captions(folder: Path, pictures: Sequence[Path], files: Sequence[Path]) -> Captions:
    """The captions of ``pictures`` among ``files``, all of them below ``folder``.

    ``metadata.jsonl`` or ``metadata.csv`` (in the folder or below it, with names relative to its own place) comes
    first; pictures it does not list take a file beside them: ``NAME.png.txt`` or ``NAME.txt``, with any of
    :data:`ENDINGS`. White space, including line breaks, becomes single spaces.

    Raises:
        InputError: captions that cannot be read, or metadata that names missing pictures.
    """
    made = Captions()
    listed = _read_metadata(folder, pictures, files, made)
    beside: dict[Path, list[Path]] = {}
    for file in files:
        if is_caption(file):
            beside.setdefault(file.with_suffix(""), []).append(file)
    for picture in pictures:
        own = [*_ranked(beside.get(picture, ())), *_ranked(beside.get(picture.with_suffix(""), ()))]
        made.files.update(own)
        text = listed.get(picture)
        if text is None and own:
            text, made.sources[picture] = read_text(own[0]), own[0]
            _name_others(picture, own, made)
        if text is not None and text.strip():
            made.texts[picture] = one_line(text)
    return made


def is_caption(file: Path) -> bool:
    """Whether the file has the extension of a caption."""
    return file.suffix.lower() in ENDINGS


def one_line(text: str) -> str:
    """The text with single spaces for any run of white space."""
    return " ".join(text.split())


def _ranked(files: Sequence[Path]) -> list[Path]:
    return sorted(files, key=lambda file: (ENDINGS.index(file.suffix.lower()), file.name))


def _name_others(picture: Path, own: Sequence[Path], made: Captions) -> None:
    texts = {one_line(read_text(file)) for file in own}
    if len(texts) > 1:
        names = ", ".join(shown(file.name) for file in own[1:])
        made.remarks.append(f"{shown(picture.name)} takes its caption from {shown(own[0].name)}, not from {names}")


def _read_metadata(folder: Path, pictures: Sequence[Path], files: Sequence[Path], made: Captions) -> dict[Path, str]:
    """Caption by picture; a file deeper in the tree takes precedence."""
    known = set(pictures)
    by_folder: dict[Path, list[Path]] = {}
    for file in files:
        if file.name in METADATA:
            by_folder.setdefault(file.parent, []).append(file)
    listed: dict[Path, str] = {}
    for place, found in sorted(by_folder.items(), key=lambda item: len(item[0].parts)):
        used, *others = sorted(found, key=lambda file: METADATA.index(file.name))
        made.files.update(found)
        made.remarks += [f"{shown(str(o.relative_to(folder)))} is not read: {used.name} is" for o in others]
        texts = {place / name: text for name, text in read_metadata(used).items()}
        strange = sorted(shown(file.relative_to(place).as_posix()) for file in texts if file not in known)
        if strange:
            raise InputError(
                f"The captions in '{shown(str(place))}' name {len(strange)} pictures that are not there: "
                f"{', '.join(strange[:_SHOWN])}."
            )
        listed |= texts
        made.sources |= dict.fromkeys(texts, used)
    return listed


def read_metadata(file: Path) -> dict[str, str]:
    """Caption by file name of a ``metadata.jsonl`` or ``metadata.csv``.

    Raises:
        InputError: it cannot be read, or a line does not give file_name and text.
    """
    rows: dict[str, str] = {}
    for number, row in (_json_rows if file.suffix == ".jsonl" else _csv_rows)(file):
        name = row.get("file_name")
        text = next((row[column] for column in COLUMNS if row.get(column) is not None), None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise InputError(f"Line {number} of '{shown(str(file))}' must give file_name and text.")
        rows[Path(name).as_posix()] = text
    return rows


def _json_rows(file: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    # JSON lines end at \n alone: other line-ending characters may occur inside a text.
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"Line {number} of '{shown(str(file))}' is not JSON: {error}.") from None
        yield number, row if isinstance(row, dict) else {}


def _csv_rows(file: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    reader = csv.DictReader(io.StringIO(read_text(file), newline=""))
    try:
        begun = reader.line_num + 1
        for row in reader:
            yield max(begun, 2), row
            begun = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"Line {reader.line_num} of '{shown(str(file))}' is not CSV: {error}.") from None


def read_text(file: Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises:
        InputError: it cannot be read, or is in another encoding.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"'{shown(str(file))}' cannot be read: {error.strerror}.") from None
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        raise InputError(f"'{shown(str(file))}' is not a UTF-8 text file: save it as UTF-8.") from None


def compose_caption(
    caption: str | None, *, template: str = "{caption}", instance_prompt: str = "", trigger: str = "", prefix: str = ""
) -> str:
    """The prompt a picture is trained with.

    A caption goes through ``template``, a missing one is replaced by ``instance_prompt``; a trigger word that the
    result lacks (as a word of its own) is put in front; ``prefix`` comes before everything.
    """
    pattern = template if caption is not None else instance_prompt
    text = pattern.replace("{caption}", caption or "").replace("{trigger}", trigger).strip()
    if trigger and not _has_word(text, trigger):
        text = f"{trigger}, {text}" if text else trigger
    return f"{prefix}{text}"


def _has_word(text: str, word: str) -> bool:
    """Whether ``text`` contains ``word`` by itself, not inside a longer word."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def vary_caption(
    caption: str, rng: random.Random, *, dropout: float = 0.0, shuffle: bool = False, keep: int = 1
) -> str:
    """Drop the caption with probability ``dropout``; shuffle its comma-separated parts after the first ``keep``.

    Empty parts (a comma at the end, two in a row) are dropped before shuffling.
    """
    if dropout and rng.random() < dropout:
        return ""
    if not shuffle:
        return caption
    parts = [part.strip() for part in caption.split(",") if part.strip()]
    moving = parts[keep:]
    rng.shuffle(moving)
    return ", ".join(parts[:keep] + moving)
