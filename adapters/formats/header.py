"""What an adapter file says before any weight is read: names and shapes of its tensors, and its text.

A safetensors file begins with this as JSON. A pickle has no header: what is in it must be read to be told.
"""

from __future__ import annotations

import json
import math
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

_LIMIT = 100_000_000  # bytes, the limit of the format's own readers
_LONGEST_NAME = 1000  # letters; module paths of real models stay below 200
_DEEPEST = 30  # levels of JSON in a text entry
CONFIG = "adapter_config.json"
PICKLED = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Header:
    """The head of an adapter.

    Attributes:
        path: the file, or the folder of a PEFT adapter.
        shapes: of the tensors, by name.
        metadata: the text entries of the file.
        peft: a configuration of PEFT says what the tensors are.
        content: of a pickle, what was in it.
    """

    path: Path
    shapes: Shapes
    metadata: Mapping[str, str] = field(default_factory=dict)
    peft: bool = False
    content: Any = None

    @cached_property
    def layers(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """Module with its prefix -> role of a tensor -> shape; names that are no adapter's are left out."""
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
        """How many layers have which rank, where the shapes tell it."""
        kinds = self.kinds()
        told = (kind.rank(parts) for parts in self.layers.values() for kind in kinds)
        return Counter(rank for rank in told if rank is not None)

    def json(self, entry: str) -> Any:
        """A text entry as JSON; None when there is none, or it is not JSON or nested deeper than people write."""
        try:
            return _plain(json.loads(self.metadata[entry], parse_constant=_no_number))
        except (KeyError, ValueError, RecursionError):
            return None


def read_header(path: Path) -> Header:
    """The head of a .safetensors file.

    Raises:
        InputError: what is wrong with the file, as a reason that follows its name.
    """
    if not path.is_file():  # also of a pipe or a device, which may wait for ever
        raise InputError("not a file" if path.exists() else "it does not exist")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_LIMIT, size - 8):
            raise InputError("not a safetensors file, or cut off" if size else "empty file")
        try:
            head = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise InputError("not a safetensors file: its head is not JSON") from None
    try:
        entries = head.pop("__metadata__", {})
        shapes = {name: tuple(int(side) for side in entry["shape"]) for name, entry in head.items()}
        end = max((int(entry["data_offsets"][1]) for entry in head.values()), default=0)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError):
        raise InputError("not a safetensors file: its head lacks shapes or offsets") from None
    if 8 + length + end != size:
        raise InputError(f"cut off or damaged: {size} bytes instead of {8 + length + end}")
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        raise InputError("its metadata holds something else than text")
    check_names(shapes)
    return Header(path, shapes, {_text(key): _text(value) for key, value in entries.items()})


def check_names(names: Mapping[str, Any]) -> None:
    """Refuse names that no module of a model has.

    Raises:
        InputError: longer than a thousand letters, or no text.
    """
    try:
        "".join(names).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("a tensor in it has a name that is no text") from None
    longest = max(map(len, names), default=0)
    if longest > _LONGEST_NAME:
        raise InputError(f"a tensor in it has a name of {longest} letters, which no module of a model has")


def last_names(modules: Iterator[str]) -> tuple[str, ...]:
    """The last names of module paths ("to_q"), each once, sorted."""
    return tuple(sorted({module.rpartition(".")[2] for module in modules}))


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _plain(value: Any, depth: int = 0) -> Any:
    """``value`` with text that can be written anywhere.

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
    """Text without halves of characters, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
