"""MoLA's own files (GCYZSL/MoLA, arXiv 2402.08562): a PEFT directory with numbered experts in every linear layer.

    base_model.model.model.layers.{j}.self_attn.q_proj.lora_A_{e}.weight
    base_model.model.model.layers.{j}.self_attn.q_proj.lora_B_{e}.weight
    base_model.model.model.layers.{j}.self_attn.q_proj.router.router.weight

The configuration says it is a LoRA and gives alpha; the numbers of experts, which differ from layer to layer, were
options of the program and are only in the keys. The number of experts per token was one too: it is 2 in all published
settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from adapters.formats.foreign_mixture import NumberedExperts

_TOP_K = 2


class Mola(NumberedExperts):
    """Numbered experts with a router in every linear layer."""

    name, title, suffix, method = "mola", "MoLA", "", "mola"
    expert = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])_(?P<expert>\d+)\.weight$")
    router = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.router\.router\.(?P<kind>weight)$")
    acting: ClassVar[Mapping[str, Any]] = {
        "top_k": _TOP_K,
        "notes": (f"The file does not say how many experts a token uses: {_TOP_K}, as in the paper.",),
    }


FORMAT = Mola()
