"""Runs several compositions for jobs that show them together; those that cannot be made are left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import Cancelled, StudioError
from adapters.progress import Monitor, check, part
from studio.composition import job
from studio.composition.schema import ComposeConfig

logger = logging.getLogger("studio.composition.series")


@dataclass(frozen=True)
class One:
    """A composition of a series: its title and the folder of its picture."""

    title: str
    config: ComposeConfig
    folder: Path


def remarks(results: Mapping[Any, dict[str, Any]]) -> list[str]:
    """What the compositions say of their pictures, each sentence once."""
    return list(dict.fromkeys(remark for result in results.values() for remark in result["remarks"]))


def run(wanted: Mapping[Any, One], monitor: Monitor) -> tuple[dict[Any, dict[str, Any]], dict[Any, str]]:
    """(results of :func:`studio.composition.job.run`, reasons why the others were left out), by the keys of ``wanted``.

    Raises:
        adapters.errors.Cancelled: ``monitor`` asked to stop; finished pictures are kept.
    """
    made: dict[Any, dict[str, Any]] = {}
    skipped: dict[Any, str] = {}
    for number, (key, one) in enumerate(wanted.items()):
        check(monitor)
        one.folder.mkdir(parents=True, exist_ok=True)
        try:
            made[key] = job.run(one.config, one.folder, part(monitor, number, len(wanted), one.title))
        except Cancelled:
            raise
        except StudioError as error:
            logger.warning("%s left out: %s", one.title, error)
            skipped[key] = str(error)
    return made, skipped
