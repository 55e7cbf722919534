"""Data and models that travel with Adapter Studio, and the programs that made them (``assets.build``)."""

from importlib import resources
from pathlib import Path


def path(name: str) -> Path:
    """Return the path of a shipped asset, in a checkout and in an installed wheel alike.

    ``name`` is relative to this package, with forward slashes: ``path("models/tinymoji")``.
    Raises ``FileNotFoundError`` when there is no such file or folder, and ``ValueError`` when
    ``name`` is absolute or leaves the package.
    """
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        raise ValueError(f"asset names are relative to the assets package, got {name!r}")
    found = Path(str(resources.files(__name__).joinpath(*parts)))
    if not found.exists():
        raise FileNotFoundError(f"no asset {name!r} (looked in {found})")
    return found
