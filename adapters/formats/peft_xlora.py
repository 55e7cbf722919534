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

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError
from adapters.files import write_text
from adapters.formats import foreign_mixture as mixtures
from adapters.formats import xlora
from adapters.formats.foreign_mixture import MixtureFormat, Outline
from adapters.formats.header import CONFIG, WEIGHTS
from adapters.formats.peft_directory import write_directory
from adapters.formats.xlora import NamedExpert, XLoraFile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from adapters.formats.header import Header
    from adapters.formats.lora import LoraLayer

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


def write_xlora(file: XLoraFile, experts: Mapping[str, Mapping[str, LoraLayer]], folder: Path) -> Path:
    """Write an X-LoRA as a directory that PEFT's ``PeftModel.from_pretrained`` loads, whole; returns the folder.

    Args:
        experts: name -> module path -> layer, in the order of the gates; PEFT calls them "0", "1", ...

    Raises:
        InputError: PEFT's X-LoRA has no such classifier or experts.
    """
    from adapters.formats.tensors import write_tensors

    if len(file.classifier) > 1 and not file.relu:
        raise InputError("PEFT's X-LoRA has ReLU between the layers of its classifier, and this one has none.")
    if file.softmax_of_top_k and not file.softmax and file.top_k is None:
        raise InputError("PEFT's X-LoRA needs top_k_lora for a softmax over the kept experts.")
    for name, layers in experts.items():
        if any(layer.magnitude is not None for layer in layers.values()):
            raise InputError(f"PEFT's X-LoRA cannot mix DoRA experts, and '{name}' is one.")
    step = 3 if file.dropout > 0 else 2
    tensors = {
        f"base_model.internal_xlora_classifier.layers.{step * number}.{kind}": tensor
        for number, pair in enumerate(file.classifier)
        for kind, tensor in zip(("weight", "bias"), pair, strict=True)
    }
    names = [str(number) for number in range(len(experts))]
    config = {
        "peft_type": "XLORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": file.base or None,
        "inference_mode": True, "adapters": {name: str(folder / name) for name in names},
        "hidden_size": int(file.classifier[0][0].shape[1]), "xlora_depth": len(file.classifier),
        "xlora_size": int(file.classifier[0][0].shape[0]) if len(file.classifier) > 1 else 2048,
        "xlora_dropout_p": file.dropout, "layerwise_scalings": file.layerwise, "enable_softmax": file.softmax,
        "enable_softmax_topk": file.softmax_of_top_k, "softmax_temperature": file.temperature,
        "top_k_lora": file.top_k, "scaling_pass_value": file.pass_value, "global_scaling_weight": file.weight,
        "use_trainable_adapters": False,
    }  # fmt: skip
    for name, layers in zip(names, experts.values(), strict=True):
        write_directory(folder / name, layers, options={"task_type": "CAUSAL_LM"})
    write_tensors(folder / WEIGHTS[0], tensors, {})
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


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
