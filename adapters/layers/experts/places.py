"""Which modules of a model an adapter goes to, and how many experts each gets: resolved once per model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from adapters.errors import InputError
from adapters.layers.experts.config import MoeConfig, per_layer
from adapters.layers.experts.layer import ExpertBlock, ExpertLayer, Place
from adapters.layers.experts.structure import Structure, check_structure, has_experts, structure_of, unknown
from adapters.layers.sizes import is_linear

LANGUAGE = ("language_model", "text_model")
VISION = ("vision_tower", "vision_model", "visual", "vision_encoder")


def resolve(config: MoeConfig, model: nn.Module) -> dict[str, Place]:
    """Module path -> place of the new adapter; writes the resolved lists into ``config``.

    Raises:
        InputError: nothing matches, or the choices do not fit the model.
    """
    modules = originals(model)
    if config.frozen:
        return _frozen_places(config, model, modules)
    config.within = config.within if config.within is not None else _language_part(modules)
    blocks = {path: structure for path, module in modules.items() if (structure := structure_of(module)) is not None}
    targets = _targets(config, modules, blocks)
    layers = _depth(config, modules, targets)
    _resolve_lists(config, layers)
    places: dict[str, Place] = {}
    if config.placement == "ffn_block":
        places |= _block_places(config, modules, blocks, targets)
    for path in targets:
        if config.placement == "ffn_block" and path.rpartition(".")[0] in places:
            continue
        outside = not _in_block(path, blocks)
        if outside and config.attention == "none":
            continue
        places[path] = _place(config, path, "linear", plain=outside and config.attention == "plain")
    if not places:
        raise InputError("No module is left for the experts: choose other target_modules, or attention 'experts'.")
    _check_free(model, places)
    return _numbered(config, [places[path] for path in modules if path in places])


def _frozen_places(config: MoeConfig, model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, Place]:
    """X-LoRA's places: the modules that its experts have, which must be in the model, in the same order.

    Raises:
        InputError: a module is missing or not linear, or the order differs (layer-wise gates would be mixed up).
    """
    named = [str(entry["module"]) for entry in config.frozen]
    for path in named:
        if path not in modules:
            raise InputError(f"The experts adapt '{path}', which this model lacks: open the base they were trained on.")
        if not is_linear(modules[path]):
            raise InputError(
                f"An expert adapts '{path}', a {type(modules[path]).__name__}: X-LoRA mixes experts beside linear "
                "layers only."
            )
    order = [path for path in modules if path in set(named)]
    if order != named:
        wrong = next(a for a, b in zip(named, order, strict=True) if a != b)
        raise InputError(
            f"The modules of this model are in another order than when the X-LoRA was made (from '{wrong}' on), so its "
            "gates would be mixed up: open the base it was trained on."
        )
    count = len(config.experts)
    places = {
        path: Place(
            path, "linear", layer_number(path, config.layers_pattern), count, count, max(entry["ranks"]), 1.0,
            position=position,
        )
        for position, (path, entry) in enumerate(zip(named, config.frozen, strict=True))
    }  # fmt: skip
    _check_free(model, places)
    return places


def originals(model: nn.Module) -> dict[str, nn.Module]:
    """Module path -> module, as the model was before adapters were added."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            found[_original(name)] = module.get_base_layer()
            inside = (*inside, f"{name}.")
        elif not name.startswith(inside) or any(name.startswith(f"{i}base_layer.") for i in inside):
            found[_original(name)] = module
    return found


def layer_number(path: str, pattern: str) -> int | None:
    """The number of the layer that a module belongs to, None if it belongs to none."""
    match = re.search(pattern, path)
    return int(match.group(1)) if match else None


def _original(name: str) -> str:
    return name.replace(".base_layer", "")


def _language_part(modules: dict[str, nn.Module]) -> str:
    """The language model's path where there is a vision tower beside it, else empty."""
    seeing = any(path.rpartition(".")[2] in VISION for path in modules)
    spoken = next((path for path in modules if path.rpartition(".")[2] in LANGUAGE and not _seen(path)), "")
    if seeing and not spoken:
        raise InputError(
            f"The model has a vision tower but no part named {' or '.join(LANGUAGE)}: say in 'within' which part is "
            "adapted."
        )
    return spoken if seeing else ""


def _seen(path: str) -> bool:
    return any(part in VISION for part in path.split("."))


def _targets(config: MoeConfig, modules: dict[str, nn.Module], blocks: dict[str, Structure]) -> list[str]:
    """The paths of the linear layers that are targeted."""
    if config.target_modules == "all-linear":
        config.target_modules = None
    inside = f"{config.within}." if config.within else ""
    known = {path: module for path, module in modules.items() if path.startswith(inside) and path}
    if config.target_modules is None:
        found = [p for p, m in known.items() if is_linear(m) and layer_number(p, config.layers_pattern) is not None]
        found = found or [path for path, module in known.items() if is_linear(module)]
    else:
        found = [path for path in known if _matches(path, config.target_modules)]
    if config.exclude_modules:
        found = [path for path in found if not _matches(path, config.exclude_modules)]
    kept = config.modules_to_save or []
    found = [path for path in found if not any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in kept)]
    for path in found:
        if not is_linear(modules[path]):
            raise InputError(
                f"'{path}' is a {type(modules[path]).__name__}, and experts go beside linear layers: name linear "
                "layers in target_modules."
            )
    if not found:
        near = ", ".join(sorted({path.rpartition(".")[2] for path, module in known.items() if is_linear(module)})[:12])
        raise InputError(f"No module matches target_modules {config.target_modules}: linear layers here are {near}.")
    if config.target_modules is None:
        config.target_modules = sorted({path.rpartition(".")[2] for path in found})
    return found


def _matches(path: str, wanted: list[str] | str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in wanted)


def _in_block(path: str, blocks: Iterable[str]) -> bool:
    """Whether a linear layer belongs to a feed-forward block: a recognised one, or anything that is not attention."""
    parent = path.rpartition(".")[0]
    return parent in blocks or not re.search(r"att(n|ention)", parent)


def _depth(config: MoeConfig, modules: dict[str, nn.Module], targets: list[str]) -> int:
    """How many layers the stack that holds the targets has; 0 if they are in no numbered layers."""
    stacks: dict[str, int] = {}
    for path in targets:
        match = re.search(config.layers_pattern, path)
        if match:
            stack = path[: match.start(1)].rstrip(".")
            stacks[stack] = len(list(modules[stack].children())) if stack in modules else int(match.group(1)) + 1
    uneven = [name for name in ("num_experts", "r", "top_k") if _uneven(getattr(config, name))]
    lost = next((path for path in targets if layer_number(path, config.layers_pattern) is None), None)
    if uneven and lost:
        raise InputError(
            f"{uneven[0]} differs from layer to layer, but '{lost}' is in no numbered layer: leave it out of "
            "target_modules, or set layers_pattern."
        )
    if uneven and len(stacks) > 1:
        raise InputError(
            f"{uneven[0]} differs from layer to layer, but the targets are in several stacks ({', '.join(stacks)}): "
            "say in 'within' which one is adapted."
        )
    return max(stacks.values(), default=0)


def _uneven(value: Any) -> bool:
    return not isinstance(value, int | None) and (not isinstance(value, list) or len(set(value)) > 1)


def _resolve_lists(config: MoeConfig, layers: int) -> None:
    """Write one entry per layer into the configuration."""
    if config.num_layers is not None and layers != config.num_layers:
        raise InputError(
            f"The adapter was made for a model with {config.num_layers} layers, and this one has {layers}: open the "
            "base it was trained on."
        )
    if not layers:
        return
    config.num_layers = layers
    config.num_experts = per_layer("num_experts", config.num_experts, layers)
    config.r = per_layer("r", config.r, layers)
    if config.router == "topk":
        asked = config.top_k
        config.top_k = [min(2, n) for n in config.num_experts] if asked is None else per_layer("top_k", asked, layers)
        for layer, (k, n) in enumerate(zip(config.top_k, config.num_experts, strict=True)):
            if k > n and n > 1:
                raise InputError(
                    f"In layer {layer} a token would use {k} of {n} experts: set top_k to at most {n} there."
                )
            if k > n and not isinstance(asked, int | None):
                raise InputError(f"In layer {layer} a token would use {k} of {n} experts: set top_k to {n} there.")


def _at(value: Any, layer: int | None) -> int:
    if isinstance(value, list):
        return int(value[layer] if layer is not None and layer < len(value) else value[0])
    return int(value)


def _place(config: MoeConfig, path: str, kind: str, plain: bool = False, roles: tuple[str, ...] = ("",)) -> Place:
    layer = layer_number(path, config.layers_pattern)
    experts = 1 if plain else _at(config.num_experts, layer)
    rank = config.plain_r if plain and config.plain_r is not None else _at(config.r, layer)
    k = {"top1": 1, "topk": _at(config.top_k if config.top_k is not None else min(2, experts), layer)}
    if config.router == "topk" and not plain and k["topk"] > experts > 1:
        raise InputError(f"A token would use {k['topk']} of {experts} experts: set top_k to at most {experts}.")
    top_k = min(k.get(config.router, experts), experts)
    return Place(path, kind, layer, experts, top_k, rank, config.scale(rank, plain), roles)


def _block_places(
    config: MoeConfig, modules: dict[str, nn.Module], blocks: dict[str, Structure], targets: list[str]
) -> dict[str, Place]:
    places: dict[str, Place] = {}
    tried: set[type] = set()
    for parent in dict.fromkeys(path.rpartition(".")[0] for path in targets):
        block = modules[parent]
        if parent not in blocks:
            if _in_block(f"{parent}.", blocks) and layer_number(parent, config.layers_pattern) is not None:
                raise unknown(parent, block)
            continue
        structure = blocks[parent]
        if type(block) not in tried:
            check_structure(block, structure, parent)
            tried.add(type(block))
        names = {path.rpartition(".")[2] for path in targets if path.rpartition(".")[0] == parent}
        roles = tuple(role for role, name in structure.roles.items() if name in names)
        places[parent] = _place(config, parent, "block", roles=roles)
    if not places:
        mixture = next((path for path, module in modules.items() if has_experts(module)), None)
        if mixture is not None:
            raise InputError(
                f"'{mixture}' is a mixture of experts already: adapt its experts with an ordinary LoRA "
                "(target_parameters of PEFT)."
            )
        raise InputError(
            "Experts that are whole feed-forward blocks need linear layers of such blocks among the targets "
            "(gate_proj, up_proj, down_proj ...), and there are none: add them, or choose the placement 'linear'."
        )
    return places


def _check_free(model: nn.Module, places: dict[str, Place]) -> None:
    """Refuse a linear layer inside a block that has experts as a whole, and the reverse."""
    taken = {_original(name): module for name, module in model.named_modules() if isinstance(module, ExpertLayer)}
    for path, module in taken.items():
        for place in places.values():
            block, linear = (path, place.path) if isinstance(module, ExpertBlock) else (place.path, path)
            if linear.startswith(f"{block}."):
                raise InputError(
                    f"'{linear}' would get experts from two sides, of its own and those of the block '{block}': use "
                    "the same placement for both adapters, or open the base again."
                )


def _numbered(config: MoeConfig, places: list[Place]) -> dict[str, Place]:
    count, found = 0, {}
    for place in places:
        routed = place.experts > 1 or not config.routed
        found[place.path] = replace(place, position=count if routed else 0)
        count += routed
    return found
