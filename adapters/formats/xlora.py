"""X-LoRA's own directories (EricLBuehler/xlora, arXiv 2402.07148): a classifier, and the names of LoRAs from elsewhere.

    xlora_config.json                    its settings
    xlora_classifier.safetensors         inner.{i}.weight, .bias; last.weight, .bias (i also counts ReLU and Dropout)
    adapters/{name}/                     the LoRAs, if they were trained too; otherwise they are where they came from

Early versions had one gate per sequence and settings for it (``use_mean_pool``, ``stop_token_id``): with these on, the
classifier means something else, and is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError
from adapters.formats import foreign_mixture as mixtures
from adapters.formats.foreign_mixture import MixtureFormat, Outline

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats.header import Header

SETTINGS = "xlora_config.json"
_KEY = re.compile(r"^(?:inner\.(?P<number>\d+)|last)\.(?P<kind>weight|bias)$")


@dataclass(frozen=True)
class NamedExpert:
    """An expert that a file refers to: its name there, and where it is (None = unknown)."""

    name: str
    path: Path | None = None


@dataclass(frozen=True, eq=False)
class XLoraFile:
    """An X-LoRA of another program.

    Attributes:
        format: name of the format.
        classifier: weight (out, in) and bias of each linear layer, first to last.
        relu: ReLU and dropout between them.
        experts: in the order of the classifier's outputs.
        layerwise: one gate per adapted module (in the model's order) and expert, instead of one per expert.
        softmax, softmax_of_top_k: over all experts, or over those kept.
        temperature: of the softmax.
        top_k: experts kept per token; None = all.
        pass_value: gate of every expert in the scaling pass.
        weight: gamma, a factor of all updates.
        dropout: of the classifier.
        base: the base that the file names, or empty.
        notes: what had to be repaired, as sentences.
        path: where it was read from.
    """

    format: str
    classifier: tuple[tuple[Tensor, Tensor], ...]
    relu: bool
    experts: tuple[NamedExpert, ...]
    layerwise: bool = False
    softmax: bool = True
    softmax_of_top_k: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    pass_value: float = 0.0
    weight: float = 1.0
    dropout: float = 0.2
    base: str = ""
    notes: tuple[str, ...] = ()
    path: Path | None = None


class XLora(MixtureFormat):
    """The directory that EricLBuehler/xlora and mistral.rs read."""

    name, title, suffix, method, mark = "xlora", "X-LoRA, mistral.rs", "", "x-lora", SETTINGS

    def recognises(self, head: Header) -> bool:
        return bool(head.shapes) and all(_KEY.match(name) for name in head.shapes) and "last.weight" in head.shapes

    def outline(self, head: Header) -> Outline:
        settings = _settings(head.path.parent)
        names = _names(settings)
        return Outline("x-lora", (len(names),) if names else (), (), (), mixtures.text(settings, "base_model_id"))

    def mixture(self, head: Header) -> XLoraFile:
        """The X-LoRA; raises :class:`InputError` if it is damaged, incomplete, or of an early version."""
        tensors, source = mixtures.tensors_of(head)
        folder = head.path.parent
        settings = _settings(folder)
        if not settings:
            raise InputError(
                f"{source} is an X-LoRA classifier, but '{SETTINGS}' is missing: copy the whole directory."
            )
        if settings.get("use_mean_pool") or settings.get("stop_token_id") is not None:
            raise InputError(
                f"{source} is of an early X-LoRA with one gate per sequence instead of per token: it cannot be used."
            )
        numbers = sorted({int(found["number"]) for key in tensors if (found := _KEY.match(key)) and found["number"]})
        names = [*(f"inner.{number}" for number in numbers), "last"]
        layers = linear_layers(
            {name: (tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")) for name in names}, source
        )
        step = numbers[1] - numbers[0] if len(numbers) > 1 else 0
        relu = bool(settings.get("enable_relu_and_dropout", step > 1))
        dropout = step == 3 or (len(numbers) < 2 and relu)
        check_depth(settings, len(layers), source)
        experts = tuple(NamedExpert(name, place) for name, place in _names(settings, folder).items())
        return XLoraFile(
            self.name, layers, relu, experts, **options_of(settings, source), path=folder,
            dropout=_number(settings, "xlora_dropout_p", 0.2) if dropout else 0.0,
            base=mixtures.text(settings, "base_model_id"),
        )  # fmt: skip


def linear_layers(
    parts: Mapping[str, tuple[Tensor | None, Tensor | None]], source: str
) -> tuple[tuple[Tensor, Tensor], ...]:
    """The classifier's linear layers in fp32; a missing bias is 0.

    Raises:
        InputError: a layer is missing, or two in a row do not fit together.
    """
    import torch

    made: list[tuple[Tensor, Tensor]] = []
    for name, (weight, bias) in parts.items():
        if weight is None or weight.ndim != 2:
            raise InputError(f"{source}: the classifier's layer '{name}' is missing or not a matrix.")
        bias = torch.zeros(weight.shape[0]) if bias is None else bias
        if tuple(bias.shape) != (weight.shape[0],) or (made and made[-1][0].shape[0] != weight.shape[1]):
            raise InputError(
                f"{source}: the classifier's layer '{name}' {tuple(weight.shape)} does not fit to its others."
            )
        made.append((weight.float(), bias.float()))
    return tuple(made)


def options_of(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The settings that upstream and PEFT share, as fields of :class:`XLoraFile`.

    Raises:
        InputError: a value that is not possible.
    """
    top_k = settings.get("top_k_lora")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise InputError(f"{source}: its top_k_lora is '{str(top_k)[:40]}', which is not a positive whole number.")
    return {
        "layerwise": bool(settings.get("layerwise_scalings", False)),
        "softmax": bool(settings.get("enable_softmax", True)),
        "softmax_of_top_k": bool(settings.get("enable_softmax_topk", False)),
        "temperature": mixtures.number(settings, "softmax_temperature", source, 1.0),
        "top_k": top_k,
        "pass_value": _number(settings, "scaling_pass_value", 0.0),
        "weight": _number(settings, "global_scaling_weight", 1.0),
    }


def check_depth(settings: Mapping[str, Any], layers: int, source: str) -> None:
    """Raise :class:`InputError` if the settings name another number of linear layers than the file has."""
    depth = settings.get("xlora_depth", layers)
    if depth != layers:
        raise InputError(
            f"{source}: its settings say xlora_depth {depth}, but the classifier has {layers} linear layers: the file "
            "is not complete, or belongs to other settings."
        )


def check_outputs(file: XLoraFile, experts: Sequence[Any], modules: int, source: str) -> None:
    """Raise :class:`InputError` if the classifier's outputs are not one per expert (and module, if layer-wise)."""
    found, wanted = int(file.classifier[-1][0].shape[0]), len(experts) * (modules if file.layerwise else 1)
    if found != wanted:
        per = f" for each of {modules} adapted modules" if file.layerwise else ""
        raise InputError(
            f"{source}: the classifier has {found} outputs, but {len(experts)} experts{per} need {wanted}: name the "
            "experts it was trained with, in their order."
        )


def _number(settings: Mapping[str, Any], entry: str, default: float) -> float:
    value = settings.get(entry, default)
    return float(value) if isinstance(value, int | float) and abs(value) < 1e6 else default


def _settings(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _names(settings: Mapping[str, Any], folder: Path | None = None) -> dict[str, Path | None]:
    """Names of the experts in their order -> where they are, if that can be told."""
    given = settings.get("adapters")
    named = given if isinstance(given, dict) else dict.fromkeys(given if isinstance(given, list) else ())
    return {str(name): located(str(name), place, folder) for name, place in named.items()}


def located(name: str, place: Any, folder: Path | None) -> Path | None:
    """An expert's place: a subfolder of the X-LoRA's own folder, else the path it names; None if neither exists."""
    own = [folder / "adapters" / name, folder / name] if folder is not None else []
    named = [Path(place), *([folder / place] if folder is not None else [])] if isinstance(place, str) else []
    return next((path for path in (*own, *named) if path.is_dir() or path.is_file()), None)


FORMAT = XLora()
