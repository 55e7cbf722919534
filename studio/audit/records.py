"""Verdicts that the library shows: by the hash of the adapter, so that one which has changed has none."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from studio import database
from studio.library import cache

_TABLES = """
create table if not exists audits (sha256 text primary key, verdict text not null, base text not null,
    report text not null, finished real not null);
"""


@dataclass(frozen=True)
class Audited:
    """The last audit of an adapter: verdict, base, report and when it was done (seconds since the epoch)."""

    verdict: str
    base: str
    report: Path
    finished: float


def remember(adapter: Path, verdict: str, base: str, report: Path) -> None:
    """Keep the verdict on the adapter at this path, as it is now."""
    database.connection("audits.db", _TABLES).execute(
        "insert or replace into audits values (?, ?, ?, ?, ?)",
        (cache.sha256(adapter), verdict, base, str(report), time.time()),
    )


def latest(adapter: Path) -> Audited | None:
    """The last audit of the adapter at this path, if its hash is known and it has not changed since."""
    digest = cache.known_sha256(adapter)
    if digest is None:
        return None
    row = database.connection("audits.db", _TABLES).execute(
        "select verdict, base, report, finished from audits where sha256 = ?", (digest,)
    ).fetchone()  # fmt: skip
    return Audited(row["verdict"], row["base"], Path(row["report"]), row["finished"]) if row else None
