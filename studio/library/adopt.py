"""Adds what a training job made to the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from studio import error_sentences
from studio.library import edit, facts, scan
from studio.schema import JobConfig


def trained(config: JobConfig, result: dict[str, Any]) -> dict[str, Any]:
    """Copy the adapter of ``result`` (or the whole model it is) into the library, with its last sample as preview.

    Returns ``result`` with ``library``, its name there, or ``library_problem``, why it could not be copied; the
    adapter stays in the job's folder either way.
    """
    wanted = str(getattr(config, "name", ""))
    whole = facts.is_language_model(Path(str(result.get("adapter"))))
    try:
        if whole:
            record = edit.import_base(result["adapter"], free_name(wanted, "base"))
        else:
            record = edit.import_adapter(result["adapter"], free_name(wanted or "adapter"))
        samples = [Path(sample) for sample in result.get("samples") or [] if Path(sample).is_file()]
        if samples:
            edit.set_preview(record, samples[-1])
    except Exception as error:  # whatever goes wrong here, the training is done
        return {**result, "library_problem": error_sentences.sentence(error)}
    return {**result, "library": record.name}


def free_name(wanted: str, kind: scan.Kind = "adapter") -> str:
    """``wanted`` as a name the library allows and does not have yet (``wanted-2``, ...)."""
    name = (
        "".join(letter if letter.isalnum() or letter in " .+()_-" else "-" for letter in wanted).strip(" .")
        or kind
    )
    taken = {record.name.lower() for record in scan.records(kind)}
    number, free = 2, name
    while free.lower() in taken:
        free, number = f"{name}-{number}", number + 1
    return free
