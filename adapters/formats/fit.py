"""Lay an adapter onto a model: find each layer's module, check every shape, leave nothing over.

A layer that finds no module, or the wrong shape, means that the adapter was made for another model. That is an error
which names the layer and both shapes; loading part of an adapter is never right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters.errors import FamilyError, InputError, nearest
from adapters.formats.lora import TEXT_ENCODERS, LoraFile, LoraLayer


def fit(file: LoraFile, models: Mapping[str, nn.Module], base: str = "this base model") -> LoraFile:
    """``file`` with the module paths of ``models`` and layers shaped as their modules need.

    Args:
        file: what was read.
        models: component -> model ("unet", "text_encoder", ...).
        base: what to call the base model in messages.

    Raises:
        FamilyError: a component, module or shape the models do not have.
        InputError: nothing to load, or two layers for one module.
    """
    if not any(file.parts.values()):
        raise InputError(f"{_source(file)} holds no LoRA layers.")
    parts: dict[str, dict[str, LoraLayer]] = {}
    for component, layers in file.parts.items():
        if component not in models:
            raise FamilyError(
                f"{_source(file)} adapts the part '{component}', which {base} does not have "
                f"(it has {', '.join(models)}): the adapter was made for another family."
            )
        names = {name: module for name, module in models[component].named_modules() if name}
        lookup = _lookup(names, flat=file.flat, text=component in TEXT_ENCODERS)
        fitted: dict[str, LoraLayer] = {}
        for written, layer in layers.items():
            module = lookup.get(written)
            if module is None:
                raise FamilyError(
                    f"{_source(file)}: {base} has no module '{written}' in its {component}"
                    f"{nearest(written, lookup)}: the adapter was made for another model."
                )
            if module in fitted:
                raise InputError(f"{_source(file)}: two layers for the module '{component}.{module}'.")
            fitted[module] = fit_layer(layer, names[module], f"{component}.{module}", _source(file), base)
        parts[component] = fitted
    return file.with_parts(parts)


def fit_layer(layer: LoraLayer, module: nn.Module, name: str, source: str, base: str) -> LoraLayer:
    """``layer`` in the shape of ``module``: 1 x 1 kernels are added for convolutions and dropped for linear layers.

    Raises:
        FamilyError: the sizes differ.
        InputError: a module that is neither Linear (GPT-2's Conv1D is one) nor Conv2d.
    """
    if isinstance(module, nn.Linear | Conv1D):
        wanted: tuple[int, ...] = (
            (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
        )
        down = layer.A.flatten(1) if layer.A.shape[2:] in ((), (1, 1)) else layer.A
        up = layer.B.flatten(1)
    elif isinstance(module, nn.Conv2d):
        if module.groups != 1 or module.padding_mode != "zeros":
            raise InputError(f"{source}: grouped or non-zero padded convolutions ('{name}') are not supported.")
        wanted = (module.out_channels, module.in_channels, *module.kernel_size)
        if layer.A.ndim == 2 and layer.A.shape[1] == module.weight[0].numel():  # LyCORIS writes kernels flat
            down = layer.A.reshape(layer.A.shape[0], *wanted[1:])
        else:
            down = layer.A if layer.A.ndim == 4 else layer.A[..., None, None]
        up = layer.B if layer.B.ndim == 4 else layer.B[..., None, None]
    else:
        raise InputError(f"{source}: '{name}' is a {type(module).__name__}; only Linear and Conv2d take a LoRA here.")
    found = (up.shape[0], *down.shape[1:])
    if found != wanted:
        raise FamilyError(
            f"{source} does not fit {base}: layer '{name}' updates a weight of shape {found}, "
            f"the model's is {wanted}. It was made for another family or size."
        )
    return replace(layer, A=down, B=up)


def _lookup(names: Iterable[str], flat: bool, text: bool) -> dict[str, str]:
    """What a file may call a module -> the module's path in the model."""
    table: dict[str, str] = {}
    for name in names:
        table.setdefault(name, name)
        if text:
            # transformers 5 dropped the level "text_model" of CLIPTextModel; files of all ages must fit both
            short = name.removeprefix("text_model.")
            table.setdefault(short, name)
            table.setdefault(f"text_model.{short}", name)
    if not flat:
        return table
    flattened: dict[str, str] = {}
    for written, name in table.items():
        flattened.setdefault(written.replace(".", "_"), name)
    return flattened


def _source(file: LoraFile) -> str:
    return f"'{file.path.name}'" if file.path else "The adapter"
