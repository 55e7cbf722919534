"""A mixture of another program on a model: its experts and routers as the layers of our tuner.

    file = mixture_at(path)              # None if it is something else
    model = add(base, file)              # MixLoRA, MoE-PEFT, MoLA, LoRAMoE, LLaVA-MoLE, X-LoRA, PEFT's X-LoRA

Where a file leaves out the first parts of its paths, the module of the model that ends with them is meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from adapters.errors import FamilyError, InputError
from adapters.formats import read
from adapters.formats.fit import fit
from adapters.formats.foreign_mixture import TITLES, Method, Mixture, MixtureFormat, MixtureLayer, MixtureRouter
from adapters.formats.format import recognise
from adapters.formats.lora import MODEL
from adapters.formats.reading import header_of
from adapters.formats.xlora import NamedExpert, XLoraFile
from adapters.layers.experts import xlora
from adapters.layers.experts.config import LAYERS_PATTERN, MoeConfig
from adapters.layers.experts.layer import ExpertBlock, ExpertLayer
from adapters.layers.experts.model import expert_layers
from adapters.layers.experts.places import VISION, layer_number, originals
from adapters.layers.experts.presets import preset
from adapters.layers.sizes import sizes

ADAPTER = "default"


@torch.no_grad()
def mixture_of(model: nn.Module, adapter: str = ADAPTER) -> Mixture:
    """The mixture of a model, to be written in another program's layout.

    Raises:
        InputError: it has DoRA experts or no routers of its own, which no layout holds.
    """
    layers: dict[str, MixtureLayer] = {}
    routers: dict[str, MixtureRouter] = {}
    config: MoeConfig | None = None
    for path, place in expert_layers(model).items():
        if adapter not in place.places:
            continue
        config = place.settings[adapter]
        if not config.routed or config.expert_kind == "dora":
            raise InputError("Other programs' layouts hold LoRA experts with routers: this mixture has other ones.")
        for role in place.places[adapter].roles:
            own = place.factors(adapter, role)
            name = f"{path}.{place.structure.roles[role]}" if isinstance(place, ExpertBlock) else path
            layers[name] = MixtureLayer(own.A.detach().float().cpu(), own.B.detach().float().cpu(), own.scale)
        if adapter in place.moeadapter_router:
            router: Any = place.moeadapter_router[adapter]
            bias = None if router.bias is None else router.bias.detach().cpu()
            routers[path] = MixtureRouter(router.weight.detach().cpu(), bias)
    if config is None:
        raise InputError(f"The model has no expert adapter named '{adapter}'.")
    top_k = max(config.top_k) if isinstance(config.top_k, list) else config.top_k
    return Mixture(
        cast(Method, config.preset or "mixlora"), "memory", layers, routers, top_k=top_k,
        dense=config.router == "dense", dropout=config.lora_dropout, base=config.base_model_name_or_path or "",
        activation=getattr(getattr(model, "config", None), "hidden_act", None) or "",
    )  # fmt: skip


def mixture_at(path: Path) -> Mixture | XLoraFile | None:
    """The mixture of another program at ``path``; None if it is something else.

    Raises:
        InputError: it is one, but damaged or not supported; or it cannot be opened at all.
    """
    head = header_of(path)
    format = recognise(head)
    return format.mixture(head) if isinstance(format, MixtureFormat) else None


def add(model: Any, file: Mixture | XLoraFile, adapter: str = ADAPTER, **more: Any) -> PeftModel:
    """``model`` (which is changed) with the mixture.

    Args:
        more: further fields of the configuration.

    Raises:
        FamilyError: the model lacks a module, or has one of another size.
        InputError: an expert of an X-LoRA is not there, or the mixture has a form that the tuner does not compute.
    """
    if isinstance(file, XLoraFile):
        return xlora.from_file(model, file, [_expert(one, model) for one in file.experts], adapter)
    modules = originals(model)
    layers = {_found(name, modules): layer for name, layer in file.layers.items()}
    routers = {_found(name, modules): router for name, router in file.routers.items()}
    _check(file, model, layers, modules)
    config = _config(file, layers, routers, modules, more)
    wrapped = get_peft_model(model, config, adapter_name=adapter)
    with torch.no_grad():
        for path, place in expert_layers(model).items():
            if adapter in place.places:
                _fill(place, path, adapter, layers, routers)
    return wrapped


def _expert(one: NamedExpert, model: Any) -> xlora.Expert:
    if one.path is None:
        raise InputError(
            f"The X-LoRA mixes an adapter '{one.name}' that is not where it says: put it beside, as "
            f"'adapters/{one.name}'."
        )
    return xlora.expert(one.name, fit(read(one.path), {MODEL: model}))


def _found(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The one module that ``name`` means; not one of a vision tower, if there is another."""
    if name in modules:
        return name
    ends = [path for path in modules if path.endswith(f".{name}")]
    spoken = [path for path in ends if not any(part in VISION for part in path.split("."))]
    ends = spoken or ends
    if len(ends) != 1:
        there = f"has {len(ends)} such modules" if ends else "lacks it"
        raise FamilyError(f"The mixture adapts '{name}', and this base {there}: it was made for another model.")
    return ends[0]


def _check(file: Mixture, model: Any, layers: Mapping[str, MixtureLayer], modules: Mapping[str, nn.Module]) -> None:
    for path, layer in layers.items():
        found = (int(layer.B.shape[1]), int(layer.A.shape[2]))
        if found != sizes(modules[path]):
            raise FamilyError(
                f"The mixture is for a matrix {found} in '{path}', but this base has {sizes(modules[path])} there."
            )
    own = getattr(getattr(model, "config", None), "hidden_act", None)
    if file.activation and own and file.activation != own:
        raise InputError(
            f"The mixture was trained with the activation '{file.activation}', but this base has '{own}': it would "
            "compute something else."
        )


def _config(
    file: Mixture,
    layers: Mapping[str, MixtureLayer],
    routers: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    more: Mapping[str, Any],
) -> MoeConfig:
    routed = {path: layer for path, layer in layers.items() if path in routers or path.rpartition(".")[0] in routers}
    plain = {path: layer for path, layer in layers.items() if path not in routed}
    if not routed:
        raise InputError(f"The {TITLES[file.method]} file has no experts with a router: it is an ordinary LoRA.")
    depth = _depth(routed, modules)
    experts = _per_layer({path: layer.experts for path, layer in routed.items()}, depth, "experts")
    ranks = _per_layer({path: layer.rank for path, layer in routed.items()}, depth, "ranks")
    first, other = next(iter(routed.values())), next(iter(plain.values()), None)
    fields: dict[str, Any] = {
        "target_modules": list(layers), "num_experts": experts, "r": ranks, "lora_alpha": first.scale * first.rank,
        "expert_kind": "lora", "router_bias": any(router.bias is not None for router in routers.values()),
        "aux_loss": "none", "aux_coefficient": 0.0, "lora_dropout": file.dropout, "task_type": "CAUSAL_LM",
        "base_model_name_or_path": file.base or None,
    }  # fmt: skip
    if other is not None:
        if len({layer.rank for layer in plain.values()}) > 1:
            raise InputError("The mixture has plain LoRAs of several ranks beside its experts: it cannot be used.")
        fields |= {"attention": "plain", "plain_r": other.rank, "plain_alpha": other.scale * other.rank}
    elif file.method in ("mola", "loramoe"):
        fields |= {"attention": "experts"}
    if file.method in ("mixlora", "mola"):
        count = experts if isinstance(experts, list) else [experts] * depth
        fields |= {"top_k": [min(file.top_k or 2, n) for n in count] if depth else min(file.top_k or 2, max(count))}
    return preset(file.method, **fields | dict(more))


def _depth(paths: Iterable[str], modules: Mapping[str, nn.Module]) -> int:
    """The number of layers in the stack that the paths are in; 0 if they are in none."""
    numbers = [number for path in (*paths, *modules) if (number := layer_number(path, LAYERS_PATTERN)) is not None]
    return max(numbers, default=-1) + 1


def _per_layer(values: Mapping[str, int], depth: int, what: str) -> Any:
    """One number per layer of the model (1 where a layer has none), or one for all."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    by_layer: dict[int, set[int]] = {}
    for path, value in values.items():
        number = layer_number(path, LAYERS_PATTERN)
        by_layer.setdefault(-1 if number is None else number, set()).add(value)
    mixed = next((number for number, found in by_layer.items() if len(found) > 1 or number < 0), None)
    if mixed is not None:
        raise InputError(f"The mixture has different {what} within layer {mixed}, which cannot be used.")
    return [min(by_layer.get(number, {1})) for number in range(depth)]


def _fill(
    place: ExpertLayer, path: str, adapter: str, layers: Mapping[str, MixtureLayer], routers: Mapping[str, Any]
) -> None:
    """Put the file's numbers into one place; a scale that the configuration does not give goes into B."""
    for role in place.places[adapter].roles:
        given = layers[f"{path}.{place.structure.roles[role]}" if isinstance(place, ExpertBlock) else path]
        own = place.factors(adapter, role)
        own.A.copy_(given.A)
        own.B.copy_(given.B * (given.scale / own.scale))
    if adapter in place.moeadapter_router:
        router: Any = place.moeadapter_router[adapter]
        router.weight.copy_(routers[path].weight)
        if router.bias is not None:
            bias = routers[path].bias
            router.bias.copy_(torch.zeros_like(router.bias) if bias is None else bias)
