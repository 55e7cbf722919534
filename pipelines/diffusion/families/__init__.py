"""Base families: one file per family describes everything that differs between them.

A module here with a constant ``FAMILY`` is a family; an installed package adds more under the entry point group
``adapter_studio.families`` (its value names a module with such a constant). Composition, training, distillation, the
recognition of files and bases, pages and commands all use these descriptions. Importing this package loads neither
torch nor diffusers.
"""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import discovery
from adapters.errors import InputError
from pipelines.diffusion.families.base import Encoding, Family

if TYPE_CHECKING:
    from adapters.formats import LoraFile

GROUP = "adapter_studio.families"


_OURS = (f"{__name__}.{info.name}" for info in pkgutil.iter_modules(__path__))

FAMILIES: Mapping[str, Family] = discovery.objects(_OURS, "FAMILY", Family, GROUP)
"""Every family by name, sorted by ``order``."""


MODULAR = (
    "diffusers has {title} only as a modular pipeline, which calls nothing back after a step, so composition by steps, "
    "schedules, previews and cancelling cannot work"
)

REFUSED: Mapping[str, tuple[str, str]] = {
    "Flux3ModularPipeline": ("Flux 3", MODULAR),
    "Flux3DistilledModularPipeline": ("Flux 3", MODULAR),
    "AnimaModularPipeline": ("Anima", MODULAR),
    "Ideogram4Pipeline": (
        "Ideogram 4",
        "its pipeline in diffusers takes no encoded prompts and is guided by a second network, which adapters for the "
        "first one do not change",
    ),
}
"""diffusers' class -> title and reason, for families that do not fit the way adapters are composed here."""


def family_of(pipe: Any) -> Family:
    """The family of a diffusers pipeline object.

    Raises:
        InputError: a class of no known family, or of one that is refused.
    """
    return by_pipeline(type(pipe).__name__, f"a {type(pipe).__name__}")


def by_pipeline(name: str, source: str) -> Family:
    """The family whose pipeline class is called ``name``; ``source`` names the model in the error.

    Raises:
        InputError: no such family.
    """
    for family in FAMILIES.values():
        if name in (family.pipeline, *family.bases, *family.other_pipelines.values()):
            return family
    if name in REFUSED:
        title, reason = REFUSED[name]
        raise InputError(f"{source} is {title}, which is not supported: {reason.format(title=title)}.")
    possible = ", ".join(family.pipeline for family in FAMILIES.values())
    raise InputError(f"{source} is made for '{name or 'an unnamed pipeline'}'; composition works with {possible}.")


def find(name: str) -> Family:
    """The family called ``name``.

    Raises:
        InputError: there is none.
    """
    if name not in FAMILIES:
        raise InputError(f"Unknown model family '{name}': use one of auto, {', '.join(FAMILIES)}.")
    return FAMILIES[name]


IN_BLOCKS = re.compile(r"blocks[._]\d+[._](attn[._](to_[qkv]|to_qkv_mlp_proj)|(img|txt)_attn[._]qkv|linear1)$")
"""Projections of the states in a transformer's blocks."""


def of_adapter(
    names: Iterable[str], width: int | None = None, hints: str = "", inner: int | None = None
) -> Family | None:
    """The family an adapter file was made for, from its header; None if unknown.

    Args:
        names: of its tensors.
        width: inputs of a cross-attention key projection, if there is one.
        hints: its metadata on the base.
        inner: inputs of a projection in the transformer's blocks, if there is one.
    """
    text = "\n".join(names)
    for family in _by_precedence():
        sign = family.signature
        if sign.fits_adapter(text, width, inner) or (sign.hints and _hinted(sign.hints, hints)):
            return family
    return None


def family_of_adapter(file: LoraFile) -> Family | None:
    """The family of an adapter as read, from the names and sizes of its layers and its metadata; None = not known."""
    names = [f"{component}.{module}.lora_A.weight" for component, module, _ in file.layers()]
    keys = [layer.A.shape[1] for _, module, layer in file.layers() if re.search(r"attn2[._]to_[kv]$", module)]
    hints = " ".join(file.metadata.get(key, "")[:1000] for key in ("modelspec.architecture", "ss_base_model_version"))
    inner = [layer.A.shape[1] for _, module, layer in file.layers() if IN_BLOCKS.search(module)]
    found = of_adapter(names, keys[0] if keys else None, hints, inner[0] if inner else None)
    return None if found and "transformer" in file.parts and found.unet else found


def of_checkpoint(names: Iterable[str]) -> Family | None:
    """The family of a single-file model with tensors of these names; None if unknown."""
    text = "\n".join(names)
    return next((family for family in _by_precedence() if family.signature.fits_checkpoint(text)), None)


def detect(source: str | Path) -> Family:
    """The family of a model directory, a single file or a hub id.

    Raises:
        InputError: the source does not exist or cannot be fetched, or its family is unknown.
    """
    place = Path(source)
    if place.is_file():
        return _detect_file(place)
    return by_pipeline(_class_name(_index(source)), f"'{source}'")


def _index(source: str | Path) -> Path:
    """The model_index.json of a pipeline directory or a hub id."""
    place = Path(source)
    if place.is_dir():
        names = (place / name for name in INDEXES)
        index = next((file for file in names if file.is_file()), None)
        if index is None:
            raise InputError(f"'{place}' is not a diffusers pipeline directory: it has no model_index.json.")
        return index
    if place.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1:
        raise InputError(f"Base model '{source}' is neither a directory, a file nor a hub id ('owner/name').")
    return _fetched_index(str(source))


INDEXES = ("model_index.json", "modular_model_index.json")
"""Files that name a pipeline's class."""


def _fetched_index(source: str) -> Path:
    """The index of a hub id; raises :class:`InputError` if there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        try:
            return Path(hf_hub_download(source, INDEXES[0]))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            return Path(hf_hub_download(source, INDEXES[1]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"Base model '{source}' could not be fetched from the hub: {reason}") from None


def opened_as(family: Family, source: str | Path) -> str:
    """diffusers' class for a base of ``family``: the one it was published for, or else the text-to-image class."""
    index = Path(source) / INDEXES[0]
    if family.bases and not Path(source).exists():
        try:
            index = _fetched_index(str(source))
        except InputError:
            return family.pipeline  # opening it will say why
    name = _class_name(index) if index.is_file() else ""
    return name if name in family.bases else family.pipeline


def parts_of(source: str | Path) -> tuple[str, frozenset[str]]:
    """diffusers' class of a pipeline directory, and the names of the parts it has; empty for anything else."""
    index = Path(source) / INDEXES[0]
    if not index.is_file():
        return "", frozenset()
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"'{index}' is not valid JSON: {error}") from None
    parts = {name for name, entry in found.items() if isinstance(entry, list) and entry[:1] != [None]}
    return str(found.get("_class_name", "")), frozenset(parts)


def tensor_names(file: Path) -> list[str]:
    """The names of the tensors in a single-file model.

    Raises:
        InputError: it is not a readable safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        raise InputError(f"Single-file models are read as .safetensors only, not '{file.name}'.")
    try:
        with safe_open(file, framework="np") as content:
            return list(content.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"'{file}' is not a readable safetensors file: {error}") from None


def _detect_file(file: Path) -> Family:
    family = of_checkpoint(tensor_names(file))
    if family is None:
        raise InputError(
            f"'{file.name}' is a checkpoint of no known family ({', '.join(FAMILIES)}): name it with --family."
        )
    return family


def _by_precedence() -> list[Family]:
    return sorted(FAMILIES.values(), key=lambda family: -family.signature.precedence)


def _hinted(pattern: str, hints: str) -> bool:
    return bool(re.search(pattern, hints, re.IGNORECASE))


def _class_name(index: Path) -> str:
    try:
        return str(json.loads(index.read_text(encoding="utf-8")).get("_class_name", ""))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"'{index}' is not valid JSON: {error}") from None


__all__ = [
    "FAMILIES",
    "Encoding",
    "Family",
    "by_pipeline",
    "detect",
    "family_of",
    "find",
    "of_adapter",
    "of_checkpoint",
    "opened_as",
    "parts_of",
    "tensor_names",
]
