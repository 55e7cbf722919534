"""The layout of TUDB-Labs' programs: MixLoRA (also its PyPI package), and MoE-PEFT's MixLoRA, MoLA and LoRAMoE.

    {method}.layers.{i}.self_attn.q_proj.lora_A.weight                  plain LoRA (MixLoRA's attention)
    {method}.layers.{i}.mlp.up_proj.experts.{e}.lora_A.weight           expert e
    mixlora.layers.{i}.mlp.moe_gate.weight                              router of a block (MixLoRA)
    {method}.layers.{i}.mlp.up_proj.moe_gate.weight                     router of a linear layer (MoLA, LoRAMoE)
    mixlora.layers.{i}.gate.weight, .experts.{e}.w1_proj.lora_A.weight older files: w1 = gate, w2 = down, w3 = up

in ``adapter_model.bin``; the first number of a path counts the model's layers, whatever their container is called.
These programs never store DoRA's magnitudes, so a MixDoRA file is a MixLoRA, as it is for the program that wrote it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import files
from adapters.errors import InputError
from adapters.formats import foreign_mixture as mixtures
from adapters.formats.foreign_mixture import Method, Mixture, MixtureFormat, Outline
from adapters.formats.header import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from adapters.formats.header import Header

_METHODS: Mapping[str, Method] = {"MIXLORA": "mixlora", "MOLA": "mola", "LORAMOE": "loramoe"}
_START = re.compile(r"^(mixlora|mola|loramoe)\.layers\.\d+\.")
_EXPERT = re.compile(r"^(?P<module>.+?)(?:\.experts\.(?P<expert>\d+))?\.lora_(?P<side>[AB])\.weight$")
_ROUTER = re.compile(r"^(?P<module>.+)\.moe_gate\.(?P<kind>weight)$")
_OLD_EXPERT = re.compile(
    r"^(?P<layer>layers\.\d+)\.experts\.(?P<expert>\d+)\.(?P<name>\w+)\.(?P<rest>lora_[AB]\.weight)$"
)
_OLD_ROUTER = re.compile(r"^(?P<layer>layers\.\d+)\.gate\.weight$")
_OLD_NAMES = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}
_STRATEGIES = ("mixlora", "mixtral", "mola", "loramoe")


class MoePeft(MixtureFormat):
    """MixLoRA, and what MoE-PEFT stores in its form."""

    name, title, suffix, method = "moe-peft", "MixLoRA, MoE-PEFT", "", "mixlora"

    def recognises(self, head: Header) -> bool:
        return _kind(head) is not None

    def outline(self, head: Header) -> Outline:
        method = _kind(head) or "mixlora"
        config, names = head.config, {_modern(name): shape for name, shape in head.shapes.items()}
        base = mixtures.text(config, "base_model_name_or_path")
        return mixtures.outlined(method, names, config, _EXPERT, _ROUTER, base)

    def mixture(self, head: Header) -> Mixture:
        """The mixture; raises :class:`InputError` if it is damaged, incomplete, or of a routing we do not compute."""
        tensors, source = mixtures.tensors_of(head)
        if not (config := head.config):
            raise InputError(
                f"{source} is a mixture of experts, but '{CONFIG}', which holds its alpha, is missing: copy the whole "
                "directory."
            )
        method = _kind(head) or "mixlora"
        strategy = mixtures.text(config, "routing_strategy") or method
        if strategy not in _STRATEGIES:
            raise InputError(
                f"{source} routes by '{strategy}', and read are {', '.join(_STRATEGIES)}: this one cannot be imported."
            )
        found = mixtures.sorted_keys({_modern(name): t for name, t in tensors.items()}, _EXPERT, _ROUTER, None)
        halves, gates, strange = found
        mixtures.refuse_strange(strange, source, mixtures.TITLES[method])
        own = config.get("expert_lora")
        experts = {**config, **own} if isinstance(own, dict) else config
        layers = {}
        for module, pair in halves.items():
            used = experts if module in gates or module.rpartition(".")[0] in gates else config
            alpha = mixtures.number(used, "lora_alpha", source)
            layers[module] = mixtures.layer_of(module, pair, alpha, bool(used.get("use_rslora")), source)
            mixtures.check_said(used, "r", [layers[module].rank], "for the rank", source)
        routers = mixtures.routers_of(gates, layers, source)
        many = [one.experts for name, one in layers.items() if name in routers or name.rpartition(".")[0] in routers]
        mixtures.check_said(config, "num_experts", many, "experts", source)
        notes = []
        if experts.get("use_dora"):
            notes.append("It was trained with DoRA, but its program never stores the magnitudes: it acts as MixLoRA.")
        dense = method == "loramoe"
        return Mixture(
            method, self.name, layers, routers,
            top_k=None if dense else int(mixtures.number(config, "top_k", source, 2)), dense=dense,
            dropout=_dropout(config), activation=mixtures.text(config, "act_fn"),
            base=mixtures.text(config, "base_model_name_or_path"), notes=tuple(notes), path=head.path,
        )  # fmt: skip


def write_mixlora(mixture: Mixture, folder: Path, base: str = "") -> Path:
    """Write a MixLoRA mixture as the directory that the ``mixlora`` package and MoE-PEFT load; returns the folder.

    Raises:
        InputError: it is another method, its module names are not numbered layers, or its experts differ in number,
            rank or scale, which the format's one configuration cannot say.
    """
    import torch

    title = mixtures.TITLES[mixture.method]
    if mixture.method != "mixlora":
        raise InputError(f"MixLoRA's own format holds MixLoRA mixtures, and this one is {title}.")
    short = {name: _short(name) for name in (*mixture.layers, *mixture.routers)}
    routed = {name: layer for name, layer in mixture.layers.items() if mixture.router_of(name)}
    plain = {name: layer for name, layer in mixture.layers.items() if name not in routed}
    for group in (routed, plain):
        if len({(layer.experts, layer.rank, layer.scale) for layer in group.values()}) > 1:
            raise InputError("MixLoRA's own format has one number of experts, one rank and one alpha for all layers.")
    tensors: dict[str, Any] = {
        f"mixlora.{short[name]}.moe_gate.weight": router.weight.clone() for name, router in mixture.routers.items()
    }
    for name, layer in mixture.layers.items():
        for e in range(layer.experts):
            middle = f".experts.{e}" if name in routed else ""
            tensors[f"mixlora.{short[name]}{middle}.lora_A.weight"] = layer.A[e].clone()
            tensors[f"mixlora.{short[name]}{middle}.lora_B.weight"] = layer.B[e].clone()
    inside, outside = next(iter(routed.values())), next(iter(plain.values()), None)
    like = outside or inside
    config: dict[str, Any] = {
        "peft_type": "MIXLORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base or mixture.base,
        "bias": "none",
        "routing_strategy": "mixlora", "num_experts": inside.experts, "top_k": mixture.top_k or min(2, inside.experts),
        "r": like.rank, "lora_alpha": _whole(like.scale * like.rank), "lora_dropout": float(mixture.dropout),
        "target_modules": sorted({name.rpartition(".")[2] for name in mixture.layers}),
    }  # fmt: skip
    if mixture.activation:  # the mixlora package does not find it out itself
        config["act_fn"] = mixture.activation
    if (inside.rank, inside.scale) != (like.rank, like.scale):
        config["expert_lora"] = {
            "r": inside.rank, "lora_alpha": _whole(inside.scale * inside.rank), "lora_dropout": float(mixture.dropout),
        }  # fmt: skip
    files.write(folder / WEIGHTS[1], lambda part: torch.save(tensors, part))
    files.write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return folder


def _whole(alpha: float) -> float | int:
    """An alpha as their loader wants it: a whole number where it is one."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-6 else alpha


def _short(name: str) -> str:
    found = re.search(r"(?:^|\.)(?:layers|h|blocks?)\.(\d+\..+)$", name)
    if found is None:
        raise InputError(f"'{name}' is in no numbered layer, as MixLoRA's own format needs.")
    return f"layers.{found[1]}"


def _dropout(config: Mapping[str, Any]) -> float:
    value = config.get("lora_dropout")
    return float(value) if isinstance(value, int | float) and 0 <= value < 1 else 0.0


def _kind(head: Header) -> Method | None:
    """The method by the configuration, or by the first key; None if it is not of these programs."""
    said = str(head.config.get("peft_type") or "").rpartition(".")[2].upper()
    if said in _METHODS:
        return _METHODS[said]
    found = next((match[1] for name in head.shapes if (match := _START.match(name)) is not None), None)
    return next((method for method in _METHODS.values() if method == found), None)


def _modern(name: str) -> str:
    """A key without its method, in the newer spelling."""
    name = re.sub(r"^(mixlora|mola|loramoe)\.", "", name)
    if (old := _OLD_EXPERT.match(name)) is not None:
        place = _OLD_NAMES.get(old["name"], old["name"])
        return f"{old['layer']}.mlp.{place}.experts.{old['expert']}.{old['rest']}"
    if (old := _OLD_ROUTER.match(name)) is not None:
        return f"{old['layer']}.mlp.moe_gate.weight"
    return name


FORMAT = MoePeft()
