"""The form of a LoRA in memory, whatever file it came from.

A layer is  y = W0 x + s B A x,  with W0 (out, in) frozen, A (r, in), B (out, r) and  s = alpha / r  (rsLoRA:
alpha / sqrt(r)). A convolution keeps its kernel in A (r, in, kh, kw) and has B (out, r, 1, 1). An embedding table
E (tokens, width) is a layer on one-hot tokens, W0 = E^T: A (r, tokens), B (width, r). A DoRA layer
(arXiv 2402.09353) also has a magnitude m (out,):  y = m / |W0 + s B A| (W0 + s B A) x  with one norm per output.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DENOISERS = ("unet", "transformer", "transformer_2")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
COMPONENTS = (*DENOISERS, *TEXT_ENCODERS, "connectors")
MODEL = "model"
"""The only component of an adapter for a single model (language, speech) instead of a diffusion pipeline."""

RECIPE_ENTRY = "adapter_studio_recipe"
"""Name of the metadata entry that holds the recipe of a training as JSON."""

FORMAT_ENTRIES = ("lora_adapter_metadata", "format")
"""Metadata entries that formats write themselves."""


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The adapter of one module.

    Attributes:
        A: (r, in) or (r, in, kh, kw).
        B: (out, r) or (out, r, 1, 1).
        alpha: numerator of the scale.
        rslora: the scale is alpha / sqrt(r) instead of alpha / r.
        magnitude: DoRA's m (out,), or None.
        embedding: the module is an embedding table.
    """

    A: Tensor
    B: Tensor
    alpha: float
    rslora: bool = False
    magnitude: Tensor | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def size(self) -> int:
        return self.A.numel() + self.B.numel()

    def with_scale_one(self) -> LoraLayer:
        """The same update with the scale folded into B (or A, where B would overflow), so that alpha is the rank."""
        if self.scale == 1 and not self.rslora:
            return self
        B = (self.B.float() * self.scale).to(self.B.dtype)
        if bool(B.isfinite().all()):
            return replace(self, B=B, alpha=float(self.rank), rslora=False)
        return replace(self, A=(self.A.float() * self.scale).to(self.A.dtype), alpha=float(self.rank), rslora=False)

    def delta(self) -> Tensor:
        """s B A (out, in...) in fp32; for DoRA, the update before normalisation.

        The weights of modules that store the transpose (embeddings, GPT-2's Conv1D) change by the transpose of this.
        """
        product = self.B.float().flatten(1) @ self.A.float().flatten(1)
        return self.scale * product.reshape(self.B.shape[0], *self.A.shape[1:])


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA as read from disk.

    Attributes:
        parts: component ("unet", "transformer", "text_encoder", ...) -> module path -> layer.
        format: name of the format it was read from (:func:`adapters.formats.format.formats`); "memory" for none.
        flat: module paths are kohya's, with "_" where the model has "."; ``fit`` resolves them.
        metadata: text entries of the file.
        path, sha256: where it came from; None and "" for one made in memory.
        embeddings: an ED-LoRA's words: word -> (cross-attention layers, text width).
        copies: base weights that PEFT stores with an adapter on an embedding or output layer: component -> module ->
            weight. ``fit`` checks that the base has the same ones.
        words: of pivotal tuning: word -> text encoder -> (vectors, text width).
        config: PEFT's configuration, if read from a PEFT directory for one model.
    """

    parts: Mapping[str, Mapping[str, LoraLayer]]
    format: str = "memory"
    flat: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None
    sha256: str = ""
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    words: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    copies: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def layers(self) -> Iterator[tuple[str, str, LoraLayer]]:
        """(component, module path, layer), in a fixed order."""
        for component in sorted(self.parts):
            for module in sorted(self.parts[component]):
                yield component, module, self.parts[component][module]

    def counts(self) -> dict[str, int]:
        """Layers per component."""
        return {component: len(layers) for component, layers in self.parts.items()}

    def ranks(self) -> tuple[int, ...]:
        """The different ranks, ascending."""
        return tuple(sorted({layer.rank for _, _, layer in self.layers()}))

    def targets(self) -> tuple[str, ...]:
        """The last names of the adapted modules ("to_q", "conv1", ...), sorted."""
        return tuple(sorted({_last_name(module) for _, module, _ in self.layers()}))

    def parameters(self) -> int:
        """Number of parameters in A and B."""
        return sum(layer.size for _, _, layer in self.layers())

    def is_dora(self) -> bool:
        return any(layer.magnitude is not None for _, _, layer in self.layers())

    def tables(self) -> tuple[str, ...]:
        """ "component.module" of each adapted embedding table."""
        return tuple(f"{component}.{module}" for component, module, layer in self.layers() if layer.embedding)

    def own_metadata(self) -> dict[str, str]:
        """The metadata without the entries that formats write themselves."""
        return {key: value for key, value in self.metadata.items() if key not in FORMAT_ENTRIES}

    def recipe(self) -> dict[str, Any]:
        """How the adapter was made, from its metadata; {} if they do not say."""
        try:
            found = json.loads(self.metadata.get(RECIPE_ENTRY, "{}"))
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def refusal_of_tables(self, format: str) -> str:
        """Why a format without embedding tables cannot hold this adapter; empty if it can."""
        if not (tables := self.tables()):
            return ""
        return (
            f"The adapter changes the embeddings '{tables[0]}', which the {format} format cannot hold: use the peft "
            "format."
        )

    def refusal_of_model(self, format: str) -> str:
        """Why a format for diffusion pipelines cannot hold this adapter; empty if it can."""
        if MODEL not in self.parts:
            return ""
        return f"The {format} format is for image models: use the peft format for a language or speech model."

    def with_parts(self, parts: Mapping[str, Mapping[str, LoraLayer]], flat: bool = False) -> LoraFile:
        """The same file with other (renamed or converted) layers."""
        return replace(self, parts=parts, flat=flat)


def group_dict(layers: Mapping[tuple[str, str], LoraLayer]) -> dict[str, dict[str, LoraLayer]]:
    """{(component, module): layer} -> {component: {module: layer}}."""
    parts: dict[str, dict[str, LoraLayer]] = {}
    for (component, module), layer in layers.items():
        parts.setdefault(component, {})[module] = layer
    return parts


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| in fp32; the absolute error if ``wanted`` is zero."""
    import torch

    size = torch.linalg.vector_norm(wanted.float())
    error = torch.linalg.vector_norm(found.float() - wanted.float())
    return float(error / size) if size > 0 else float(error)


def _last_name(module: str) -> str:
    names = [name for name in module.split(".") if not name.isdigit()]
    return names[-1] if names else module
