"""Recipes: what made a picture, and whether it can be made again.

A recipe is ``{"version", "job", "config", "adapters": [{name, path, size, sha256}], "base": {name, path, sha256},
"versions", "made_on"}``. ``config`` is a whole :class:`~studio.composition.schema.ComposeConfig`; the hashes say which
files were meant, wherever they lie today. Where the texts were written with choices or adapters in them, "written"
holds them as they were and ``config`` what came of them; "emphasis" lists the words whose weight is not 1.
"""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from adapters.errors import InputError
from studio import library
from studio.composition.schema import ComposeConfig

VERSION = 1

_PACKAGES = ("adapter-studio", "torch", "diffusers", "transformers", "peft", "numpy")


def build(config: ComposeConfig, made_on: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a composition; hashes adapters and a local base (remembered while the files stay the same).

    Args:
        config: what is asked for.
        made_on: device, dtype and number of threads, which decide the last bits of a picture.

    Raises:
        InputError: an adapter or the base is not there.
    """
    return {
        "version": VERSION,
        "job": "compose",
        "config": config.model_dump(mode="json"),
        "adapters": [_adapter(use.name, library.resolve_adapter(use.path)) for use in config.adapters],
        "base": _base(config.base),
        "versions": versions(),
        "made_on": made_on,
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that decide what a picture looks like."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def replay(recipe: dict[str, Any], overrides: dict[str, Any] | None = None) -> ComposeConfig:
    """The configuration that repeats a recipe, with paths as they are on this machine.

    Args:
        recipe: from :func:`studio.composition.recipe_png.read_recipe`.
        overrides: values to change; ``adapters`` or ``base`` given here are taken as they are, unchecked.

    Raises:
        InputError: it is another program's or a newer recipe; an adapter or the base is missing or another file.
    """
    if recipe.get("job") != "compose":
        raise InputError(f"This is the recipe of a '{recipe.get('job')}' job, not of a composition.")
    if not isinstance(recipe.get("version"), int) or recipe["version"] > VERSION:
        raise InputError("The recipe was made by a newer Adapter Studio: update this one to repeat it.")
    overrides = overrides or {}
    values = dict(recipe["config"])
    if "adapters" not in overrides:
        values["adapters"] = _present_adapters(values.get("adapters") or [], recipe.get("adapters") or [])
    if "base" not in overrides:
        _check_base(recipe.get("base") or {})
    return ComposeConfig.parse({**values, **overrides}, source="the recipe")


def _present_adapters(uses: list[dict[str, Any]], known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(uses) != len(known):
        raise InputError("The recipe is damaged: it does not say which files its adapters were.")
    return [{**use, "path": _same_adapter(use, entry)} for use, entry in zip(uses, known, strict=True)]


def _same_adapter(use: dict[str, Any], entry: dict[str, Any]) -> str:
    """Where the very file of the recipe is: at its old place, or under another name in the library."""
    name = entry.get("name") or use["path"]
    place: Path | None = None
    for text in (use["path"], str(Path(str(entry.get("path", ""))).expanduser())):
        try:
            place = library.resolve_adapter(text)
        except InputError:
            continue
        if library.sha256(place) == entry.get("sha256"):
            return text
    twin = _by_hash(entry)
    if twin is not None:
        return twin
    what_to_do = "put the original back (studio library import), or choose adapters yourself with --lora."
    if place is None:
        raise InputError(
            f"The adapter '{name}' ({_short(entry)}) of the recipe is neither at its place nor in the library: "
            f"{what_to_do}"
        )
    raise InputError(
        f"The adapter '{name}' at {place} is another file ({library.sha256(place)[:12]}) than the recipe's "
        f"({_short(entry)}): {what_to_do}"
    )


def _by_hash(entry: dict[str, Any]) -> str | None:
    """The name of the library's adapter with the recipe's hash; only files of its size are read."""
    for record in library.adapters():
        if record.problem or entry.get("size") not in (None, _weights(record.path).stat().st_size):
            continue
        if library.sha256(record.path) == entry.get("sha256"):
            return record.name
    return None


def _check_base(entry: dict[str, Any]) -> None:
    expected = entry.get("sha256")
    if not expected:
        return
    name = entry.get("name", "")
    what_to_do = "put the original back, or choose a base model yourself with --base."
    try:
        place = Path(library.resolve_base(name))
    except InputError:
        raise InputError(f"The base model '{name}' of the recipe is not here: {what_to_do}") from None
    if not place.exists() or library.sha256(place, "base") != expected:
        raise InputError(f"The base model '{name}' is another one than the recipe's ({expected[:12]}): {what_to_do}")


def _adapter(name: str, path: Path) -> dict[str, Any]:
    return {
        "name": name or path.stem,
        "path": _private(path),
        "size": _weights(path).stat().st_size,
        "sha256": library.sha256(path),
    }


def _base(name: str) -> dict[str, Any]:
    place = library.resolve_base(name)
    path = Path(place)
    if not path.exists():
        return {"name": name, "path": place, "sha256": None}
    return {"name": name, "path": _private(path), "sha256": library.sha256(path, "base")}


def _private(path: Path) -> str:
    """The path without the person's name in it: pictures are shared."""
    try:
        return "~/" + path.absolute().relative_to(Path.home()).as_posix()
    except ValueError:
        return str(path.absolute())


def _weights(path: Path) -> Path:
    from studio.library import facts

    return facts.weight_file(path)


def _short(entry: dict[str, Any]) -> str:
    return f"sha256 {str(entry.get('sha256'))[:12]}"
