"""PEFT directories: ``adapter_config.json`` and ``adapter_model.safetensors`` with keys ``base_model.model....``.

PEFT adapts one model, so a LoRA for several components is a directory with one such directory per component
(``unet/``, ``text_encoder/``), as written by diffusers' training examples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError
from adapters.files import write_text
from adapters.formats.format import Format
from adapters.formats.header import CONFIG, WEIGHTS
from adapters.formats.keys import guess_component, layer_of, modern_name, refuse_foreign, split_role
from adapters.formats.lora import COMPONENTS, MODEL, LoraFile, LoraLayer
from adapters.formats.peft_config import alpha_of, config_of, scale_of
from adapters.formats.peft_options import check_options, kind_of

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats.header import Header

PREFIX = "base_model.model."
COPY = ".base_layer.weight"
"""Suffix of the base's weight that PEFT stores with an adapted embedding or output layer."""


class Peft(Format):
    """A folder with tensors and a configuration that gives their scale."""

    name, title, suffix, order, mark = "peft", "PEFT, transformers, vLLM", "", 10, CONFIG

    def recognises(self, head: Header) -> bool:
        return head.peft

    def read(self, head: Header) -> LoraFile:
        path = head.path
        if (path / CONFIG).is_file():
            return _read_one(path)
        parts: dict[str, Mapping[str, LoraLayer]] = {}
        copies: dict[str, Mapping[str, Tensor]] = {}
        text: dict[str, str] = {}
        for name in COMPONENTS:
            if (path / name / CONFIG).is_file():
                one = _read_one(path / name)
                parts[name], copies[name] = next(iter(one.parts.values())), next(iter(one.copies.values()))
                text |= one.metadata
        return LoraFile(parts, "peft", metadata=text, path=path, copies=copies)

    def refusal(self, file: LoraFile) -> str:
        if not (words := (*file.words, *file.embeddings)):
            return ""
        return (
            f"The adapter has words of its own ({', '.join(words)}), which a PEFT directory cannot hold: use the "
            "diffusers or kohya format."
        )

    def _write(self, file: LoraFile, path: Path, metadata: Mapping[str, str]) -> Path:
        """One PEFT directory, or one per component if there are several."""
        for component, layers in file.parts.items():
            place = path if len(file.parts) == 1 else path / component
            write_directory(place, layers, file.own_metadata() | dict(metadata))
        return path


def is_peft_directory(path: Path) -> bool:
    """Whether it is a PEFT directory, or a directory with one per component."""
    return (path / CONFIG).is_file() or any((path / component / CONFIG).is_file() for component in COMPONENTS)


def _read_one(path: Path) -> LoraFile:
    """Read one PEFT directory, of one component."""
    from adapters.formats.tensors import check_finite, read_tensors

    config = _read_config(path / CONFIG)
    weights = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if weights is None:
        raise InputError(f"PEFT directory '{path}' has no {WEIGHTS[0]}.")
    tensors, text = read_tensors(weights)
    check_finite(tensors, f"'{weights}'")
    refuse_foreign(tensors, f"'{weights}'")
    groups: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.endswith(COPY):
            copies[key.removeprefix(PREFIX).removesuffix(COPY)] = tensor
            continue
        found = split_role(key)
        if found is None:
            raise InputError(f"'{weights}': key '{key}' is not understood.")
        groups.setdefault(modern_name(found[0].removeprefix(PREFIX)), {})[found[1]] = tensor
    component = guess_component(groups) or (path.name if path.name in COMPONENTS else MODEL)
    rslora, source = bool(config.get("use_rslora")), f"'{weights}'"
    plain = kind_of(config) == "LORA"
    number = alpha_of if plain else scale_of
    layers = {
        module: layer_of(parts, number(config, module, source), rslora, module, source, scaled=not plain)
        for module, parts in groups.items()
    }
    bare = next((name for name, layer in layers.items() if layer.magnitude is None), None)
    if config.get("use_dora") and bare is not None:
        raise InputError(f"{source} is DoRA by its configuration (use_dora), but the layer '{bare}' has no magnitude.")
    return LoraFile(
        {component: layers}, "peft", metadata=text, path=path, copies={component: copies}, config=dict(config)
    )


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"'{path}' is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"'{path}' is not a PEFT configuration.")
    check_options(config, f"'{path}'")
    return config


def write_directory(
    path: Path,
    layers: Mapping[str, LoraLayer],
    metadata: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    more: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the adapter of one model; returns ``path``.

    Args:
        layers: module path -> layer.
        metadata: text entries of the file with the weights.
        options: values to add to or replace in the configuration (``task_type``, ``modules_to_save``, ...).
        more: further tensors by their full keys (modules trained besides the layers).

    Raises:
        InputError: layers of different kinds, or a full disk.
    """
    from adapters.formats.tensors import write_tensors

    tensors: dict[str, Tensor] = {}
    for module, layer in layers.items():
        names = ("lora_embedding_A", "lora_embedding_B") if layer.embedding else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{PREFIX}{module}.{name}": side for name, side in zip(names, (layer.A, layer.B), strict=True)}
        if layer.magnitude is not None:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = layer.magnitude
    config = config_of(layers) | {"inference_mode": True} | dict(options or {})
    write_tensors(path / WEIGHTS[0], tensors | dict(more or {}), metadata or {})
    write_text(path / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return path


FORMAT = Peft()
write_peft = FORMAT.write
