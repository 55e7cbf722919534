"""Adapters that a training saved during and at the end of a run, and how to add one to the library."""

from __future__ import annotations

import re
from pathlib import Path

from adapters.errors import InputError
from studio import library
from studio.jobs import Job
from studio.library import adopt, edit


def steps(job: Job) -> dict[int, Path]:
    """Step -> adapter (a file, or a PEFT directory), in order: those of ``saved/`` and, last, the finished one."""
    name = str(job.config.get("name") or "")
    found: dict[int, Path] = {}
    for place in sorted((job.folder / "saved").glob("*")):
        match = re.fullmatch(rf"{re.escape(name)}-(\d{{6,}})(\.safetensors)?", place.name)
        if match:
            found[int(match[1])] = place
    result = job.result or {}
    if result.get("adapter") and Path(result["adapter"]).exists():
        found[int(result.get("steps") or 0)] = Path(result["adapter"])
    return dict(sorted(found.items()))


def keep(job: Job, step: int | None = None, name: str = "") -> library.Record:
    """Add the adapter of a step (by default the latest) to the library, with that step's sample as its preview.

    An adapter that the library has already stays as it is.

    Raises:
        InputError: nothing is saved of that step.
    """
    known = steps(job)
    if not known:
        raise InputError(f"Job {job.id} has saved no adapter yet.")
    chosen = max(known) if step is None else step
    if chosen not in known:
        raise InputError(f"Job {job.id} has saved no adapter at step {chosen}: there are {', '.join(map(str, known))}.")
    if not name and (record := _in_library(known[chosen])):
        return record
    finished = str(known[chosen]) == str((job.result or {}).get("adapter"))
    own = str(job.config.get("name") or "adapter")
    record = library.import_adapter(known[chosen], name or adopt.free_name(own if finished else f"{own}-step-{chosen}"))
    drawn = [file for file in sorted((job.folder / "samples").glob("step-*-0.png")) if step_of(file) <= chosen]
    if drawn:
        edit.set_preview(record, drawn[-1])
    return library.find(record.name)


def _in_library(place: Path) -> library.Record | None:
    """The library's adapter with the same content; files of another size are not read."""
    digest = library.sha256(place)
    for record in library.adapters():
        other = not place.is_dir() and record.size != place.stat().st_size
        if record.problem or record.source != "library" or other:
            continue
        if library.sha256(record.path) == digest:
            return record
    return None


def step_of(file: Path) -> int:
    """The step in a sample's name (``step-000050-0.png``)."""
    found = re.match(r"step-(\d+)", file.stem)
    return int(found.group(1)) if found else 0
