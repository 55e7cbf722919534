"""The loss curve of a run: ``loss.csv`` in its folder, and an accelerate tracker if one is wanted."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.errors import InputError, MissingDependencyError
from adapters.files import whole

COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "validation_loss", "seconds")
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "comet_ml": "comet_ml", "aim": "aim"}


class LossCurve:
    """Rows of ``loss.csv``, one per step.

    Args:
        file: its path; rows after ``start`` (steps a resumed run repeats) are dropped.
    """

    def __init__(self, file: Path, start: int) -> None:
        self.file = file
        rows = [row for row in read_curve(file) if int(row["step"]) <= start] if start else []
        with whole(file) as part, part.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    def add(self, **values: Any) -> None:
        """Append one row; missing columns stay empty."""
        try:
            with self.file.open("a", newline="", encoding="utf-8") as handle:
                csv.DictWriter(handle, COLUMNS).writerow(values)
        except OSError as error:
            raise InputError(f"'{self.file}' could not be written ({error.strerror}).") from None


PARTS = 4
"""How many times a run samples and saves by default, its end included."""


def due(step: int, every: int | None, total: int = 0) -> bool:
    """Whether something done every ``every`` steps (0 = never) is due after this one; None: at each quarter of
    ``total`` steps."""
    if every is None:
        return PARTS * step // total > PARTS * (step - 1) // total
    return every > 0 and step % every == 0


def recent(losses: Sequence[float]) -> float:
    """Mean of the last tenth: where a run has arrived."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / max(1, len(last))


def read_curve(file: Path) -> list[dict[str, str]]:
    """The rows of a loss curve (empty when there is none)."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def check_tracker(name: str) -> None:
    """Raise :class:`MissingDependencyError` when the tracker's package is not installed."""
    package = PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        if name == "tensorboard":
            raise MissingDependencyError(package, "tensorboard", "The tracker 'tensorboard'")
        raise InputError(f"The tracker '{name}' is not installed: run  pip install {package}  or choose another.")
