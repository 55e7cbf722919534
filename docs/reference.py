"""The API reference as web pages: ``python docs/reference.py site``.

pdoc reads what a module holds when it is imported. Packages here import their public names on first use, so these are
asked for first, and every module is named, because pdoc leaves out what ``__all__`` of a package does not list.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("studio", "pipelines", "adapters", "ui")


def modules() -> list[str]:
    """Names of all public modules of the packages."""
    found = list(PACKAGES)
    for package in PACKAGES:
        below = pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
        found += [module.name for module in below if "__main__" not in module.name]
    return sorted(found)


def resolve(name: str) -> None:
    """Import a module, with the public names that it imports on first use."""
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        setattr(module, public, getattr(module, public))


def build(folder: Path, names: Sequence[str] = ()) -> None:
    """Write the pages of these modules, of all if none is named, into ``folder``."""
    import pdoc

    names = names or modules()
    for name in names:
        resolve(name)
    pdoc.render.configure(docformat="google", footer_text="Adapter Studio")
    pdoc.pdoc(*names, output_directory=folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    build(Path(sys.argv[1]))
