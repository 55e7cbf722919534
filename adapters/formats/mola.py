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
from typing import TYPE_CHECKING

from adapters.errors import InputError
from adapters.formats import foreign_mixture as mixtures
from adapters.formats.foreign_mixture import Mixture, MixtureFormat, Outline
from adapters.formats.header import CONFIG

if TYPE_CHECKING:
    from adapters.formats.header import Header

_EXPERT = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])_(?P<expert>\d+)\.weight$")
_ROUTER = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.router\.router\.(?P<kind>weight)$")
_TOP_K = 2


class Mola(MixtureFormat):
    """Numbered experts with a router in every linear layer."""

    name, title, suffix, method = "mola", "MoLA", "", "mola"

    def recognises(self, head: Header) -> bool:
        return any(_EXPERT.match(name) for name in head.shapes)

    def outline(self, head: Header) -> Outline:
        base = mixtures.text(head.config, "base_model_name_or_path")
        return mixtures.outlined("mola", head.shapes, head.config, _EXPERT, _ROUTER, base)

    def mixture(self, head: Header) -> Mixture:
        """The mixture; raises :class:`InputError` if it is damaged or incomplete."""
        tensors, source = mixtures.tensors_of(head)
        if not (config := head.config):
            raise InputError(
                f"{source} is a MoLA mixture, but '{CONFIG}', which holds its alpha, is missing: copy the whole "
                "directory."
            )
        halves, gates, strange = mixtures.sorted_keys(tensors, _EXPERT, _ROUTER, None)
        mixtures.refuse_strange(strange, source, "MoLA")
        alpha = mixtures.number(config, "lora_alpha", source)
        layers = {name: mixtures.layer_of(name, pair, alpha, False, source) for name, pair in halves.items()}
        routers = mixtures.routers_of(gates, layers, source)
        return Mixture(
            "mola", self.name, layers, routers, top_k=_TOP_K, base=mixtures.text(config, "base_model_name_or_path"),
            notes=(f"The file does not say how many experts a token uses: {_TOP_K}, as in the paper.",), path=head.path,
        )  # fmt: skip


FORMAT = Mola()
