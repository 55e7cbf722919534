"""Task vectors in the jobs: made by a base from examples, or read from a file.

A language model reads the examples itself; a base that draws pictures reads them, which are prompts, with its text
encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapters.errors import InputError
from adapters.progress import Monitor
from studio import library
from studio.library import facts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """How examples become a vector.

    Attributes:
        limit: most examples of a task.
        layer: hidden state; -1 is the last.
        position: of the hidden states of an example.
        shots: examples in front of each.
    """

    limit: int
    layer: int
    position: Literal["last", "mean"]
    shots: int


@dataclass(frozen=True)
class Base:
    """What reads the examples, and the digest of the weights that adapters of this base change."""

    reader: Any
    tokenizer: Any
    digest: str

    @classmethod
    def open(cls, name: str) -> Base:
        """A base by its name in the library, path or hub id.

        Raises:
            InputError: there is none, or it reads no texts.
        """
        from studio.datasets.cache import fingerprint

        place = library.resolve_base(name)
        if facts.is_language_model(Path(place)):
            from pipelines.language.loading import open_model

            opened = open_model(place)
            return cls(opened.model, opened.tokenizer, fingerprint(opened.model))
        from pipelines.diffusion.loading import open_pipeline

        pipe, family, _ = open_pipeline(library.resolve_pipeline(name), dtype="fp32", device="cpu")
        if getattr(pipe, "text_encoder", None) is None:
            raise InputError(f"'{name}' has no text encoder that could read examples: give vectors instead.")
        return cls(pipe.text_encoder, pipe.tokenizer, fingerprint(getattr(pipe, family.denoiser)))

    def vector(self, file: Path, how: Reading, monitor: Monitor) -> Tensor:
        """The vector (d,) of the task whose examples are the lines of a text file.

        Raises:
            InputError: the file cannot be read or has no lines, or see
                :func:`adapters.generation.icm_lora.task_vector`.
            adapters.errors.Cancelled: ``monitor`` asked to stop.
        """
        from adapters.generation.icm_lora import task_vector

        examples = lines(file)[: how.limit]
        return task_vector(self.reader, self.tokenizer, examples, how.layer, how.position, monitor, how.shots)

    def vectors(self, files: Mapping[str, str], how: Reading, monitor: Monitor) -> dict[str, Tensor]:
        """Task -> vector, of the text file of each task."""
        return {task: self.vector(Path(place), how, monitor) for task, place in files.items()}


def read(path: Path) -> Tensor:
    """The one vector (d,) in a .safetensors file.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    from adapters.formats.tensors import read_tensors

    tensors = read_tensors(path)[0]
    if len(tensors) != 1 or next(iter(tensors.values())).ndim != 1:
        raise InputError(f"'{path}' must hold one vector, the task's.")
    return next(iter(tensors.values()))


def lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        InputError: it cannot be read, or has none.
    """
    try:
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' cannot be read as text with one example per line: {error}") from None
    if not found:
        raise InputError(f"'{path}' holds no examples: write one per line.")
    return found
