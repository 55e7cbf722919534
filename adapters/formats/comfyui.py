"""Original module names with dots: ComfyUI (``diffusion_model.``), XLabs, fal and BFL.

The blocks of SD3 and Flux get diffusers' names (:mod:`adapters.formats.original_names`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapters.formats.format import TensorFormat
from adapters.formats.lora import LoraFile
from adapters.formats.prefixed_keys import is_prefixed, parse_prefixed

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats.header import Header


class ComfyUI(TensorFormat):
    """Read only: the same programs also read kohya's and diffusers' files."""

    name, title, order, writes = "comfyui", "ComfyUI, XLabs, fal", 30, False

    def recognises(self, head: Header) -> bool:
        return not head.peft and is_prefixed(head.shapes)

    def parse(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> LoraFile:
        return parse_prefixed(tensors, metadata, source)


FORMAT = ComfyUI()
