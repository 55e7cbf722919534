"""Using distilled adapters: guidance is built in, so a second pass would apply it twice."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adapters.errors import InputError
from adapters.formats import LoraFile
from pipelines.diffusion import methods
from pipelines.diffusion.distillation import embedding
from pipelines.diffusion.distillation.mark import Mark, config_hash, read_mark


@dataclass(frozen=True)
class Distilled:
    """A distilled adapter in a pipeline: its mark and, if it has one, its guidance embedding."""

    mark: Mark
    embedding: Tensor | None = None


def distilled(file: LoraFile, name: str, pipe: Any, denoiser: str) -> Distilled | None:
    """The distilled adapter in ``file``; None for ordinary adapters. Warns if it was made for another base.

    Raises:
        InputError: its metadata is damaged, or its guidance embedding is missing.
    """
    mark = read_mark(file.metadata)
    if mark is None:
        return None
    model = getattr(pipe, denoiser)
    predicts = pipe.scheduler.config.get("prediction_type")
    if mark.prediction_type in ("epsilon", "v_prediction", "sample") and predicts not in (None, mark.prediction_type):
        warnings.warn(
            f"'{name}' was distilled for a base that predicts {mark.prediction_type}; this one predicts {predicts}.",
            stacklevel=3,
        )
    if mark.config_hash and mark.config_hash != config_hash(model):
        warnings.warn(
            f"'{name}' was distilled on the base '{mark.base}', whose configuration differs from this one's: its "
            "guidance may come out weaker or stronger.",
            stacklevel=3,
        )
    if not mark.embedding:
        return Distilled(mark)
    if file.path is None:
        raise InputError(f"'{name}' has a guidance embedding in a second file: load it by its path.")
    folder = file.path if file.path.is_dir() else file.path.parent
    return Distilled(mark, embedding.read(folder / Path(mark.embedding).name))


def check_use(
    active: Mapping[str, tuple[Mark, float]],
    method: str,
    guidance: float | None,
    allow_double: bool,
    usual: float = 5.0,
    none: float = 1.0,
) -> tuple[float, Mark | None]:
    """The guidance of a call, and the mark of the distilled adapter it uses (None without one).

    Args:
        active: name -> (mark, weight) of the distilled adapters whose weight is not 0.
        method: composition method.
        guidance: as requested; None = a suitable default.
        allow_double: allow guidance on top of built-in guidance.
        usual: the default without a distilled adapter.
        none: the guidance scale up to which the pipeline does not guide.

    Raises:
        InputError: guidance on top of built-in guidance, two distilled adapters, or a method that does not use the
            adapter in every prediction.
    """
    if not active:
        return usual if guidance is None else guidance, None
    if len(active) > 1:
        raise InputError(f"Two distilled adapters would guide twice ({', '.join(active)}): keep one of them.")
    name, (mark, weight) = next(iter(active.items()))
    if not methods.properties(method).constant:
        raise InputError(
            f"'{name}' is distilled and must act in every prediction, which '{method}' does not do: use method "
            f"'{methods.usual(regional=False)}'."
        )
    if mark.mode == "embedding":
        chosen = mark.guidance if guidance is None else guidance
        _warn_outside(name, mark, chosen)
        return chosen, mark
    if guidance is not None and guidance > none and not allow_double:
        raise InputError(
            f"'{name}' has guidance {mark.guidance_at(weight):g} built in, and guidance_scale {guidance:g} would guide "
            f"again: set guidance_scale to {none:g} (or allow_double_guidance if you want both)."
        )
    if mark.mode == "strength":
        _warn_outside(name, mark, mark.guidance_at(weight))
    return none if guidance is None else guidance, mark


def merged_mark(marks: Sequence[tuple[Mark, float]]) -> dict[str, str]:
    """Metadata of one LoRA merged from several, of which one is distilled; empty if none is.

    Args:
        marks: (mark, weight) of the distilled ones.

    Raises:
        InputError: two of them are distilled, or one needs a guidance embedding.
    """
    if not marks:
        return {}
    if len(marks) > 1:
        raise InputError("Two distilled adapters cannot become one file: keep one of them.")
    mark, weight = marks[0]
    if mark.mode == "embedding":
        raise InputError("An adapter with a guidance embedding cannot be merged into an ordinary LoRA: leave it out.")
    w = mark.guidance_at(weight)
    return Mark(**{**vars(mark), "mode": "fixed", "guidance": w, "low": w, "high": w}).to_metadata()


def _warn_outside(name: str, mark: Mark, w: float) -> None:
    if mark.outside(w):
        warnings.warn(
            f"Guidance {w:g} is outside the range that '{name}' was trained for ({mark.low:g} to {mark.high:g}).",
            stacklevel=4,
        )
