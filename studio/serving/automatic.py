"""Which adapter suits a request: the model "auto".

Every adapter is described by its name, its card and, if this studio trained it, the rows of that training, where they
are still to be read. A request's words and groups of letters are compared with each description (weights: tf-idf;
cosine with each of the description's texts). With s_a the mean of the three most similar texts of adapter a, times the
share of the request's words and groups that any description has, the confidence of the best is

    sqrt(2 s_1 / (s_1 + s_2) - 1) min(1, s_1 / FAMILIAR)

so a request that is equally near to two adapters, or near to none, is left to the base.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from adapters.errors import InputError
from studio.datasets import texts
from studio.datasets.texts import Row
from studio.library import Record
from studio.serving.adapters import Adapters

FAMILIAR = 0.15
"""Similarity from which a text counts as of an adapter's kind."""

ROWS = 200
"""Rows of a training that are read."""

JOBS = 1000
"""Newest jobs among which trainings are looked for."""

NEAREST = 3

_log = logging.getLogger(__name__)
_WORD = re.compile(r"[^\W_]+")

Vector = Mapping[str, float]


def features(text: str) -> Counter[str]:
    """Words, pairs of words, and groups of three to five letters, with counts."""
    words = _WORD.findall(text.lower())[:400]
    found = Counter(f"w:{word}" for word in words)
    found.update(f"p:{first} {second}" for first, second in pairwise(words))
    for word in words:
        padded = f" {word} "
        found.update(f"c:{padded[at : at + size]}" for size in (3, 4, 5) for at in range(len(padded) - size + 1))
    return found


@dataclass
class Index:
    """Descriptions to compare with.

    Args:
        texts: adapter -> texts that describe it.
    """

    texts: Mapping[str, Sequence[str]]
    _vectors: dict[str, list[Vector]] = field(default_factory=dict)
    _rarity: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counted = {name: [features(text) for text in texts] for name, texts in self.texts.items()}
        spread = Counter(one for parts in counted.values() for part in parts for one in part)
        total = sum(map(len, counted.values()))
        self._rarity = {one: math.log((1 + total) / (1 + number)) + 1 for one, number in spread.items()}
        self._vectors = {name: [self._vector(part) for part in parts] for name, parts in counted.items()}

    def _vector(self, counts: Mapping[str, int]) -> Vector:
        weights = {one: (1 + math.log(number)) * self._rarity[one] for one, number in counts.items()
                   if one in self._rarity}  # fmt: skip
        size = math.sqrt(sum(value * value for value in weights.values()))
        return {one: value / size for one, value in weights.items()} if size else {}

    def similarities(self, text: str) -> dict[str, float]:
        """Adapter -> 0 (nothing in common) to 1, the most similar first."""
        counts = features(text)
        asked = self._vector(counts)
        known = sum(number for one, number in counts.items() if one in self._rarity) / max(sum(counts.values()), 1)
        found = {}
        for name, vectors in self._vectors.items():
            each = sorted((_dot(asked, vector) for vector in vectors), reverse=True)[:NEAREST]
            found[name] = known * sum(each) / len(each) if each else 0.0
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def best(self, text: str) -> tuple[str, float]:
        """The adapter that suits best, and the confidence from 0 to 1; "" if there is none."""
        ranked = list(self.similarities(text).items())
        if not ranked or not ranked[0][1]:
            return "", 0.0
        (name, first), second = ranked[0], ranked[1][1] if len(ranked) > 1 else 0.0
        return name, (2 * first / (first + second) - 1 if second else 1.0) ** 0.5 * min(1.0, first / FAMILIAR)


def _dot(first: Vector, second: Vector) -> float:
    small, large = (first, second) if len(first) < len(second) else (second, first)
    return sum(value * large[one] for one, value in small.items() if one in large)


def described(record: Record, rows: str = "") -> list[str]:
    """Texts that tell what an adapter is for: name and card, and what the file ``rows`` of its training asks."""
    notes = " ".join(str(record.notes.get(name) or "") for name in ("description", "example"))
    found = [f"{record.name.replace('-', ' ').replace('_', ' ')} {' '.join(record.triggers)} {notes}"]
    return [*found, *_rows(rows)]


def trained_on() -> dict[str, str]:
    """Name in the library, or path, of an adapter -> the file of rows, for the trainings of this studio.

    A recipe in the adapter's own file does not count: whoever made the file chooses what it says.
    """
    from studio import jobs

    found: dict[str, str] = {}
    for job in jobs.list(JOBS):
        data, result = str(job.config.get("data") or ""), job.result or {}
        for made in (result.get("library"), result.get("adapter")):
            if data and isinstance(made, str):
                found.setdefault(made, data)
    return found


def _rows(source: str) -> Iterator[str]:
    """What the rows of a training ask, if their file is still there."""
    if not source or not Path(source).expanduser().is_file():
        return
    try:
        rows = texts.scan(source).rows
    except InputError:
        return
    for row in rows[:ROWS]:
        yield _question(row)


def _question(row: Row) -> str:
    """What a row asks, without its answer."""
    for name in ("messages", "conversations"):
        if isinstance(talk := row.values.get(name), list):
            turns = [turn for turn in talk if isinstance(turn, Mapping)]
            asked = [turn for turn in turns if (turn.get("role") or turn.get("from")) in ("user", "human")]
            return " ".join(str(turn.get("content") or turn.get("value") or "") for turn in asked)
    for name in ("prompt", "instruction", "question", "text", "input"):
        if isinstance(text := row.values.get(name), str) and text:
            return text
    return " ".join(str(value) for value in row.values.values())


def _file_of(record: Record, files: Mapping[str, str]) -> str:
    """The rows of a record; a name counts in the library only, where it is one adapter's."""
    return files.get(str(record.path)) or (files.get(record.name, "") if record.source == "library" else "")


class Chooser:
    """Chooses among the adapters of a server; descriptions are read again when the adapters change.

    Args:
        threshold: confidence below which the base answers.
    """

    def __init__(self, adapters: Adapters, threshold: float = 0.5) -> None:
        self.adapters, self.threshold = adapters, threshold
        self._lock = threading.Lock()
        self._known: Sequence[Record] | None = None
        self._index = Index({})

    def __call__(self, text: str) -> str:
        """The name of the adapter for ``text``, or of the base."""
        records = self.adapters.records()
        with self._lock:
            if records is not self._known:
                files = trained_on()
                self._index = Index({one.name: described(one, _file_of(one, files)) for one in records})
                self._known = records
            name, confidence = self._index.best(text)
        _log.debug("auto: %r with confidence %.2f", name, confidence)
        return name if name and confidence >= self.threshold else self.adapters.base
