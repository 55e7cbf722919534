"""The library: which adapters and base models the studio knows, and what can be done with them.

Names are imported on first use: a schema that asks for a family does not load the readers of files.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from studio.library.edit import (
        Trashed,
        empty_trash,
        import_adapter,
        import_base,
        places,
        rename,
        restore,
        sha256,
        show,
        trash,
        trashed,
    )
    from studio.library.records import Record
    from studio.library.resolve import (
        adapters,
        bases,
        find,
        resolve_adapter,
        resolve_base,
        resolve_language,
        resolve_pipeline,
        resolve_rna,
        resolve_speech,
        resolve_vision_language,
    )

_MODULES = {
    "edit": (
        "Trashed", "empty_trash", "import_adapter", "import_base", "places", "rename", "restore", "sha256", "show",
        "trash", "trashed",
    ),
    "records": ("Record",),
    "resolve": (
        "adapters", "bases", "find", "resolve_adapter", "resolve_base", "resolve_language", "resolve_pipeline",
        "resolve_rna", "resolve_speech", "resolve_vision_language",
    ),
}  # fmt: skip

__all__ = [
    "Record", "Trashed", "adapters", "bases", "empty_trash", "find", "import_adapter", "import_base", "places",
    "rename", "resolve_adapter", "resolve_base", "resolve_language", "resolve_pipeline", "resolve_rna",
    "resolve_speech",
    "resolve_vision_language", "restore", "sha256", "show", "trash", "trashed",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
