"""The library: which adapters and base models the studio knows, and what can be done with them."""

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
    resolve_vision_language,
)

__all__ = [
    "Record", "Trashed", "adapters", "bases", "empty_trash", "find", "import_adapter", "import_base", "places",
    "rename", "resolve_adapter", "resolve_base", "resolve_language", "resolve_pipeline", "resolve_vision_language",
    "restore", "sha256", "show", "trash", "trashed",
]  # fmt: skip
