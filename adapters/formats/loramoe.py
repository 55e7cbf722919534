"""LoRAMoE's own files (Ablustrund/LoRAMoE, arXiv 2312.09979): a PEFT directory with numbered experts, all of which act.

    base_model.model.model.layers.{j}.mlp.gate_proj.lora_A{e}.weight
    base_model.model.model.layers.{j}.mlp.gate_proj.lora_B{e}.weight
    base_model.model.model.layers.{j}.mlp.gate_proj.lora_route.weight

The configuration says it is a LoRA; ``lora_nums`` in it shows what it is. PEFT would accept it and find no weights.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from adapters.errors import InputError
from adapters.formats import foreign_mixture as mixtures
from adapters.formats.foreign_mixture import Mixture, MixtureFormat, Outline
from adapters.formats.header import CONFIG

if TYPE_CHECKING:
    from adapters.formats.header import Header

_EXPERT = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?P<expert>\d+)\.weight$")
_ROUTER = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_route\.(?P<kind>weight)$")


class LoraMoe(MixtureFormat):
    """Numbered experts with a dense router in every linear layer of the feed-forward blocks."""

    name, title, suffix, method = "loramoe", "LoRAMoE", "", "loramoe"

    def recognises(self, head: Header) -> bool:
        return "lora_nums" in head.config or any(_EXPERT.match(name) for name in head.shapes)

    def outline(self, head: Header) -> Outline:
        base = mixtures.text(head.config, "base_model_name_or_path")
        return mixtures.outlined("loramoe", head.shapes, head.config, _EXPERT, _ROUTER, base)

    def mixture(self, head: Header) -> Mixture:
        """The mixture; raises :class:`InputError` if it is damaged or incomplete."""
        tensors, source = mixtures.tensors_of(head)
        if not (config := head.config):
            raise InputError(
                f"{source} is a LoRAMoE mixture, but '{CONFIG}', which holds its alpha, is missing: copy the whole "
                "directory."
            )
        halves, gates, strange = mixtures.sorted_keys(tensors, _EXPERT, _ROUTER, None)
        mixtures.refuse_strange(strange, source, "LoRAMoE")
        alpha = mixtures.number(config, "lora_alpha", source)
        layers = {name: mixtures.layer_of(name, pair, alpha, False, source) for name, pair in halves.items()}
        mixtures.check_said(config, "lora_nums", (layer.experts for layer in layers.values()), "experts", source)
        routers = mixtures.routers_of(gates, layers, source)
        return Mixture(
            "loramoe", self.name, layers, routers, dense=True, base=mixtures.text(config, "base_model_name_or_path"),
            path=head.path,
        )  # fmt: skip


FORMAT = LoraMoe()
