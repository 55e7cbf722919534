"""The pictures of compositions: found, filtered, starred and deleted in the jobs' folders.

A picture's own recipe says how it was made; only the list of starred ones is kept beside it, ``starred.json`` in the
job's folder, which is deleted with the job.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from adapters import files
from adapters.errors import InputError
from studio import jobs
from studio.composition import moving, recipe_png
from studio.jobs import Job

KINDS = ("compose", "compare", "sweep")
"""Jobs that make pictures."""

STARRED = "starred.json"
MOST = 500
"""How many jobs are searched, newest first."""


@dataclass(frozen=True)
class Picture:
    """A kept picture and what made it."""

    path: Path
    job: str
    key: str
    """Its unique name: the job's id and the path in the job's folder."""
    created: float
    """Seconds since the epoch."""
    prompt: str
    adapters: tuple[str, ...]
    method: str
    base: str
    seed: int
    starred: bool

    @property
    def video(self) -> Path | None:
        """The video whose picture this is."""
        return moving.video_of(self.path)


def pictures(
    adapter: str = "", method: str = "", base: str = "", starred: bool = False, limit: int = 200
) -> list[Picture]:
    """The kept pictures, newest first; an empty filter matches everything."""
    found: list[Picture] = []
    for picture in _all():
        fits = (not adapter or adapter in picture.adapters) and method in ("", picture.method)
        if fits and base in ("", picture.base) and (picture.starred or not starred):
            found.append(picture)
            if len(found) == limit:
                break
    return found


def find(key: str) -> Picture:
    """The picture of this key; raises :class:`InputError` if there is none (any more)."""
    job_id, _, place = key.partition("/")
    job = jobs.get(job_id)
    path = job.folder / place
    inside = path.resolve().is_relative_to(job.folder.resolve())
    picture = _picture(job, path, _starred(job.folder)) if inside and path.is_file() else None
    if picture is None:
        raise InputError("The picture is no longer there: it or its job was deleted.")
    return picture


def star(key: str, on: bool) -> Picture:
    """Star a picture, or remove its star."""
    picture = find(key)
    folder = jobs.get(picture.job).folder
    place = picture.path.relative_to(folder).as_posix()
    names = (_starred(folder) | {place}) if on else (_starred(folder) - {place})
    files.write_text(folder / STARRED, json.dumps(sorted(names)))
    return find(key)


def delete(key: str) -> None:
    """Delete a picture for good; its job and the other pictures stay."""
    picture = find(key)
    if picture.starred:
        star(key, False)
    if video := picture.video:
        video.unlink()
    picture.path.unlink()


def choices(found: Iterable[Picture]) -> tuple[list[str], list[str], list[str]]:
    """Adapters, methods and bases of the pictures, sorted, for filters."""
    made = list(found)
    adapters = {name for picture in made for name in picture.adapters}
    return sorted(adapters), sorted({picture.method for picture in made}), sorted({picture.base for picture in made})


def files_of(job: Job) -> list[Path]:
    """The pictures in a job's folder, in the order they were made."""
    pattern = "picture-*.png" if job.kind == "compose" else "*/picture-*.png"
    return sorted(job.folder.glob(pattern), key=lambda path: (path.stat().st_mtime, path.name))


def _all() -> Iterator[Picture]:
    made = [job for kind in KINDS for job in jobs.list(MOST, (), kind)]
    for job in sorted(made, key=lambda job: job.created, reverse=True):
        starred = _starred(job.folder)
        yield from filter(None, (_picture(job, path, starred) for path in files_of(job)))


def _picture(job: Job, path: Path, starred: frozenset[str]) -> Picture | None:
    stat = path.stat()
    made_with = _made_with(path, stat.st_mtime_ns)
    if made_with is None:
        return None
    place = path.relative_to(job.folder).as_posix()
    return Picture(path, job.id, f"{job.id}/{place}", stat.st_mtime, *made_with, place in starred)


@lru_cache(maxsize=4096)
def _made_with(path: Path, _changed: int) -> tuple[str, tuple[str, ...], str, str, int] | None:
    """Prompt, adapters, method, base and seed from the picture's recipe; None for one without."""
    try:
        config = recipe_png.read_recipe(path)["config"]
    except InputError:
        return None
    names = tuple(str(use.get("name") or use.get("path")) for use in config.get("adapters") or ())
    return (
        str(config.get("prompt", "")),
        names,
        str(config.get("method", "")),
        str(config.get("base", "")),
        int(config.get("seed", 0)),
    )


def _starred(folder: Path) -> frozenset[str]:
    try:
        return frozenset(map(str, json.loads((folder / STARRED).read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError):
        return frozenset()
