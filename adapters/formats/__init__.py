"""Reading and writing adapter files (PEFT directories, diffusers, kohya and others) through one form in memory.

``read`` recognises and reads a file; ``fit`` (in :mod:`adapters.formats.fit`) matches it to a model; ``write`` makes
files that PEFT, diffusers and kohya's programs load. Each format is one module here (:mod:`adapters.formats.format`).
Names are imported on first use, so that listing files does not load torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters.formats.diffusers_file import write_diffusers
    from adapters.formats.ed_lora import write_ed_lora
    from adapters.formats.kohya import write_kohya
    from adapters.formats.lora import LoraFile, LoraLayer
    from adapters.formats.peft_directory import write_peft
    from adapters.formats.reading import read
    from adapters.formats.tensors import sha256

_MODULES = {
    "LoraFile": "lora", "LoraLayer": "lora", "read": "reading", "sha256": "tensors",
    "write_diffusers": "diffusers_file", "write_ed_lora": "ed_lora", "write_kohya": "kohya",
    "write_peft": "peft_directory",
}  # fmt: skip

__all__ = [
    "LoraFile", "LoraLayer", "read", "sha256", "write", "write_diffusers", "write_ed_lora", "write_kohya", "write_peft",
]  # fmt: skip


def write(file: LoraFile, path: Path, format: str, metadata: Mapping[str, str] | None = None) -> Path:
    """Write an adapter in the named format, with extra text ``metadata``; returns the path.

    Raises:
        InputError: there is no such format, it cannot hold the adapter, or the disk is full.
    """
    from adapters.formats.format import find

    return find(format).write(file, path, metadata)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
