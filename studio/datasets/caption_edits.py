"""Edits the captions of a whole set (one for all, find and replace, tags) and writes them beside the pictures.

Edits are functions from captions (name of the picture -> text, "" = none) to captions, shared by pages and commands.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from adapters.errors import InputError
from adapters.files import whole
from studio.datasets.captions import METADATA, one_line, read_captions
from studio.datasets.folders import shown, walk
from studio.datasets.pictures import is_picture

Captions = dict[str, str]


def tags_of(caption: str) -> list[str]:
    """The parts of a caption between commas, without empty ones."""
    return [part.strip() for part in caption.split(",") if part.strip()]


def tag_counts(captions: Mapping[str, str]) -> list[tuple[str, int]]:
    """Every tag with the number of captions that have it, most frequent first, then by name."""
    counts = Counter(tag for caption in captions.values() for tag in set(tags_of(caption)))
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def same_for_all(captions: Mapping[str, str], text: str, only_missing: bool = False) -> Captions:
    """``text`` as every caption, or (``only_missing``) where there is none."""
    return {name: old if only_missing and old else one_line(text) for name, old in captions.items()}


def replaced(captions: Mapping[str, str], find: str, put: str, whole_words: bool = False) -> Captions:
    """Replace ``find`` by ``put`` in every caption; with ``whole_words`` never inside a longer word.

    Raises:
        InputError: ``find`` is empty.
    """
    if not find:
        raise InputError("There is nothing to find: say which words to replace.")
    pattern = re.compile(rf"(?<!\w){re.escape(find)}(?!\w)" if whole_words else re.escape(find))
    return {name: one_line(pattern.sub(lambda _: put, caption)) for name, caption in captions.items()}


def with_tags(captions: Mapping[str, str], tags: Sequence[str]) -> Captions:
    """Append ``tags`` to every caption that does not have them."""
    made = {}
    for name, caption in captions.items():
        new = [tag for tag in tags if tag not in tags_of(caption)]
        made[name] = ", ".join([*([caption.rstrip(" ,")] if caption.strip(" ,") else []), *new]) if new else caption
    return made


def without_tags(captions: Mapping[str, str], tags: Sequence[str]) -> Captions:
    """Every caption without ``tags``; captions that have none of them stay as they are."""
    return {
        name: ", ".join(tag for tag in tags_of(caption) if tag not in tags)
        if any(tag in tags for tag in tags_of(caption)) else caption
        for name, caption in captions.items()
    }  # fmt: skip


def read_folder(folder: Path) -> Captions:
    """Caption by name (its path below ``folder``) of every picture, "" where there is none.

    Raises:
        InputError: the folder does not exist, or captions cannot be read.
    """
    tree = walk(folder)
    files = [file for file in tree.files if is_picture(file)]
    texts = read_captions(folder, files, tree.files).texts
    return {file.relative_to(folder).as_posix(): texts.get(file, "") for file in files}


def write_folder(folder: Path, captions: Mapping[str, str]) -> list[Path]:
    """Write the captions that differ from those in ``folder``; returns the files that were written.

    An existing caption file is rewritten; a picture without one gets ``NAME.txt`` (``NAME.png.txt`` if another picture
    differs only in its extension).

    Raises:
        InputError: a caption to change is in metadata, names a missing picture, or cannot be written.
    """
    tree = walk(folder)
    files = [file for file in tree.files if is_picture(file)]
    found = read_captions(folder, files, tree.files)
    known = {file.relative_to(folder).as_posix(): file for file in files}
    strange = [name for name in captions if name not in known]
    if strange:
        raise InputError(f"There is no picture '{shown(strange[0])}' in '{shown(str(folder))}'.")
    changed = {known[name]: text for name, text in captions.items() if text != found.texts.get(known[name], "")}
    listed = [file for file in changed if found.sources.get(file, file).name in METADATA]
    if listed:
        source = found.sources[listed[0]]
        raise InputError(
            f"{len(listed)} of these captions are in '{shown(str(source))}', which overrides files beside the "
            "pictures: edit them there, or move that file away."
        )
    stems = Counter(file.with_suffix("") for file in files)
    written = []
    for file, text in changed.items():
        new = Path(f"{file}.txt") if stems[file.with_suffix("")] > 1 else file.with_suffix(".txt")
        target = found.sources.get(file, new)
        with whole(target) as part:
            part.write_text(text + "\n", encoding="utf-8")
        written.append(target)
    return written
