"""The header of an adapter file: names and shapes of its tensors, and its text metadata, without the weights.

A safetensors file begins with this as JSON. A pickle has no header and must be read as a whole.
"""

from __future__ import annotations

import json
import math
import pickletools
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError
from adapters.layers.kinds import KINDS, kinds_of, split_role

if TYPE_CHECKING:
    from adapters.layers.protocol import LayerKind

Shapes = Mapping[str, tuple[int, ...]]

_LIMIT = 100_000_000  # bytes, the limit of the safetensors library
_LONGEST_NAME = 1000  # characters; module paths of real models stay below 200
_DEEPEST = 30  # levels of JSON in a text entry
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Names of a PEFT directory's files."""
PICKLED = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Header:
    """The header of an adapter.

    Attributes:
        path: the file, or the folder of a PEFT adapter.
        shapes: of the tensors, by name.
        metadata: text entries of the file.
        peft: the tensors are described by a PEFT configuration.
        content: what a pickle held; None for other files.
    """

    path: Path
    shapes: Shapes
    metadata: Mapping[str, str] = field(default_factory=dict)
    peft: bool = False
    content: Any = None

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The PEFT configuration that describes the tensors; empty if there is none or it is not JSON."""
        place = (self.path if self.path.is_dir() else self.path.parent) / CONFIG
        try:
            found = _plain(json.loads(place.read_text(encoding="utf-8"), parse_constant=_no_number))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if self.peft and isinstance(found, dict) else {}

    @property
    def weights(self) -> Path | None:
        """The file with the tensors; None if the folder has none."""
        if self.path.is_file():
            return self.path
        return next((file for name in WEIGHTS if (file := self.path / name).is_file()), None)

    @cached_property
    def layers(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """Module with its prefix -> role of a tensor -> shape; keys of no adapter layer are left out."""
        found: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for name, shape in self.shapes.items():
            split = split_role(name)
            if split is not None:
                found[split[0]][split[1]] = shape
        return found

    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layers in the file."""
        roles = {role for parts in self.layers.values() for role in parts}
        return tuple(kind for kind in KINDS if kind in kinds_of(roles))

    def ranks(self) -> Counter[int]:
        """Rank -> number of layers that have it, as far as the shapes show."""
        kinds = self.kinds()
        ranks = (kind.rank(parts) for parts in self.layers.values() for kind in kinds)
        return Counter(rank for rank in ranks if rank is not None)

    def json(self, entry: str) -> Any:
        """A text entry as JSON; None if it is missing, not JSON, nested too deeply or holds a non-finite number."""
        try:
            return _plain(json.loads(self.metadata[entry], parse_constant=_no_number))
        except (KeyError, ValueError, RecursionError):
            return None


def read_header(path: Path) -> Header:
    """The header of a .safetensors file.

    Raises:
        InputError: the file is damaged; the message is only the reason, for the caller to put after the file's name.
    """
    if not path.is_file():  # also true of a pipe or a device, which may block forever
        raise InputError("not a file" if path.exists() else "it does not exist")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_LIMIT, size - 8):
            raise InputError("not a safetensors file, or truncated" if size else "empty file")
        try:
            head = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise InputError("not a safetensors file: its header is not JSON") from None
    try:
        entries = head.pop("__metadata__", {})
        shapes = {name: tuple(int(side) for side in entry["shape"]) for name, entry in head.items()}
        end = max((int(entry["data_offsets"][1]) for entry in head.values()), default=0)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError):
        raise InputError("not a safetensors file: its header lacks shapes or offsets") from None
    if 8 + length + end != size:
        raise InputError(f"truncated or damaged: {size} bytes instead of {8 + length + end}")
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        raise InputError("its metadata is not all text")
    check_names(shapes)
    return Header(path, shapes, {_text(key): _text(value) for key, value in entries.items()})


def pickled_names(path: Path) -> tuple[str, ...]:
    """Texts with a dot in a checkpoint of torch, among them the names of its tensors; nothing of it is executed.

    The pickle inside is taken apart, not loaded. Empty if the file is no such checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next((e for e in archive.infolist() if e.filename.endswith("data.pkl")), None)
            if entry is None or entry.file_size > _LIMIT or entry.compress_type != zipfile.ZIP_STORED:
                return ()
            texts = [found for _, found, _ in pickletools.genops(archive.read(entry)) if isinstance(found, str)]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return ()
    return tuple(name for name in dict.fromkeys(texts) if "." in name and " " not in name and len(name) < _LONGEST_NAME)


def check_names(names: Mapping[str, Any]) -> None:
    """Refuse tensor names that no model has.

    Raises:
        InputError: a name is longer than a thousand characters, or not valid text.
    """
    try:
        "".join(names).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("a tensor in it has a name that is not valid text") from None
    longest = max(map(len, names), default=0)
    if longest > _LONGEST_NAME:
        raise InputError(f"a tensor in it has a name of {longest} characters, longer than any model's")


def last_names(modules: Iterator[str]) -> tuple[str, ...]:
    """The last components of module paths ("to_q"), each once, sorted."""
    return tuple(sorted({module.rpartition(".")[2] for module in modules}))


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _plain(value: Any, depth: int = 0) -> Any:
    """``value`` with every text valid in UTF-8.

    Raises:
        ValueError: nested too deeply, or a number that is not finite.
    """
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        return {_text(key): _plain(part, depth + 1) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part, depth + 1) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not finite")
    return _text(value) if isinstance(value, str) else value


def _text(text: str) -> str:
    """``text`` with "?" for lone surrogates, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
