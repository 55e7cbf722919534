"""Directories with a mixture of experts: ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from adapters.errors import InputError, nearest
from adapters.files import write_text
from adapters.formats.header import CONFIG
from adapters.formats.lora import MODEL, LoraFile, LoraLayer
from adapters.formats.mixture import mixture_config
from adapters.formats.peft_directory import PREFIX
from adapters.layers.experts.config import MoeConfig
from adapters.layers.experts.frozen import constant

WEIGHTS = "adapter_model.safetensors"


def write(
    model: Any, place: Path, dtype: torch.dtype, base: str, metadata: Mapping[str, str], adapter: str = "default"
) -> Path:
    """Write an adapter of a PEFT model; returns ``place``. Routers stay fp32.

    Args:
        place: the directory, which is made.
        base: name of the base, for other programs.
        metadata: text entries of the file with the weights.

    Raises:
        InputError: numbers that are not finite, or a full disk.
    """
    from adapters.formats.tensors import write_tensors

    tensors = {
        name: tensor.detach().cpu().to(torch.float32 if "moeadapter_router" in name else dtype).contiguous()
        for name, tensor in get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False).items()
    }
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"The adapter holds numbers that are not finite in '{name}': not saved.")
    place.mkdir(parents=True, exist_ok=True)
    config = {**model.peft_config[adapter].to_dict(), "base_model_name_or_path": base, "inference_mode": True}
    config |= {name: sorted(value) for name, value in config.items() if isinstance(value, set)}  # PEFT shortens lists
    write_tensors(place / WEIGHTS, tensors, metadata)
    write_text(place / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return place


def read(path: Path) -> tuple[MoeConfig, dict[str, Tensor]]:
    """The configuration and tensors of an adapter.

    Raises:
        InputError: a file is missing, damaged, or not of this kind.
    """
    from adapters.formats.tensors import check_finite, read_tensors

    values = mixture_config(path)
    if values is None:
        raise InputError(f"'{path}' is not a directory with a mixture of experts.")
    if not (path / WEIGHTS).is_file():
        raise InputError(f"The adapter '{path}' has no {WEIGHTS}.")
    try:
        config = MoeConfig(**MoeConfig.check_kwargs(**values))
    except TypeError as error:
        raise InputError(f"The configuration of '{path}' is damaged: {error}.") from None
    tensors, _ = read_tensors(path / WEIGHTS)
    check_finite(tensors, f"'{path}'")
    return config, tensors


def with_gates(path: Path, gates: Mapping[str, float] | Sequence[float]) -> LoraFile:
    """The X-LoRA at ``path`` with constant gates: one ordinary LoRA, exactly; the base is not needed.

    Args:
        gates: of the experts by name (others 0), or of all in their order.

    Raises:
        InputError: it is no X-LoRA, the gates do not fit its experts, or an expert with a gate is DoRA.
    """
    config, tensors = read(path)
    names = [str(one["name"]) for one in config.experts]
    if not names:
        raise InputError(
            f"'{path.name}' is a {config.preset or 'mixture'}, not an X-LoRA: only its gates can be constant."
        )
    given = [0.0] * len(names) if isinstance(gates, Mapping) else list(gates)
    for name, gate in gates.items() if isinstance(gates, Mapping) else ():
        if name not in names:
            raise InputError(f"The X-LoRA has no expert '{name}'{nearest(name, names)}: it has {', '.join(names)}.")
        given[names.index(name)] = gate
    if len(given) != len(names):
        raise InputError(f"{len(given)} gates were given for {len(names)} experts ({', '.join(names)}).")
    weight = float(config.classifier.get("weight", 1.0))
    layers: dict[str, LoraLayer] = {}
    for entry in config.frozen:
        start = f"{PREFIX}{entry['module']}.moeadapter_"
        A, B, rows = (tensors.get(f"{start}{kind}") for kind in ("A", "B", "rows"))
        if A is None or B is None or A.shape[0] != sum(entry["ranks"]):
            raise InputError(f"'{path.name}' lacks the experts of '{entry['module']}', which its configuration names.")
        layers[str(entry["module"])] = constant(A, B, rows, entry["ranks"], given, weight, str(entry["module"]))
    return LoraFile({MODEL: layers}, path=path, config={"base_model_name_or_path": config.base_model_name_or_path})


def load(model: nn.Module, path: Path, adapter: str = "default") -> MoeConfig:
    """Add the adapter at ``path``, ours or another program's, to a model, frozen and active; returns its configuration.

    Raises:
        InputError: it cannot be read, or was made for another base.
    """
    from peft import inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import cast_adapter_dtype

    from adapters.layers.experts import importing

    if mixture_config(path) is None and (foreign := importing.mixture_at(path)) is not None:
        made: Any = importing.add(model, foreign, adapter, inference_mode=True).peft_config[adapter]
        return made
    config, tensors = read(path)
    config.inference_mode = True
    inject_adapter_in_model(config, model, adapter)
    cast_adapter_dtype(model, adapter)
    set_peft_model_state_dict(model, tensors, adapter_name=adapter)
    return config
