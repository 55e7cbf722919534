"""``studio compress recover``: an adapter of a pruned base becomes one of the whole base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapters.errors import InputError
from studio.cli.output import Json, Output, Quiet


def recover(
    adapter: Annotated[str, typer.Argument(help="Trained on the pruned base: name in the library, or folder.")],
    pruned: Annotated[str, typer.Option("--pruned", help="The pruned base: name in the library, or folder.")],
    name: Annotated[str, typer.Option("--name", help="Of the new adapter; empty = the old name and 'whole'.")] = "",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pad an adapter of a pruned base with zeros: an ordinary LoRA of the whole base, put into the library.

    Example:  studio compress recover other --pruned facts-pruned --name other-whole
    """
    import tempfile

    from adapters.compression.structure import read_pruning
    from studio import library, silence
    from studio.compression import recovery
    from studio.library import adopt

    silence.library_warnings()
    pruning = read_pruning(Path(library.resolve_language(pruned)))
    if pruning is None:
        raise InputError(f"'{pruned}' is not a pruned base: it has no pruning.json.")
    place = library.resolve_adapter(adapter)
    free = adopt.free_name(name or f"{place.name}-whole")
    with tempfile.TemporaryDirectory() as scratch:
        made = recovery.recover(place, pruning, Path(scratch) / free, pruning.base_name)
        record = library.import_adapter(made, free)
    Output(json, quiet).result({"adapter": str(record.path), "library": record.name}, record.name)
