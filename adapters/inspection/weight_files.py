"""The weights of a model straight from its files, without building the model, for inspection.

The type of a layer follows from its tensor: two axes are a linear layer, four a convolution. Two types store the
transpose: embeddings, recognised by name, and the Conv1D of GPT-2 and its relatives, recognised by ``model_type`` in
config.json. Tensors are memory-mapped and read when used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers.pytorch_utils import Conv1D

from adapters.errors import InputError
from adapters.formats.lora import COMPONENTS, MODEL

TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Values of ``model_type`` whose linear layers inside the blocks are Conv1D (in, out)."""

EMBEDDING = re.compile(r"(.*\.)?(wte|wpe|shared|embed_tokens|embed_positions|\w*embeddings?)")
"""Names of modules that are embedding tables."""


def models_in(path: Path) -> dict[str, nn.Module]:
    """Component -> a tree of layers that only hold the weights of the files; it cannot be run.

    Args:
        path: a .safetensors file, the folder of one model, or a pipeline's folder with one folder per component.

    Raises:
        InputError: no .safetensors files, damaged or quantised ones, or one tensor in two files.
    """
    if path.is_file():
        return {MODEL: _tree([path], path)}
    parts = {name: path / name for name in COMPONENTS if (path / name).is_dir()}
    found = {name: _files(folder) for name, folder in (parts or {MODEL: path}).items()}
    if not any(found.values()):
        raise InputError(f"'{path}' contains no weights in .safetensors files.")
    return {name: _tree(files, (parts or {MODEL: path})[name]) for name, files in found.items() if files}


def _files(folder: Path) -> list[Path]:
    """The weight files of a model's folder: those in the index if sharded; variants are left out."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        listed = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
        return sorted({folder / name for name in listed.values()})
    return [file for file in sorted(folder.glob("*.safetensors")) if file.name.count(".") == 1]


def _tree(files: list[Path], source: Path) -> nn.Module:
    transposed = _model_type(source) in TRANSPOSED
    root = nn.Module()
    seen: set[str] = set()
    for name, weight in _weights(files):
        if name in seen:
            raise InputError(f"Two files in '{source}' hold the weight of '{name}': name one of them.")
        seen.add(name)
        _put(root, name, _layer(name, weight, transposed))
    if not seen:
        raise InputError(f"'{source}' contains no weights of layers.")
    return root


def _model_type(source: Path) -> str:
    config = (source if source.is_dir() else source.parent) / "config.json"
    try:
        return str(json.loads(config.read_text(encoding="utf-8")).get("model_type", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _weights(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """(module, weight) of everything with two axes or more."""
    for file in files:
        if file.suffix != ".safetensors":
            raise InputError(f"'{file}' cannot be inspected: weights are read from .safetensors files only.")
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    module, _, kind = key.rpartition(".")
                    if kind != "weight" or len(opened.get_slice(key).get_shape()) < 2:
                        continue
                    weight = opened.get_tensor(key)
                    if not weight.is_floating_point():
                        raise InputError(
                            f"'{file.name}': '{module}' is quantised ({weight.dtype}): use the original weights."
                        )
                    yield module, weight
        except (SafetensorError, OSError) as error:
            raise InputError(f"'{file}' is not a readable safetensors file: {error}") from None


def _layer(name: str, weight: Tensor, transposed: bool) -> nn.Module:
    """A layer of the type of ``weight``, holding it."""
    sizes = weight.shape
    made: nn.Module
    if len(sizes) == 4:
        made = skip_init(nn.Conv2d, sizes[1], sizes[0], (sizes[2], sizes[3]), bias=False, device="meta")
    elif len(sizes) > 2:
        made = nn.Module()
    elif EMBEDDING.fullmatch(name):
        made = skip_init(nn.Embedding, sizes[0], sizes[1], device="meta")
    elif transposed and re.search(r"\.(c_attn|q_attn|c_proj|c_fc)$", name):
        made = Conv1D(1, 1)
        made.nx, made.nf = sizes
    else:
        made = skip_init(nn.Linear, sizes[1], sizes[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def _put(root: nn.Module, name: str, layer: nn.Module) -> None:
    """Add ``layer`` to the tree at its dotted name."""
    *above, last = name.split(".")
    place = root
    for step in above:
        if step not in place._modules:
            place.add_module(step, nn.Module())
        place = place.get_submodule(step)
    place.add_module(last, layer)


__all__ = ["EMBEDDING", "TRANSPOSED", "models_in"]
