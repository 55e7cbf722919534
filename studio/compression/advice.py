"""Which way of making a base smaller suits its size, this computer's memory and the rows there are. Loads no torch."""

from __future__ import annotations

from studio import library
from studio.cli.output import size

TRAINING = 4
"""A training needs about so many times the bytes of a base in 16 bits (what is kept for the backward pass included)."""


def of(base: str, rows: bool) -> str:
    """The advice for a base of the library; empty for one that is not there."""
    record = next((one for one in library.bases() if one.name == base or str(one.path) == base), None)
    if record is None or record.notes.get("compressed"):
        return ""
    import psutil

    return sentence(record.name, record.size, int(psutil.virtual_memory().available), rows)


def sentence(name: str, weights: int, free: int, rows: bool) -> str:
    """The advice.

    Args:
        weights: bytes of the base's files.
        free: bytes of memory that are free.
        rows: there is text to learn from.
    """
    told = f"{name} has {size(weights)} of weights, and {size(free)} of memory are free here: "
    if weights > free:
        return told + f"it does not fit. LQ-LoRA reads it piece by piece; a Fit of {0.7 * free / 1e9:.2g} GB fits."
    if TRAINING * weights > free:
        return told + "it fits to run, but hardly to train. " + (
            "LoRAM trains your adapter on a part of it." if rows
            else "With rows of text LoRAM trains an adapter on a part of it; without, LQ-LoRA makes it smaller."
        )  # fmt: skip
    return told + "it fits. " + (
        "LQ-LoRA keeps what matters for your rows in fewer bytes; LoRAPrune also makes it faster."
        if rows else "LQ-LoRA needs no rows, and saves the most bytes for the least loss."
    )  # fmt: skip
