"""``rna_task.json``: what a classifier's weights do not say, beside a checkpoint or an adapter."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from adapters import files
from adapters.errors import InputError
from pipelines.genomics.kmers import Kmers
from pipelines.genomics.orf import Strands

FILE = "rna_task.json"

View = Literal["full", "orf", "both"]
"""What of a transcript is read: all of it, its longest reading frame, or both, with the mean of their logits."""

Long = Literal["prefix", "windows"]
"""What is read of an input that is too long: its first part, or overlapping windows, with the mean of their logits."""


@dataclass(frozen=True)
class RnaTask:
    """How a classifier reads transcripts and names its answers.

    Attributes:
        k, stride, max_length: of its tokens.
        labels: the classes in the order of the logits; the second is the one that probabilities are about.
        base: digest of the base an adapter belongs to; empty for a whole model.
        threshold: from this probability on the second label is given.
    """

    k: int
    stride: int
    max_length: int
    labels: tuple[str, str] = ("mRNA", "lncRNA")
    view: View = "both"
    long: Long = "prefix"
    strands: Strands = "forward"
    threshold: float = 0.5
    base: str = ""

    def text(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        files.write_text(folder / FILE, self.text())

    @classmethod
    def read(cls, folder: Path) -> RnaTask | None:
        """The task of a folder; None if it has none.

        Raises:
            InputError: the file is damaged.
        """
        file = folder / FILE
        if not file.is_file():
            return None
        try:
            told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            labels = tuple(map(str, told["labels"]))
            known = {field.name for field in dataclasses.fields(cls)}
            made = cls(**{**{key: value for key, value in told.items() if key in known}, "labels": labels})
            whole = all(isinstance(value, int) and value > 0 for value in (made.k, made.stride, made.max_length))
            choices = ((made.view, View), (made.long, Long), (made.strands, Strands))
            if len(labels) != 2 or not whole or any(value not in get_args(kind) for value, kind in choices):
                raise ValueError("a value that is not known")
            return dataclasses.replace(made, threshold=float(made.threshold))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"'{file}' cannot be read ({error}): it is damaged or of another program.") from None

    def check(self, kmers: Kmers, digest: str, name: str, base: str) -> None:
        """Refuse a base that the adapter ``name`` was not trained on.

        Raises:
            InputError: another k, other weights, or fewer positions.
        """
        if kmers.k != self.k:
            raise InputError(f"The adapter '{name}' reads {self.k}-mers, the base '{base}' {kmers.k}-mers.")
        if kmers.longest < self.max_length:
            raise InputError(
                f"The adapter '{name}' reads {self.max_length} tokens, the base '{base}' at most {kmers.longest}."
            )
        if self.base and digest != self.base:
            raise InputError(f"The adapter '{name}' was trained on other weights than '{base}' has: choose its base.")
