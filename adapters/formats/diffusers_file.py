"""diffusers' LoRA files: keys ``component.module.lora_A.weight`` and the PEFT configuration as text metadata.

alpha is taken from ``.alpha`` tensors, else from the entry ``lora_adapter_metadata`` (JSON with keys
``component.option``); where there is neither, diffusers' rule alpha = r holds. Files from before PEFT ("attn procs",
with or without the prefix ``unet.``) are read too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError
from adapters.formats.format import TensorFormat
from adapters.formats.keys import (
    group_tensors,
    guess_component,
    layer_of,
    split_component,
    written_alpha,
)
from adapters.formats.lora import LoraFile, LoraLayer, group_dict
from adapters.formats.peft_config import alpha_of, config_of
from adapters.formats.peft_options import check_options
from adapters.formats.words import write_beside

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats.header import Header

CONFIG_ENTRY = "lora_adapter_metadata"


class Diffusers(TensorFormat):
    """diffusers' dotted names, the scale in a text entry."""

    name, title, order = "diffusers", "diffusers, ai-toolkit", 90  # last: nothing marks its names as diffusers'

    def recognises(self, head: Header) -> bool:
        return bool(head.layers)

    def parse(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> LoraFile:
        return parse_diffusers(tensors, metadata, source)

    def refusal(self, file: LoraFile) -> str:
        return file.refusal_of_tables(self.name) or file.refusal_of_model(self.name)

    def _write(self, file: LoraFile, path: Path, metadata: Mapping[str, str]) -> Path:
        from adapters.formats.tensors import write_tensors

        tensors: dict[str, Tensor] = {}
        configs: dict[str, Any] = {}
        for component, written in file.parts.items():
            # many programs read only the tensors, and take alpha to be the rank
            layers = {module: layer.with_scale_one() for module, layer in written.items()}
            configs |= {f"{component}.{option}": value for option, value in config_of(layers).items()}
            for module, layer in layers.items():
                tensors |= _tensors(f"{component}.{module}", layer)
        text = file.own_metadata() | dict(metadata) | {CONFIG_ENTRY: json.dumps(configs, sort_keys=True)}
        return write_tensors(path, tensors, write_beside(file, path, text))


def parse_diffusers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> LoraFile:
    """The adapter in a diffusers file.

    Raises:
        InputError: keys that are not an adapter's, of no known component, or tensors that do not fit together.
    """
    groups = _with_component(group_tensors(tensors, split_component, source), source)
    configs = component_configs(metadata, source)
    layers = {}
    for (component, module), parts in groups.items():
        config, name = configs.get(component), f"{component}.{module}"
        alpha = written_alpha(parts, name, source)
        if alpha is None and config is not None:
            alpha = alpha_of(config, module, source)
        rslora = bool(config and config.get("use_rslora"))
        layers[component, module] = layer_of(parts, alpha, rslora, name, source)
    return LoraFile(group_dict(layers), "diffusers", metadata=dict(metadata))


def component_configs(metadata: Mapping[str, str], source: str) -> dict[str, dict[str, Any]]:
    """component -> its PEFT configuration, from the text metadata; empty if there is none.

    Raises:
        InputError: the entry is not a PEFT configuration, or has an option that is refused.
    """
    if CONFIG_ENTRY not in metadata:
        return {}
    try:
        flat = json.loads(metadata[CONFIG_ENTRY])
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{source}: its entry '{CONFIG_ENTRY}' is not valid JSON ({error}).") from None
    if not isinstance(flat, dict):
        raise InputError(f"{source}: its entry '{CONFIG_ENTRY}' does not hold a PEFT configuration.")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, option = key.partition(".")
        configs.setdefault(component, {})[option] = value
    for component, config in configs.items():
        check_options(config, f"{source} ({component})")
    return configs


def _tensors(name: str, layer: LoraLayer) -> dict[str, Tensor]:
    made = {f"{name}.lora_A.weight": layer.A, f"{name}.lora_B.weight": layer.B}
    if layer.magnitude is not None:
        made[f"{name}.lora_magnitude_vector"] = layer.magnitude
    return made


def _with_component(
    groups: dict[tuple[str, str], dict[str, Tensor]], source: str
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """``groups`` with the component of unprefixed keys guessed from their names."""
    loose = [module for component, module in groups if not component]
    if not loose:
        return groups
    guess = guess_component(loose)
    if not guess:
        raise InputError(f"{source}: '{loose[0]}' belongs to no known part of a model; the format is unknown.")
    return {(component or guess, module): parts for (component, module), parts in groups.items()}


FORMAT = Diffusers()
write_diffusers = FORMAT.write
