"""Compressed language models as folders: few-bit matrices, the rest as it was, and an ordinary LoRA tied to them.

    config.json, tokenizer ...      those of the base
    packed-00001.safetensors ...    the matrices' tensors (``NAME.codes``, ...), and all other weights
    lora/                           a PEFT directory with the low-rank part, valid on these packed weights only
    compression.json                the :class:`Manifest`

Stock transformers finds no weights in such a folder and says so, instead of starting at random.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import files
from adapters.errors import FamilyError, InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FILE = "compression.json"
LOW_RANK = "lora"
TIED = "adapter_studio_tied"
"""Metadata entry of an adapter that is valid on one compressed base only: that base's digest."""

VERSION = 1
SHARD = 2 * 2**30
"""Largest size of a file of packed weights, in bytes."""


@dataclass(frozen=True)
class Matrix:
    """One matrix of a compressed base.

    Attributes:
        how: its :class:`~adapters.compression.normal_float.Configuration`, or
            :class:`~adapters.compression.l4q.Grid`, as text.
        shape: (out, in).
        error, plain: |W - Q - L1 L2| and |W - quantised W|, weighted if the method weights.
    """

    how: str
    shape: tuple[int, int]
    error: float = 0.0
    plain: float = 0.0


@dataclass(frozen=True)
class Manifest:
    """What a compressed base is.

    Attributes:
        method: the method's name.
        base: name and digest of the model it was made from.
        digest: SHA-256 of the packed files, to which the LoRA is tied.
        bits: achieved bits per weight of the matrices, from the bytes.
        rank: of the low-rank part; 0 = none.
        matrices: module path -> what was done to it.
        facts: figures of the method (budget, samples, seconds ...).
    """

    method: str
    base: Mapping[str, str]
    digest: str
    bits: float
    rank: int
    matrices: Mapping[str, Matrix]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write it into ``folder``."""
        return files.write_text(folder / FILE, json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n")


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of a compressed base; None if the folder is none.

    Raises:
        InputError: the file is damaged, or of a newer version.
    """
    place = Path(folder) / FILE
    if not place.is_file():
        return None
    try:
        values = json.loads(place.read_text(encoding="utf-8"))
        if values.pop("version") != VERSION:
            raise InputError(f"'{place}' was written by a newer version of the studio: update it.")
        values["matrices"] = {
            name: Matrix(**{**one, "shape": tuple(one["shape"])}) for name, one in values["matrices"].items()
        }
        return Manifest(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"'{place}' is damaged ({error}): make the compressed base again.") from None


def packed_files(folder: Path) -> list[Path]:
    """The files of packed weights, in order."""
    return sorted(folder.glob("packed-*.safetensors"))


def digest_of(folder: Path) -> str:
    """SHA-256 of the packed files."""
    return files.sha256(*packed_files(folder))


def write_packed(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write ``tensors`` as packed files, never holding more than one file's worth of them."""
    from safetensors.torch import save_file

    held: dict[str, Tensor] = {}
    number = size = 0

    def flush() -> None:
        nonlocal held, number, size
        number += 1
        files.write(folder / f"packed-{number:05d}.safetensors", lambda part: save_file(held, part))
        held, size = {}, 0

    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD:
            flush()
        held[name], size = tensor.contiguous(), size + tensor.nbytes
    flush()


def open_compressed(
    folder: Path, manifest: Manifest, auto: Any, config: Any, dtype: torch.dtype, low_rank: bool = True,
    **options: Any,
) -> tuple[Any, list[str]]:  # fmt: skip
    """The model in ``folder``, built without ever holding dense matrices.

    Args:
        auto: transformers' automatic class for the task.
        config: the model's configuration.
        dtype: of the weights that are not packed.
        low_rank: with the low-rank part inside the layers; without, Q alone (for a tied LoRA beside it).
        options: more for ``from_config``.

    Returns:
        The model, and its modules without weights (a new head, started at random).

    Raises:
        InputError: files that are missing, damaged, or do not belong together.
    """
    from accelerate import init_empty_weights
    from safetensors import SafetensorError, safe_open
    from torch import nn

    from adapters.compression import l4q, normal_float

    known_parts = {*normal_float.PARTS, *l4q.PARTS}
    pairs = _pairs(folder, manifest) if low_rank and manifest.rank else {}
    with init_empty_weights(include_buffers=False):
        model = auto.from_config(config, dtype=dtype, **options)
    plain: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in manifest.matrices}
    try:
        for file in packed_files(folder):
            with safe_open(file, framework="pt") as opened:
                for key in list(opened.keys()):
                    name, _, part = key.rpartition(".")
                    if name in parts and part in known_parts:
                        parts[name][part] = opened.get_tensor(key)
                    else:
                        value = opened.get_tensor(key)
                        plain[key] = value.to(dtype) if value.is_floating_point() else value
    except (OSError, SafetensorError) as error:
        raise InputError(f"The packed weights in '{folder}' are damaged ({error}): make the base again.") from None
    for name, matrix in manifest.matrices.items():
        integers = matrix.how.startswith("int")
        if set(parts[name]) != set(l4q.PARTS if integers else normal_float.PARTS):
            raise InputError(f"The packed weights in '{folder}' lack '{name}': make the compressed base again.")
        bias = plain.pop(f"{name}.bias", None)
        layer: nn.Module
        if integers:
            layer = l4q.IntegerLinear(parts[name], matrix.shape, l4q.Grid.parse(matrix.how), bias)
        else:
            how = normal_float.Configuration.parse(matrix.how)
            layer = normal_float.NormalFloatLinear(
                normal_float.Stored(**parts[name], shape=matrix.shape, how=how), bias, pairs.get(name)
            )
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    known = dict(model.named_parameters())
    model.load_state_dict({key: value for key, value in plain.items() if key in known}, strict=False, assign=True)
    model.tie_weights()
    fresh = sorted({key.rpartition(".")[0] for key, value in model.named_parameters() if value.is_meta})
    for name in fresh:
        module = model.get_submodule(name)
        module.to_empty(device="cpu")
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=float(getattr(config, "initializer_range", 0.02)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if hasattr(model, "generation_config") and (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.studio_compressed = manifest
    return model, fresh


def _pairs(folder: Path, manifest: Manifest) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> A and s B of the tied LoRA.

    Raises:
        InputError: it is missing, or tied to other packed weights.
    """
    from adapters.formats import read

    file = read(folder / LOW_RANK)
    if file.metadata.get(TIED) != manifest.digest:
        raise InputError(
            f"The low-rank part in '{folder / LOW_RANK}' belongs to other packed weights: make the base again."
        )
    return {name: (layer.A, layer.B * layer.scale) for _, name, layer in file.layers()}


def check_tied(metadata: Mapping[str, str], name: str, model: Any) -> None:
    """Refuse a LoRA that is the low-rank part of a compressed base.

    Args:
        metadata: of the adapter's file.
        name: of the adapter, for the sentence.
        model: on which it would be used.

    Raises:
        FamilyError: the model is another one.
        InputError: it has the low-rank part already.
    """
    tied = metadata.get(TIED)
    if not tied:
        return
    manifest = getattr(model, "studio_compressed", None)
    if manifest is None or manifest.digest != tied:
        raise FamilyError(
            f"'{name}' is the low-rank part of a compressed base and means nothing on another one: use that base "
            "itself, which has it."
        )
    raise InputError(f"'{name}' is the low-rank part of this compressed base, which has it already: leave it out.")
