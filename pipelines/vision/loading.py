"""Opens image classifiers: transformers' own, and MLP-Mixers (ours and timm's)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adapters.errors import InputError
from pipelines.precision import choose_dtype
from pipelines.vision.labels import config_of, known_labels
from pipelines.vision.mixer import MixerForImageClassification, from_timm


@dataclass
class Classifier:
    """An opened classifier.

    Attributes:
        labels: its classes, by number.
        size, mean, std: side in pixels and normalisation of its pictures.
        head: name of its last layer.
        source: where it was read from.
    """

    model: Any
    labels: list[str]
    size: int
    head: str
    source: str
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    @property
    def device(self) -> torch.device:
        found: torch.device = next(iter(self.model.parameters())).device
        return found

    def pixels(self, picture: Image.Image) -> Tensor:
        """A picture as the model reads it: (3, size, size), fp32."""
        small = picture.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
        values = torch.from_numpy(np.array(small)).float().permute(2, 0, 1) / 255
        return (values - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


def open_classifier(
    source: str, labels: Sequence[str], dtype: str = "auto", device: torch.device | str = "cpu"
) -> Classifier:
    """Open the classifier in the folder ``source`` (or on the hub) for ``labels``.

    A classifier of the same labels in the same order keeps its head; otherwise it gets a new one.

    Raises:
        InputError: it is no classifier of pictures, or cannot be read.
    """
    place, config = Path(source), config_of(Path(source))
    kind = choose_dtype(dtype, torch.device(device))
    keeps = known_labels(source) == list(labels)
    options: dict[str, Any] = {} if keeps else {"num_labels": len(labels), "ignore_mismatched_sizes": True}
    options |= {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}
    try:
        if sizes := from_timm(str(config.get("architecture", "")), len(labels)):
            sizes.id2label = options["id2label"]
            model: Any = MixerForImageClassification.from_pretrained(place, config=sizes, ignore_mismatched_sizes=True)
        elif config.get("model_type") == "mlp_mixer":
            model = MixerForImageClassification.from_pretrained(place, **options)
        else:
            from transformers import AutoModelForImageClassification

            model = AutoModelForImageClassification.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"'{source}' cannot be opened as a classifier of pictures: {error}") from None
    mean, std = _normalisation(place)
    size = model.config.image_size if hasattr(model.config, "image_size") else 224
    return Classifier(
        model.to(device=device, dtype=kind), list(labels), int(size), head_of(model), source, mean, std
    )


def head_of(model: Any) -> str:
    """Name of the layer that gives the logits; raises :class:`InputError` if there is none of a usual name."""
    found = [name for name in ("classifier", "head") if hasattr(model, name)]
    if not found:
        raise InputError(f"{type(model).__name__} has no layer 'classifier' or 'head': it cannot be trained here.")
    return found[0]


def _normalisation(place: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    file = place / "preprocessor_config.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    half = [0.5] * 3
    return tuple(kept.get("image_mean") or half), tuple(kept.get("image_std") or half)
