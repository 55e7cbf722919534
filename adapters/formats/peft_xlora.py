"""PEFT's X-LoRA directories (``XLoraConfig``): the classifier, and folders that should hold the experts.

    adapter_model.safetensors      base_model.internal_xlora_classifier.layers.{i}.weight, .bias
    {name}/                        for each expert

PEFT 0.21 calls the experts "0", "1", ..., and when it saves, it leaves out every tensor whose name has another
expert's name as a part. So layers 0, 1, ... of the classifier are lost from the main file, and so are layers 0, 1, ...
of the model from the experts' folders. A classifier layer {i} that was lost can be found under another name in the
folder of the expert called {i}, and is taken from there; the experts themselves are read from where they were, never
from such folders.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError
from adapters.formats import foreign_mixture as mixtures
from adapters.formats import xlora
from adapters.formats.foreign_mixture import MixtureFormat, Outline
from adapters.formats.xlora import NamedExpert, XLoraFile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from adapters.formats.header import Header

_KEY = re.compile(r"^(?:base_model\.)?internal_xlora_classifier\.layers\.(?P<number>\d+)\.(?P<kind>weight|bias)$")
_STRIPPED = "internal_xlora_classifier.layers."
"""What is left of a classifier layer's name when its number was taken for the name of an expert."""


class PeftXLora(MixtureFormat):
    """An X-LoRA of PEFT, repaired where that is certain and refused where it is not."""

    name, title, suffix, method = "peft-xlora", "PEFT (X-LoRA)", "", "x-lora"

    def recognises(self, head: Header) -> bool:
        said = str(head.config.get("peft_type") or "").rpartition(".")[2].upper()
        return said == "XLORA" or any(_KEY.match(name) for name in head.shapes)

    def outline(self, head: Header) -> Outline:
        names = _adapters(head.config)
        return Outline(
            "x-lora", (len(names),) if names else (), (), (), mixtures.text(head.config, "base_model_name_or_path")
        )

    def mixture(self, head: Header) -> XLoraFile:
        """The X-LoRA.

        Raises:
            InputError: the file is damaged, or lost layers of its classifier when it was saved.
        """
        from adapters.formats.tensors import check_finite, read_tensors

        file = head.weights
        if file is None or not head.config:
            raise InputError(f"'{head.path}' is not a whole PEFT X-LoRA directory: copy all of it.")
        config, folder, source = head.config, file.parent, f"'{file}'"
        tensors, _ = read_tensors(file)
        check_finite(tensors, source)
        found = {(int(key["number"]), key["kind"]): t for name, t in tensors.items() if (key := _KEY.match(name))}
        wanted = _wanted(config, source)
        adapters = _adapters(config)
        lost = [number for number in wanted if (number, "weight") not in found or (number, "bias") not in found]
        for number in lost:
            found |= _elsewhere(number, adapters, folder)
        gone = [number for number in wanted if (number, "weight") not in found]
        if gone:
            raise InputError(
                f"{source} is a broken X-LoRA of PEFT: layer {', '.join(map(str, gone))} of its classifier was lost "
                "when PEFT saved it, because an expert has the same name, and no copy is left: train it again."
            )
        layers = xlora.linear_layers(
            {f"layers.{n}": (found[n, "weight"], found.get((n, "bias"))) for n in wanted}, source
        )
        notes = []
        if lost:
            notes.append(
                f"PEFT lost layer {', '.join(map(str, lost))} of the classifier when it was saved; the copies in the "
                "experts' folders are used."
            )
        return XLoraFile(
            self.name, layers, True, tuple(_experts(adapters, folder)), **xlora.options_of(config, source),
            dropout=_dropout(config), base=mixtures.text(config, "base_model_name_or_path"), notes=tuple(notes),
            path=folder,
        )  # fmt: skip


def _adapters(config: Mapping[str, Any]) -> dict[str, Any]:
    found = config.get("adapters")
    return {str(name): place for name, place in found.items()} if isinstance(found, dict) else {}


def _dropout(config: Mapping[str, Any]) -> float:
    value = config.get("xlora_dropout_p", 0.2)
    return float(value) if isinstance(value, int | float) and 0 <= value < 1 else 0.0


def _wanted(config: Mapping[str, Any], source: str) -> list[int]:
    """Numbers of the classifier's linear layers among its modules: ReLU and dropout lie between them."""
    depth = config.get("xlora_depth", 1)
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= 1000:
        raise InputError(f"{source}: its xlora_depth is '{str(depth)[:40]}', which is not a positive whole number.")
    step = 3 if _dropout(config) > 0 else 2
    return [step * number for number in range(depth)]


def _elsewhere(number: int, adapters: Mapping[str, Any], folder: Path) -> dict[tuple[int, str], Tensor]:
    """A lost layer of the classifier from the folder of the expert with its name; empty if it is not there."""
    from adapters.formats.tensors import read_tensors

    file = folder / str(number) / "adapter_model.safetensors"
    if str(number) not in adapters or not file.is_file():
        return {}
    tensors, _ = read_tensors(file)
    kinds = {name.partition(_STRIPPED)[2]: tensor for name, tensor in tensors.items() if _STRIPPED in name}
    return {(number, kind): kinds[kind] for kind in ("weight", "bias") if kind in kinds}


def _experts(adapters: Mapping[str, Any], folder: Path) -> list[NamedExpert]:
    """The experts in order; a folder that PEFT wrote is used only if no other expert's name is a number."""
    found = []
    for name, place in adapters.items():
        damaged = any(other.isdigit() for other in adapters if other != name)
        outside = None if not isinstance(place, str) else xlora.located(name, place, None)
        found.append(NamedExpert(name, outside if damaged else xlora.located(name, place, folder)))
    return found


FORMAT = PeftXLora()
