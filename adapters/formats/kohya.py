"""kohya's format (``lora_unet_<module with _>.lora_down.weight``), which webui and LyCORIS also read and write.

The keys lose the dots of the module path; :func:`adapters.formats.fit.fit` finds the module by the model's own names.
Text encoders keep transformers' old prefix ``text_model``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.formats.format import TensorFormat
from adapters.formats.lora import TEXT_ENCODERS, LoraFile
from adapters.formats.prefixed_keys import FLAT, KOHYA, is_prefixed, parse_prefixed
from adapters.formats.words import word_tensors, write_beside

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats.header import Header


class Kohya(TensorFormat):
    """Flat module names; alpha and words are stored as tensors."""

    name, title, order, dotted = "kohya", "kohya, webui, LyCORIS, ComfyUI", 20, False

    def recognises(self, head: Header) -> bool:
        return any(name.startswith(FLAT) for name in head.shapes) and is_prefixed(head.shapes)

    def parse(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> LoraFile:
        return parse_prefixed(tensors, metadata, source)

    def refusal(self, file: LoraFile) -> str:
        if "transformer" in file.parts:  # its SD3 and Flux files split and rename layers
            return "The kohya format is written for UNet models only; use the diffusers format for SD3 and Flux."
        return file.refusal_of_tables(self.name) or file.refusal_of_model(self.name)

    def _write(self, file: LoraFile, path: Path, metadata: Mapping[str, str]) -> Path:
        import torch

        from adapters.formats.tensors import write_tensors

        two_encoders = "text_encoder_2" in file.parts
        tensors = word_tensors(file.words)
        for component, module, layer in file.layers():
            prefix = _prefix(component, two_encoders)
            if component in TEXT_ENCODERS and not module.startswith("text_model"):
                module = f"text_model.{module}"
            name = prefix + module.replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = layer.A
            tensors[f"{name}.lora_up.weight"] = layer.B
            # kohya's scale is always alpha / r, so rsLoRA's alpha / sqrt(r) is written as the alpha that gives it
            tensors[f"{name}.alpha"] = torch.tensor(layer.scale * layer.rank)
            if layer.magnitude is not None:
                tensors[f"{name}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (layer.A.ndim - 1))
        text = {"ss_network_module": "networks.lora"} | file.own_metadata()
        return write_tensors(path, tensors, write_beside(replace(file, words={}), path, text | dict(metadata)))


def _prefix(component: str, two_encoders: bool) -> str:
    if component == "text_encoder":
        return "lora_te1_" if two_encoders else "lora_te_"
    return next(prefix for prefix, name in KOHYA.items() if name == component)


FORMAT = Kohya()
write_kohya = FORMAT.write
