"""Reads the pictures and labels of a classifier's training, and finds its base, without torch."""

from __future__ import annotations

from pathlib import Path

from adapters.errors import InputError
from pipelines.vision.labels import known_labels
from studio.datasets.labelled_pictures import digest, labelled
from studio.training.language.rows import Rows, gather
from studio.training.schemas.classifier import TrainClassifierConfig

EMBEDDED = {"emoji-vit": "models/emoji-vit", "emoji-mixer": "models/emoji-mixer"}
"""Classifiers that come with the studio."""


def read(config: TrainClassifierConfig) -> Rows:
    """The rows of the job with their labels.

    Raises:
        InputError: as :func:`studio.training.language.rows.gather`, fewer than two labels, or a label that is not
            among those named.
    """
    rows = gather(config, lambda report: labelled(report, config.image_column, config.label_column, config.skip_broken))
    everything = [*rows.shown, *rows.held_out]
    found = sorted({row.label for row in everything})
    own = known_labels(source_of(config.base))
    rows.labels = list(config.labels) or (own if set(found) <= set(own) else found)
    strange = [label for label in found if label not in rows.labels]
    if strange:
        raise InputError(f"The label '{strange[0]}' of the data is not in labels ({', '.join(rows.labels)}).")
    if len(rows.labels) < 2:
        raise InputError(f"'{config.data}' has only one label ('{rows.labels[0]}'): classification needs at least two.")
    rows.digest = digest(everything)
    return rows


def source_of(base: str) -> str:
    """Where a base is: an embedded one by name, a directory, or a hub id unchanged.

    Raises:
        InputError: there is none.
    """
    if base in EMBEDDED:
        import assets

        try:
            return str(assets.path(EMBEDDED[base]))
        except FileNotFoundError:
            raise InputError(f"The embedded model '{base}' is not in this installation: give a directory.") from None
    if Path(base).expanduser().is_dir():
        return str(Path(base).expanduser())
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):
        return base
    raise InputError(f"There is no classifier '{base}': use {', '.join(EMBEDDED)}, a directory or a hub id.")
