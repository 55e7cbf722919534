"""Tensor files, read and written as a whole or not at all."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapters import files
from adapters.errors import InputError
from adapters.formats.header import PICKLED

SUFFIXES = (".safetensors", *PICKLED)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name and the file's text metadata.

    Raises:
        InputError: the file is missing, damaged, of an unknown type, or a pickle that holds more than tensors.
    """
    if not path.is_file():
        raise InputError(f"Adapter file '{path}' does not exist.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: _usable(file.get_tensor(name), name, path) for name in file.keys()}  # noqa: SIM118
                return tensors, dict(file.metadata() or {})
        except InputError:
            raise
        except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
            raise InputError(f"Adapter file '{path}' is not a readable safetensors file: {error}") from None
    if path.suffix in PICKLED:
        return flat_table(load_pickle(path), path), {}
    suffix = f"the suffix '{path.suffix}'" if path.suffix else "no suffix"
    raise InputError(f"'{path}' has {suffix}; an adapter is a PEFT folder or a file ending in {', '.join(SUFFIXES)}.")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file with text ``metadata``; returns ``path``. A reader never sees half of it."""
    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = {"format": "pt"} | dict(metadata)
    return files.write(path, lambda part: save_file(ready, part, metadata=text))


def sha256(path: Path) -> str:
    """SHA-256 of a file, or of a directory's files in the order of their paths, as hexadecimal digits."""
    return files.sha256(*([path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())))


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse NaN and infinity, naming the first tensor that holds one."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{source} holds NaN or infinite values in '{name}': training diverged, or the file is damaged."
            )


def load_pickle(path: Path) -> Any:
    """The content of a checkpoint; never runs code from the file.

    Raises:
        InputError: the file is compressed, damaged, or holds more than plain values and tensors.
    """
    try:
        refuse_packed(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch raises many types for a file that is not a checkpoint
        # only the first sentence: torch goes on to advise running the file
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise InputError(
            f"'{path}' cannot be read as plain tensors, and code in it is never run ({reason}): ask for a "
            ".safetensors file."
        ) from None


def pickled_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a checkpoint, without their values; empty if it cannot be read."""
    try:
        refuse_packed(path)
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # the reader of the tensors says what is wrong
        return {}
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    found = content.items() if isinstance(content, dict) else ()
    return {name: tuple(value.shape) for name, value in found if isinstance(name, str) and isinstance(value, Tensor)}


def flat_table(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name in the ``content`` that :func:`load_pickle` returned, or in its "state_dict".

    Raises:
        InputError: it is not a flat table of tensors, or a tensor is not stored in the file.
    """
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise InputError(f"'{path}' does not hold a flat table of tensors, as LoRA files do.")
    size = path.stat().st_size
    for name, tensor in content.items():
        # views can claim any shape over a few stored values
        if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() * tensor.element_size() > size:
            raise InputError(f"'{path}': the tensor '{name[:80]}' {tuple(tensor.shape)} is not stored in the file.")
    return {name: _usable(tensor, name, path) for name, tensor in content.items()}


def refuse_packed(path: Path) -> None:
    """Raise :class:`InputError` for a compressed archive: torch never writes one, and it could unpack to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise InputError(f"'{path}' is not opened: it is a compressed archive, which torch never writes.")


def _usable(tensor: Tensor, name: str, path: Path) -> Tensor:
    """The tensor in a dtype that supports arithmetic: 8-bit floating point becomes fp32."""
    if tensor.is_complex() or tensor.is_quantized:
        raise InputError(f"'{path}': the tensor '{name[:80]}' holds {tensor.dtype} values, which no adapter has.")
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
