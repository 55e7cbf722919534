"""Jobs on intruder dimensions: an adapter's forgetting curve, and softened copies of it in the library."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import files
from adapters.progress import Monitor, Progress
from studio import library
from studio.inspection import intruders
from studio.inspection.schema import ForgettingConfig, SoftenConfig
from studio.library import adopt

if TYPE_CHECKING:
    from adapters.formats import LoraFile

CURVE = "forgetting.csv"


def measure(config: ForgettingConfig, folder: Path, monitor: Monitor) -> dict[str, Any]:
    """Losses on old (and new) data over lambda, each with its control; also written to ``forgetting.csv``.

    Raises:
        adapters.errors.InputError: an adapter, base or data that cannot be used.
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    monitor.report(Progress("loading"))
    rows = intruders.forgetting(
        config.adapter, config.base, config.old, config.new, config.strengths, config.k, config.eps, monitor
    )
    text = io.StringIO()
    names = list(rows[0].losses)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "factor", "norm", *names])
    writer.writerows([row.variant, row.strength, row.norm, *(row.losses[name] for name in names)] for row in rows)
    files.write_text(folder / CURVE, text.getvalue())
    return {"rows": [asdict(row) for row in rows], "table": str(folder / CURVE)}


def soften(config: SoftenConfig, folder: Path, monitor: Monitor) -> dict[str, Any]:
    """Add to the library the adapter with its intruders scaled, and the control (shrunk to the same size).

    Raises:
        adapters.errors.InputError: an adapter or base that cannot be used, a DoRA adapter.
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    monitor.report(Progress("loading"))
    made, control, facts = intruders.soften(
        config.adapter, config.base, config.strength, config.k, config.eps, config.recompress, monitor
    )
    monitor.report(Progress("saving"))
    parent = Path(config.adapter).stem if Path(config.adapter).exists() else config.adapter
    names = {
        "library": f"{parent} softened {config.strength:g}",
        "library_control": f"{parent} shrunk {facts['control_factor']:.2f}",
    }
    kept = {}
    for (key, name), file in zip(names.items(), (made, control), strict=True):
        free = adopt.free_name(name)
        kept[key] = library.import_adapter(_write(file, folder / free), free).name
    return {**facts, **kept}


def _write(file: LoraFile, place: Path) -> Path:
    """A PEFT folder for a language model's adapter, else one .safetensors file."""
    from adapters.formats import write_diffusers, write_peft
    from adapters.formats.lora import MODEL

    if set(file.parts) == {MODEL}:
        return write_peft(file, place)
    return write_diffusers(file, place.with_name(f"{place.name}.safetensors"))
