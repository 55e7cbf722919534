"""Recipes: how a picture was made, and how to make it again.

A recipe is ``{"version", "job", "config", "adapters": [{name, size, sha256}], "base": {name, sha256}, "versions",
"made_on"}``, and "controlnet" and "denoiser" like "base" where there is one. ``config`` is a whole
:class:`~studio.composition.schema.ComposeConfig` in which files have names only, because pictures are shared and a path
reveals the user's disk. The hashes identify the files, wherever they are now; start picture, mask and control picture
are included, and of two denoisers the other file ("others"). Recipes of earlier versions hold a ``path`` too. If the
texts were written with choices or adapters in them, "written" holds them as typed and ``config`` the result; "emphasis"
lists the words whose weight is not 1.
"""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from adapters import formats
from adapters.errors import InputError
from pipelines.diffusion.families import FAMILIES
from studio import library
from studio.composition.canvas_size import family
from studio.composition.schema import ComposeConfig, ModelChoice

VERSION = 1

BESIDE = {"controlnet": "ControlNet", "denoiser": "denoiser"}
"""Fields with a model beside the base -> its name in messages."""

_PACKAGES = ("adapter-studio", "torch", "diffusers", "transformers", "peft", "numpy")


def build(config: ComposeConfig, made_on: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a composition; hashes adapters and a local base (remembered until the files change).

    Args:
        config: the requested composition.
        made_on: device, dtype and number of threads, which decide the last bits of a picture.

    Raises:
        InputError: an adapter or the base is missing.
    """
    values = config.model_dump(mode="json")
    values["adapters"] = [{**use, "path": _shared(use["path"], "adapter")} for use in values["adapters"]]
    values["base"] = _shared(config.base, "base")
    for name in BESIDE:
        values[name] = _shared(values[name], "base") if values[name] else ""
    return {
        "version": VERSION,
        "job": "compose",
        "config": values,
        "adapters": [_adapter(use.name, library.resolve_adapter(use.path)) for use in config.adapters],
        "base": _base(config.base),
        **{name: _beside(given, config) for name in BESIDE if (given := getattr(config, name))},
        "versions": versions(),
        "made_on": made_on,
    }


def known_hash(place: Path) -> str:
    """The SHA-256 of what is loaded; that of a file is already in the recipe and not computed again."""
    return library.sha256(place) if place.is_file() else formats.sha256(place)


def versions() -> dict[str, str]:
    """Versions of Python and the packages that affect a picture."""
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
        overrides: values to change; ``adapters`` or ``base`` given here are used unchecked.

    Raises:
        InputError: the recipe is another program's or newer, or an adapter or the base is missing or different.
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
        values["base"] = _present_base(values.get("base"), recipe.get("base") or {})
    for name, title in BESIDE.items():
        if values.get(name) and name not in overrides:
            values[name] = _present_beside(values[name], recipe.get(name) or {}, name, title)
    return ComposeConfig.parse({**values, **overrides}, source="the recipe")


def _present_adapters(uses: list[dict[str, Any]], known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(uses) != len(known):
        raise InputError("The recipe is damaged: it does not identify its adapters' files.")
    return [{**use, "path": _same_adapter(use, entry)} for use, entry in zip(uses, known, strict=True)]


def _same_adapter(use: dict[str, Any], entry: dict[str, Any]) -> str:
    """Where the recipe's exact file is: at its old place, or under another name in the library."""
    name = entry.get("name") or use["path"]
    changed: Path | None = None
    for text in _former(use["path"], entry, "adapter"):
        try:
            place = library.resolve_adapter(text)
        except InputError:
            continue
        if library.sha256(place) == entry.get("sha256"):
            return text
        changed = changed or place
    twin = _by_hash(entry)
    if twin is not None:
        return twin
    what_to_do = "put the original back (studio library import), or choose adapters yourself with --lora."
    if changed is None:
        raise InputError(
            f"The adapter '{name}' ({_short(entry)}) of the recipe is neither at its old place nor in the library: "
            f"{what_to_do}"
        )
    raise InputError(
        f"The adapter '{name}' at {changed} is a different file ({library.sha256(changed)[:12]}) than the recipe's "
        f"({_short(entry)}): {what_to_do}"
    )


def _former(given: Any, entry: dict[str, Any], kind: Literal["adapter", "base"]) -> list[str]:
    """Where the file of a recipe may be: its recorded path, and where files with its hash were seen on this machine."""
    known = library.places(str(entry.get("sha256")), kind)
    texts = [str(given), *([str(Path(str(entry["path"])).expanduser())] if entry.get("path") else []), *map(str, known)]
    return list(dict.fromkeys(texts))


def _by_hash(entry: dict[str, Any]) -> str | None:
    """The name of the library's adapter with the recipe's hash; only files of its size are read."""
    for record in library.adapters():
        if record.problem or entry.get("size") not in (None, _weights(record.path).stat().st_size):
            continue
        if library.sha256(record.path) == entry.get("sha256"):
            return record.name
    return None


def _present_base(given: Any, entry: dict[str, Any]) -> str:
    """Where the recipe's exact base model is; one named by its hub id is used as it is today."""
    name, expected = entry.get("name") or given, entry.get("sha256")
    if not expected:
        return str(given)
    what_to_do = "put the original back, or choose a base model yourself with --base."
    changed = False
    for text in _former(name, entry, "base"):
        try:
            place = Path(library.resolve_base(text))
        except InputError:
            continue
        if place.exists() and library.sha256(place, "base") == expected:
            return text
        changed = True
    for record in library.bases():
        if not record.problem and library.sha256(record.path, "base") == expected:
            return record.name
    if not changed:
        raise InputError(f"The base model '{name}' of the recipe is not here: {what_to_do}")
    raise InputError(f"The base model '{name}' is not the recipe's ({expected[:12]}): {what_to_do}")


def _present_beside(given: str, entry: dict[str, Any], name: str, title: str) -> str:
    """Where the recipe's exact model of :data:`BESIDE` is; one named by its hub id is used as it is today."""
    expected = entry.get("sha256")
    if not expected:
        return given
    for text in _former(given, entry, "base"):
        place = Path(text).expanduser()
        others = {place.with_name(other): value for other, value in (entry.get("others") or {}).items()}
        wanted = {place: expected, **others}
        if all(file.exists() and library.sha256(file.absolute(), "base") == value for file, value in wanted.items()):
            return text
    raise InputError(
        f"The {title} '{given}' ({_short(entry)}) of the recipe is not here: put the original back, or choose one "
        f"yourself with --{name}."
    )


def _beside(given: str, config: ComposeConfig) -> dict[str, Any]:
    path = Path(given).expanduser().absolute()
    if not path.exists():
        return {"name": given}
    others = others_of(path, config) if given == config.denoiser else []
    more = {"others": {other.name: library.sha256(other, "base") for other in others}} if others else {}
    return {"name": path.name, "sha256": library.sha256(path, "base"), **more}


def others_of(denoiser: Path, config: ModelChoice) -> list[Path]:
    """The other file of a base's two denoisers, beside the one that is named."""
    from pipelines.diffusion.denoiser_file import files_of

    name = config.family if config.family != "auto" else family(config.base)
    return files_of(denoiser, FAMILIES[name])[1:] if name in FAMILIES else []


def _adapter(name: str, path: Path) -> dict[str, Any]:
    return {"name": name or path.stem, "size": _weights(path).stat().st_size, "sha256": library.sha256(path)}


def _base(given: str) -> dict[str, Any]:
    path = Path(library.resolve_base(given))
    return {
        "name": _shared(given, "base"),
        "sha256": library.sha256(path, "base") if path.exists() else None,
    }


def _shared(given: str, kind: Literal["adapter", "base"]) -> str:
    """A file's public name: its name in the library, its hub id, or its own name without the folders."""
    records = library.adapters() if kind == "adapter" else library.bases()
    path = Path(given).expanduser()
    return path.absolute().name if path.exists() and given not in {record.name for record in records} else given


def _weights(path: Path) -> Path:
    from studio.library import facts

    return facts.weight_file(path)


def _short(entry: dict[str, Any]) -> str:
    return f"sha256 {str(entry.get('sha256'))[:12]}"
