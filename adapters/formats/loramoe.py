"""LoRAMoE's own files (Ablustrund/LoRAMoE, arXiv 2312.09979): a PEFT directory with numbered experts, all of which act.

    base_model.model.model.layers.{j}.mlp.gate_proj.lora_A{e}.weight
    base_model.model.model.layers.{j}.mlp.gate_proj.lora_B{e}.weight
    base_model.model.model.layers.{j}.mlp.gate_proj.lora_route.weight

The configuration says it is a LoRA; ``lora_nums`` in it shows what it is. PEFT would accept it and find no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from adapters.formats.foreign_mixture import NumberedExperts


class LoraMoe(NumberedExperts):
    """Numbered experts with a dense router in every linear layer of the feed-forward blocks."""

    name, title, suffix, method = "loramoe", "LoRAMoE", "", "loramoe"
    expert = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?P<expert>\d+)\.weight$")
    router = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_route\.(?P<kind>weight)$")
    acting: ClassVar[Mapping[str, Any]] = {"dense": True}
    counted = "lora_nums"


FORMAT = LoraMoe()
