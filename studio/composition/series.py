"""Runs several compositions for jobs that show them together; those that cannot be made are left out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
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


def run(
    wanted: Mapping[Any, One], monitor: Monitor, batch: int = 1
) -> tuple[dict[Any, dict[str, Any]], dict[Any, str]]:
    """(results of :func:`studio.composition.job.run`, reasons why the others were left out), by the keys of ``wanted``.

    Args:
        batch: pictures made in one pass, if they differ only in what pictures of a batch may differ in.

    Raises:
        adapters.errors.Cancelled: ``monitor`` asked to stop; finished pictures are kept.
    """
    made: dict[Any, dict[str, Any]] = {}
    skipped: dict[Any, str] = {}
    groups = list(_groups(wanted, batch))
    for number, group in enumerate(groups):
        check(monitor)
        inside = part(monitor, number, len(groups))
        for one in group.values():
            one.folder.mkdir(parents=True, exist_ok=True)
        made |= _together(group, inside)
        for place, (key, one) in enumerate(group.items()):
            if key in made:
                continue
            check(monitor)
            try:
                made[key] = job.run(one.config, one.folder, part(inside, place, len(group), one.title))
            except Cancelled:
                raise
            except StudioError as error:
                logger.warning("%s left out: %s", one.title, error)
                skipped[key] = str(error)
    return {key: made[key] for key in wanted if key in made}, skipped


def _groups(wanted: Mapping[Any, One], batch: int) -> Iterator[dict[Any, One]]:
    """The compositions in groups of up to ``batch`` that may share a pass."""
    alike: dict[Any, list[Any]] = {}
    for key, one in wanted.items():
        alike.setdefault(repr(job.shared(one.config)) if batch > 1 else key, []).append(key)
    for keys in alike.values():
        for begin in range(0, len(keys), batch):
            yield {key: wanted[key] for key in keys[begin : begin + batch]}


def _together(group: Mapping[Any, One], monitor: Monitor) -> dict[Any, dict[str, Any]]:
    """The results of a group of several that can be made in one pass, else nothing."""
    if len(group) < 2:
        return {}
    configs, folders = [one.config for one in group.values()], [one.folder for one in group.values()]
    try:
        results = job.run_together(configs, folders, monitor)
    except Cancelled:
        raise
    except StudioError as error:
        logger.info("one by one: %s", error)
        return {}
    return dict(zip(group, results, strict=True))
