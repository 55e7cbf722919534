"""Puts PEFT LoRA layers into a model: which layers, which rank, how they start."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from adapters.errors import InputError
from adapters.formats.lora import LoraFile, LoraLayer
from adapters.layers.variant import read_layers
from pipelines.diffusion.families.base import OUTSIDE_BLOCKS, TARGETS
from studio.training.schemas.image import TrainImageConfig
from studio.training.targets import check_ranks, no_match, peft_config

ADAPTER = "default"
"""Name of the adapter inside the model."""

TEXT_ATTENTION = r"([qkv]_proj|out_proj)"
TEXT_FEED_FORWARD = r"(fc1|fc2|wi|wo|wi_0|wi_1)"

TEXT_TARGETS = {
    "attention": rf"(.*\.)?{TEXT_ATTENTION}",
    "attention-mlp": rf"(.*\.)?({TEXT_ATTENTION}|{TEXT_FEED_FORWARD})",
    "linear": r"(?!.*text_projection$).*",
    "all": r"(?!.*text_projection$).*",
}
"""Choice of layers -> regular expression of whole module names in text encoders (denoisers: the family's own)."""


@dataclass(frozen=True)
class Targets:
    """The layers of one model that get an adapter, by name."""

    linear: tuple[str, ...]
    convolution: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        return [*self.linear, *self.convolution]


def find_targets(
    model: nn.Module, config: TrainImageConfig, text: bool, targets: Mapping[str, str] = TARGETS
) -> Targets:
    """The layers of ``model`` that ``config`` chooses.

    Args:
        text: it is a text encoder.
        targets: the patterns of the family's denoiser.

    Convolutions join with targets 'all', with a ``conv_rank``, or when ``target_regex`` names them.

    Raises:
        InputError: no layer matches (near names are shown), or a layer is smaller than its rank.
    """
    pattern = (TEXT_TARGETS if text else targets)[config.targets]
    with_convolutions = config.targets == "all" or config.conv_rank > 0
    if config.target_regex:
        pattern, with_convolutions = config.target_regex, True
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    chosen = {name: module for name, module in layers.items() if re.fullmatch(pattern, name)}
    if config.conv_rank and not config.target_regex:
        outside = re.compile(OUTSIDE_BLOCKS)
        chosen |= {n: m for n, m in layers.items() if isinstance(m, nn.Conv2d) and not outside.fullmatch(n)}
    if config.exclude_regex:
        chosen = {name: m for name, m in chosen.items() if not re.fullmatch(config.exclude_regex, name)}
    if not with_convolutions:
        pointwise = _pointwise_projections(chosen)
        chosen = {n: m for n, m in chosen.items() if isinstance(m, nn.Linear) or n in pointwise}
    if not chosen:
        raise no_match(type(model).__name__, pattern, config, list(layers))
    return Targets(
        tuple(name for name, m in chosen.items() if isinstance(m, nn.Linear)),
        tuple(name for name, m in chosen.items() if isinstance(m, nn.Conv2d)),
    )


def lora_config(
    model: nn.Module, config: TrainImageConfig, text: bool = False, family: Mapping[str, str] = TARGETS
) -> LoraConfig:
    """PEFT's configuration for ``model``; ``family`` holds the patterns of the family's denoiser."""
    targets = find_targets(model, config, text, family)
    rank = config.text_encoder_rank or config.rank if text else config.rank
    alpha = config.alpha or rank
    if text and config.alpha:
        alpha = config.alpha * rank / config.rank  # the same strength as in the denoiser
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    if config.conv_rank and targets.convolution and not text:
        ranks |= {re.escape(name): config.conv_rank for name in targets.convolution}
        alphas |= {re.escape(name): config.conv_alpha or config.conv_rank for name in targets.convolution}
    made = peft_config(config, targets.all, r=rank, lora_alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas)
    check_ranks({name: layer_sizes(model, name) for name in targets.all}, made)
    return made


def inject(model: Any, made: LoraConfig) -> None:
    """Add the adapter; its weights are fp32, and only they learn."""
    model.requires_grad_(False)
    model.add_adapter(made, adapter_name=ADAPTER)
    for parameter in trainable(model):
        parameter.data = parameter.data.float()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def layer_sizes(model: nn.Module, name: str) -> tuple[int, int]:
    """(outputs, inputs) of a layer seen as a matrix."""
    module: Any = model.get_submodule(name)
    if isinstance(module, nn.Linear):  # a quantised weight has another shape
        return module.out_features, module.in_features
    return module.weight.shape[0], module.weight[0].numel()


def _pointwise_projections(chosen: Mapping[str, nn.Module]) -> set[str]:
    """1 x 1 convolutions that stand for linear layers (``proj_in`` and ``proj_out`` of SD 1.x)."""
    return {
        name
        for name, module in chosen.items()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and re.search(r"\.proj_(in|out)$", name)
    }


def count_parameters(models: dict[str, nn.Module]) -> int:
    """The number of trainable parameters."""
    return sum(p.numel() for model in models.values() for p in trainable(model))


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Layers with an adapter by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and ADAPTER in module.lora_A
    }


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The current adapter of ``model``, an ordinary LoRA: module path -> a copy of its layer."""
    return read_layers(model, ADAPTER)


def start_from(models: Mapping[str, nn.Module], file: LoraFile) -> None:
    """Set the injected adapters to those of ``file`` (fitted to the models), whose scale is folded into B.

    Raises:
        InputError: its layers, ranks or kind are not those of this configuration.
    """
    for component, model in models.items():
        layers, given = adapted_layers(model), file.parts.get(component, {})
        extra, missing = sorted(set(given) - set(layers)), sorted(set(layers) - set(given))
        if extra or (given and missing):
            raise InputError(
                f"The adapter to continue from has different layers in its {component} "
                f"({len(extra)} too many, {len(missing)} missing, e.g. '{(extra or missing)[0]}'): "
                "choose the targets it was trained with."
            )
        for name, layer in given.items():
            _set_layer(layers[name], layer, f"{component}.{name}")


def _set_layer(module: Any, layer: LoraLayer, name: str) -> None:
    a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
    if layer.rank != a.shape[0]:
        raise InputError(
            f"The adapter to continue from has rank {layer.rank} in '{name}', this configuration {a.shape[0]}: "
            f"set rank to {layer.rank}."
        )
    magnitudes = getattr(module, "lora_magnitude_vector", {})
    if (layer.magnitude is not None) != (ADAPTER in magnitudes):
        raise InputError("Only one of the adapter to continue from and this configuration is DoRA: set use_dora alike.")
    with torch.no_grad():
        a.copy_(layer.A)
        b.copy_(layer.B * (layer.scale / module.scaling[ADAPTER]))
        if layer.magnitude is not None:
            target = magnitudes[ADAPTER].weight
            target.copy_(layer.magnitude.view_as(target))
