"""Adapters of any format on a vision-language model, at strengths of their own.

Files name the language model's layers in several ways: as this model does (``model.language_model.layers.0``), as older
versions of transformers did (``language_model.model.layers.0``), or as the language model alone (``model.layers.0``).
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from adapters.formats import LoraFile, read
from pipelines.language.adapters import AdaptedModel, fitted
from pipelines.multimodal.loading import VisionLanguageModel, language_part

_INSIDE = re.compile(r"(?:(?:model|language_model|text_model|transformer)\.)*(layers\.\d+\..+|embed_tokens|norm)")
"""A layer of a language model, whatever stands in front of its own names."""


def read_under(path: Path, model: nn.Module, base: str = "this base model") -> LoraFile:
    """The adapter at ``path`` with the module names of a vision-language ``model``, every shape checked.

    Raises:
        InputError: it cannot be read, or is not an adapter that is supported.
        FamilyError: it has a module that the model lacks, or one of another shape.
    """
    file = read(path)
    return fitted(under(file, model, language_part(model)), model, base)


def under(file: LoraFile, model: nn.Module, part: str) -> LoraFile:
    """``file`` with layers that ``model`` lacks looked up in its language model ``part``; itself if none is found."""
    names = {name for name, _ in model.named_modules()}
    if file.flat or len(file.parts) != 1:
        return file
    (component, layers), changed = next(iter(file.parts.items())), {}
    for name, layer in layers.items():
        inside = _INSIDE.fullmatch(name)
        wanted = f"{part}.{inside.group(1)}" if inside else name
        changed[wanted if name not in names and wanted in names else name] = layer
    if changed.keys() == layers.keys():
        return file
    return file.with_parts({component: changed}, file.flat)


class AdaptedVision(AdaptedModel):
    """A vision-language model with adapters that can be switched.

    Args:
        base: a loaded model; it is not changed.
        name: its name in messages.
    """

    def __init__(self, base: VisionLanguageModel, name: str = "this base model") -> None:
        super().__init__(base.model, name)

    def read(self, path: Path) -> LoraFile:
        return read_under(path, self.model, self.base)
