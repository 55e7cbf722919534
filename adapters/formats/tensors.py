"""Tensor files: read whole or not at all, written whole or not at all."""

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
        InputError: the file is missing, damaged, of an unknown kind, or a pickle that holds more than tensors.
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
    ending = f"the ending '{path.suffix}'" if path.suffix else "no ending"
    raise InputError(
        f"'{path}' has {ending}; an adapter is a folder of PEFT or a file ending in {', '.join(SUFFIXES)}."
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file; a reader never sees half of it."""
    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = {"format": "pt"} | dict(metadata)
    return files.write(path, lambda part: save_file(ready, part, metadata=text))


def sha256(path: Path) -> str:
    """SHA-256 of a file, or of a directory's files in the order of their names."""
    return files.sha256(*([path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())))


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse NaN and infinity, naming the first tensor that holds one."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{source} holds NaN or infinite numbers in '{name}': the training went wrong, or the file."
            )


def load_pickle(path: Path) -> Any:
    """What a checkpoint holds; never runs code from the file.

    Raises:
        InputError: compressed, damaged, or holding more than plain values and tensors.
    """
    try:
        refuse_packed(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch raises many kinds for what is not a checkpoint
        # the first sentence alone: torch goes on with advice to run the file
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise InputError(
            f"'{path}' cannot be read as plain tensors, and nothing else in it is ever run ({reason}). "
            "Ask for a .safetensors file."
        ) from None


def flat_table(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name in what :func:`load_pickle` gave, also below "state_dict".

    Raises:
        InputError: it is no flat table of tensors, or tensors are not stored in the file.
    """
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise InputError(f"'{path}' does not hold a flat table of tensors, as LoRA files do.")
    size = path.stat().st_size
    for name, tensor in content.items():
        # views can claim any shape over a few stored numbers
        if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() * tensor.element_size() > size:
            raise InputError(f"'{path}': the tensor '{name[:80]}' {tuple(tensor.shape)} is not stored in the file.")
    return {name: _usable(tensor, name, path) for name, tensor in content.items()}


def refuse_packed(path: Path) -> None:
    """Raise :class:`InputError` for a compressed archive: torch never makes one, and it could unpack to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise InputError(f"'{path}' is a compressed archive; torch's own files are not. It is not opened.")


def _usable(tensor: Tensor, name: str, path: Path) -> Tensor:
    """The tensor in a type one can compute with: 8-bit floating point becomes fp32."""
    if tensor.is_complex() or tensor.is_quantized:
        raise InputError(f"'{path}': the tensor '{name[:80]}' holds {tensor.dtype} numbers, which no adapter has.")
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
