"""Match an adapter to a model: find the module of every layer and check every shape.

A layer without a module, or of the wrong shape, means that the adapter was made for another model. That is an error
that names the layer and both shapes; an adapter is never loaded in part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.errors import FamilyError, InputError, nearest
from adapters.formats.lora import MODEL, TEXT_ENCODERS, LoraFile, LoraLayer


def fit(
    file: LoraFile, models: Mapping[str, nn.Module], base: str = "this base model", tables: bool = True
) -> LoraFile:
    """``file`` with the module paths of ``models`` and layers in the shapes of their modules.

    Args:
        file: an adapter as read.
        models: component ("unet", "text_encoder", ...) -> model.
        base: name of the base model in messages.
        tables: whether adapters on embeddings are allowed.

    Raises:
        FamilyError: the models lack a component or module, a shape differs, or the file's copy of a base weight does.
        InputError: the file has no layers, two layers for one module, a module that takes no LoRA, or embeddings
            although ``tables`` is False.
    """
    if not any(file.parts.values()):
        raise InputError(f"{_source(file)} holds no LoRA layers.")
    if set(models) == {MODEL} and len(file.parts) == 1:  # a file for a single model may name its component otherwise
        copies = {MODEL: next(iter(file.copies.values()), {})}
        file = replace(file.with_parts({MODEL: next(iter(file.parts.values()))}, file.flat), copies=copies)
    parts: dict[str, dict[str, LoraLayer]] = {}
    for component, layers in file.parts.items():
        if component not in models:
            raise FamilyError(
                f"{_source(file)} adapts the part '{component}', which {base} does not have "
                f"(it has {', '.join(models)}): the adapter was made for another family."
            )
        names = {name: module for name, module in models[component].named_modules() if name}
        lookup = module_names(names, flat=file.flat, text=component in TEXT_ENCODERS)
        fitted: dict[str, LoraLayer] = {}
        if unmatched := [written for written in layers if written not in lookup]:
            where = "" if component == MODEL else f" in its {component}"
            others = f" ({len(unmatched)} of the {len(layers)} layers find none: {_listed(unmatched)})"
            raise FamilyError(
                f"{_source(file)}: {base} has no module '{unmatched[0]}'{where}{nearest(unmatched[0], lookup)}"
                f"{others if len(unmatched) > 1 else ''}: the adapter was made for another model."
            )
        for written, layer in layers.items():
            module = lookup[written]
            if module in fitted:
                raise InputError(f"{_source(file)}: two layers for the module '{_shown(component, module)}'.")
            shown = _shown(component, module)
            fitted[module] = fit_layer(layer, names[module], shown, _source(file), base)
            if fitted[module].embedding and not tables:
                raise InputError(
                    f"{_source(file)} changes the embeddings '{shown}', but only adapters on linear layers and "
                    "convolutions can be used here."
                )
        for written, weight in file.copies.get(component, {}).items():
            check_copy(weight, names.get(lookup.get(written, "")), _shown(component, written), _source(file), base)
        parts[component] = fitted
    return file.with_parts(parts)


def fit_layer(layer: LoraLayer, module: nn.Module, name: str, source: str, base: str) -> LoraLayer:
    """``layer`` in the shape of ``module``: 1 x 1 kernels are added for convolutions and dropped for linear layers.

    Raises:
        FamilyError: the sizes differ, or an embedding layer meets another module.
        InputError: the module is not Linear (or GPT-2's Conv1D), Conv2d or Embedding, or is a grouped or non-zero
            padded convolution.
    """
    if layer.embedding and not isinstance(module, nn.Embedding):
        raise FamilyError(
            f"{source} changes the embeddings '{name}', but in {base} that is a {type(module).__name__}: the adapter "
            "was made for another model."
        )
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
        if layer.A.ndim == 2 and layer.A.shape[1] == module.weight[0].numel():  # LyCORIS flattens kernels
            down = layer.A.reshape(layer.A.shape[0], *wanted[1:])
        else:
            down = layer.A if layer.A.ndim == 4 else layer.A[..., None, None]
        up = layer.B if layer.B.ndim == 4 else layer.B[..., None, None]
    elif isinstance(module, nn.Embedding):  # some programs write lora_A and lora_B here too
        wanted, down, up = (module.embedding_dim, module.num_embeddings), layer.A, layer.B
    else:
        raise InputError(
            f"{source}: '{name}' is a {type(module).__name__}; only Linear, Conv2d and Embedding take a LoRA here."
        )
    found = (up.shape[0], *down.shape[1:])
    if found != wanted:
        raise FamilyError(
            f"{source} does not fit {base}: layer '{name}' updates a weight of shape {found}, "
            f"the model's is {wanted}. It was made for another family or size."
        )
    return replace(layer, A=down, B=up, embedding=isinstance(module, nn.Embedding))


def check_copy(weight: Tensor, module: nn.Module | None, name: str, source: str, base: str) -> None:
    """Check that a weight stored with the adapter by PEFT equals the base's, up to the rounding of its dtype.

    Raises:
        FamilyError: it differs, for example after a longer vocabulary or a trained table.
    """
    own = getattr(module, "weight", None)
    if isinstance(own, Tensor) and own.is_floating_point() and own.shape == weight.shape:
        coarse = max((torch.finfo(weight.dtype), torch.finfo(own.dtype)), key=lambda kind: kind.eps)
        if torch.allclose(weight.float(), own.detach().cpu().float(), rtol=coarse.eps, atol=coarse.tiny):
            return
    raise FamilyError(
        f"{source} has its own weight for '{name}', which is not that of {base}: it was trained on another base, or "
        "with a changed vocabulary."
    )


def module_names(names: Iterable[str], flat: bool, text: bool) -> dict[str, str]:
    """Name that a file may use -> path of the module in the model.

    Args:
        names: module paths.
        flat: files may write "_" for ".".
        text: it is a text encoder, whose level "text_model" files may have or not.
    """
    table: dict[str, str] = {}
    for name in names:
        table.setdefault(name, name)
        if text:
            # transformers 5 dropped the level "text_model" of CLIPTextModel; old and new files must fit both
            short = name.removeprefix("text_model.")
            table.setdefault(short, name)
            table.setdefault(f"text_model.{short}", name)
    if not flat:
        return table
    flattened: dict[str, str] = {}
    for written, name in table.items():
        flattened.setdefault(written.replace(".", "_"), name)
    return flattened


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def _shown(component: str, module: str) -> str:
    """The name of a module in messages; without its component for a single model."""
    return module if component == MODEL else f"{component}.{module}"


def _source(file: LoraFile) -> str:
    return f"'{file.path.name}'" if file.path else "The adapter"
