"""The shared adapter from the server's state alone: an ordinary LoRA, without the model and without any data.

    update of a layer = s B A, s B R A (Fed-SB), or s (B A + sum of the products added to the base)

all of which are one pair of factors: R is multiplied into B, and products are put beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from adapters.federated.state import A, B, R, others
from adapters.formats import LoraFile, LoraLayer, write_diffusers
from adapters.formats.lora import MODEL
from studio import privacy
from studio.federation.client import added
from studio.federation.server import Server
from studio.training.cards import front_matter
from studio.training.export import RECIPE_ENTRY, write_model_adapter


def layers(server: Server) -> dict[str, dict[str, LoraLayer]]:
    """Component -> module path -> layer of the shared adapter."""
    state = {**server.tensors, **server.fixed}
    products: dict[str, Any] = {}
    for residual in server.residuals:
        for name, product in residual.items():
            products[name] = added(products.get(name), product)
    found: dict[str, dict[str, LoraLayer]] = {}
    for name, scale in server.scales.items():
        left, right = state.get(name + B), state.get(name + A)
        if left is not None and right is not None:
            core = state.get(name + R)
            pair = (left if core is None else left @ core, right)
            if name in products:
                pair = torch.cat([pair[0], products[name][0]], dim=1), torch.cat([pair[1], products[name][1]])
        else:  # every round began anew: only what was added is left
            pair = products[name]
        component, _, module = name.partition(".")
        rank, kernel = pair[1].shape[0], server.inputs.get(name, [pair[1].shape[1]])
        up = pair[0].reshape(*pair[0].shape, *([1, 1] if len(kernel) == 3 else []))
        layer = LoraLayer(pair[1].reshape(rank, *kernel).contiguous(), up.contiguous(), scale * rank)
        found.setdefault(component, {})[module] = layer
    return found


def write(server: Server, folder: Path, told: dict[str, Any]) -> Path:
    """Write the adapter as ``folder/NAME`` (PEFT), or ``NAME.safetensors`` for a diffusion base; returns it.

    Args:
        told: the recipe's entry on the federation.
    """
    config, made = server.config, layers(server)
    base = str(server._setting("base"))
    recipe = privacy.names_only({
        "version": 1, "job": config.kind, "name": config.name, "config": config.model_dump(mode="json"),
        "base": {"name": base, "digest": server.base}, "data": {"rows": sum(
            int(values.get("examples", 0)) for values in server.rounds[-1].clients.values()
        )}, "training": {"federated": told},
    })  # fmt: skip
    if set(made) != {MODEL}:
        file = folder / f"{config.name}.safetensors"
        write_diffusers(LoraFile(made), file, {RECIPE_ENTRY: json.dumps(recipe)})
        return file
    heads = {
        name.removeprefix(f"{MODEL}.").replace(".modules_to_save.default", ""): server.tensors[name]
        for name in others(server.tensors)
    }
    settings = SimpleNamespace(save_dtype="fp32", base=base)
    card = "\n".join([
        *front_matter(base, "peft", ["lora", "peft", "adapter-studio", "federated"]), f"# {config.name}", "",
        f"A LoRA trained by {len(server.names)} clients in {server.done} rounds with {config.method}; their data "
        "stayed with them.", "",
    ])  # fmt: skip
    return write_model_adapter(made[MODEL], folder / config.name, settings, recipe, {"README.md": card}, {}, heads)
