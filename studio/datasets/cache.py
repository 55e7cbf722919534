"""Tensors computed once: encoded pictures and encoded captions.

A key covers everything the value depends on (content, encoder, size, crop, flip), so a changed encoder or resolution
never gets an old value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from adapters import files
from adapters.compression.storage import plain_tensor

Tensors = dict[str, torch.Tensor]


def key_of(*parts: object) -> str:
    """A file-name-safe key for a combination of values."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=20).hexdigest()


def fingerprint(module: torch.nn.Module) -> str:
    """Hash over every name, shape, dtype and value of a module's state."""
    total = hashlib.blake2b(digest_size=20)
    for name, value in sorted(module.state_dict().items()):
        total.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        codes: Any = plain_tensor(value).cpu().contiguous().flatten().view(torch.uint8).numpy()
        total.update(codes)
    return total.hexdigest()


class TensorCache:
    """Keeps dictionaries of tensors in memory, or in files below ``folder``."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._memory: dict[str, Tensors] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._memory or (self.folder is not None and self._file(key).is_file())

    def get(self, key: str, compute: Callable[[], Tensors]) -> Tensors:
        """The value of ``key``; computed (without gradients) and stored if it is not there yet."""
        found = self._load(key)
        if found is None:
            with torch.no_grad():
                found = {name: value.detach().cpu().contiguous() for name, value in compute().items()}
            self._store(key, found)
        return found

    def _load(self, key: str) -> Tensors | None:
        if self.folder is None:
            return self._memory.get(key)
        try:
            return load_file(self._file(key))
        except (OSError, SafetensorError):  # missing, or truncated by a crash: compute again
            return None

    def _store(self, key: str, value: Tensors) -> None:
        if self.folder is None:
            self._memory[key] = value
            return
        files.write(self._file(key), lambda part: save_file(value, part), sync=False)

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"
