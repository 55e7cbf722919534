"""LLaVA-MoLE's own checkpoints (forwchen/LLaVA-MoLE, arXiv 2401.16160): a torch file with the whole trained model.

    llm_model.base_model.model.model.layers.{i}.mlp.moe_gate.{e}.lora_A      expert e of gate_proj (or moe_up, moe_down)
    llm_model.base_model.model.model.layers.{i}.mlp.router.weight, .bias     one router per block
    llm_model.base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.default.weight
    llm_model.base_model.model.model.layers.{i}.mlp.original_module.*          copies of the base, left out
    in_adaptor.projector.{0,2}.*, vit.*                                        the visual part, left out

There is no configuration: experts and ranks come from the shapes; alpha is twice the rank in every setting that was
published. The class with which the checkpoint was released makes all experts act, its name and the paper only the best.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from adapters.formats import foreign_mixture as mixtures
from adapters.formats.foreign_mixture import Mixture, MixtureFormat, Outline

if TYPE_CHECKING:
    from adapters.formats.header import Header

_EXPERT = re.compile(
    r"^(?P<module>.+?)(?:\.experts\.(?P<expert>\d+))?\.lora_(?P<side>[AB])(?:\.default)?(?:\.weight)?$"
)
_ROUTER = re.compile(r"^(?P<module>.+\.mlp)\.router\.(?P<kind>weight|bias)$")
_OWN = re.compile(r"^(?P<block>.+\.mlp)\.moe_(?P<role>gate|up|down)\.(?P<expert>\d+)\.(?P<rest>lora_[AB])$")
_PREFIX = re.compile(r"^(module\.)?(llm_model\.)?(base_model\.model\.)?")
_SCALE = 2.0


class LlavaMole(MixtureFormat):
    """One router per feed-forward block, of whose experts a token uses the best one; plain LoRA on attention."""

    name, title, suffix, method = "llava-mole", "LLaVA-MoLE", "", "llava-mole"

    def recognises(self, head: Header) -> bool:
        return any(_OWN.match(name) for name in head.shapes)

    def outline(self, head: Header) -> Outline:
        names = {_modern(name): shape for name, shape in head.shapes.items()}
        return mixtures.outlined("llava-mole", names, {}, _EXPERT, _ROUTER)

    def mixture(self, head: Header) -> Mixture:
        """The mixture; raises :class:`InputError` if it is damaged or incomplete."""
        tensors, source = mixtures.tensors_of(head)
        named = {_modern(name): tensor for name, tensor in tensors.items()}
        halves, gates, others = mixtures.sorted_keys(named, _EXPERT, _ROUTER, None)
        if any("lora_" in name for name in others):
            mixtures.refuse_strange([name for name in others if "lora_" in name], source, "LLaVA-MoLE")
        layers = {}
        for name, pair in halves.items():
            rank = mixtures.shapes_of(name, pair, source)[0][0][0]
            layers[name] = mixtures.layer_of(name, pair, _SCALE * rank, False, source)
        routers = mixtures.routers_of(gates, layers, source)
        visual = any(name.startswith(("in_adaptor.", "vit.", "visual")) for name in others)
        notes = [f"The file does not hold alpha: {_SCALE:g} times the rank, as in every published setting."]
        if visual:
            notes.append("Its projector and vision tower are left out: only the language model's experts are read.")
        return Mixture("llava-mole", self.name, layers, routers, top_k=1, notes=tuple(notes), path=head.path)


def _modern(name: str) -> str:
    """A key without the wrappers' names, experts as ``{block}.{role}_proj.experts.{e}.lora_A``."""
    name = _PREFIX.sub("", name)
    if (own := _OWN.match(name)) is not None:
        return f"{own['block']}.{own['role']}_proj.experts.{own['expert']}.{own['rest']}"
    return name


FORMAT = LlavaMole()
