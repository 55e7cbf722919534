"""Who has what, counted: rows and labels of every client, for the command and the page. Torch is not needed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import InputError
from pipelines.pictures import SUFFIXES
from studio.datasets.texts import Row, on_hub, scan, usable_rows
from studio.federation import partition
from studio.federation.clients import column, divided, with_tests
from studio.federation.schema import FederateConfig

LABELS = ("label", "class")
"""Columns that hold labels, if ``by`` names none."""


@dataclass(frozen=True)
class Part:
    """One client's share.

    Attributes:
        rows, tested: how many it trains on, and how many it is measured on.
        labels: label -> how many of the rows it trains on.
    """

    name: str
    rows: int
    tested: int
    labels: dict[str, int] = field(default_factory=dict)

    def text(self) -> str:
        """The labels in words, the most frequent first."""
        return ", ".join(f"{label} {count}" for label, count in Counter(self.labels).most_common())


def parts(config: FederateConfig) -> list[Part]:
    """Every client's share, without writing a file.

    Raises:
        InputError: data that cannot be read or divided.
    """
    if config.clients:
        return [_own(client.name, client.data, client.test) for client in config.clients]
    rows = usable_rows(scan(config.data)).rows
    names, all_rows = divided(config, rows)
    labels = _labels(rows, config.by if config.partition != "column" else "")
    found = []
    for name, (shown, tested) in zip(names, with_tests(config, rows, names, all_rows), strict=True):
        counted = dict(partition.table(labels, [shown])[0]) if labels else {}
        found.append(Part(name, len(shown), len(tested), counted))
    return found


def _own(name: str, data: str, test: str) -> Part:
    """A client with a file, or a folder of pictures, of its own."""
    if on_hub(data):
        return Part(name, 0, 0)
    place = Path(data).expanduser()
    if place.is_dir():
        return Part(name, sum(file.suffix.lower() in SUFFIXES for file in place.rglob("*")), 0)
    rows = usable_rows(scan(data), skip_broken=True).rows
    tested = len(usable_rows(scan(test), skip_broken=True).rows) if test and not on_hub(test) else 0
    labels = _labels(rows)
    return Part(name, len(rows), tested, dict(Counter(labels)))


def _labels(rows: list[Row], by: str = "") -> list[str]:
    for name in (by, *LABELS):
        try:
            if name:
                return column(rows, name, "")
        except InputError:
            continue
    return []
