"""The interface of a file format, and the list of formats.

A module in this package with a constant ``FORMAT`` is a format; an installed package adds more under the entry point
group ``adapter_studio.formats`` (its value names a module with such a constant). Reading, writing, recognition in the
library, the choices for conversion and the table in the documentation all use this list. Importing does not load torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from adapters import discovery
from adapters.errors import InputError, nearest
from adapters.formats.keys import refuse_foreign
from adapters.formats.lora import LoraFile
from adapters.formats.words import read_beside, split_words

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats.header import Header

GROUP = "adapter_studio.formats"


class Format(ABC):
    """One way to store an adapter on disk.

    Attributes:
        name: its name in commands.
        title: the programs that read it.
        suffix: of its files; "" = it is a folder.
        order: position when a file is recognised; lower comes first, and the first that recognises the file reads it.
        writes: whether adapters can be written in it.
        mark: name of a file that shows that the folder it is in is one adapter; "" = none.
        dotted: whether it needs the model's own module names ("attn1.to_q"); an adapter whose names have lost their
            dots can then only be written with the model at hand.
    """

    name: str
    title: str
    suffix: str = ".safetensors"
    order: int = 50
    writes: bool = True
    mark: str = ""
    dotted: bool = True

    @abstractmethod
    def recognises(self, head: Header) -> bool:
        """Whether a file with this header is in the format."""

    @abstractmethod
    def read(self, head: Header) -> LoraFile:
        """The adapter; raises :class:`InputError` if the file is damaged or not understood."""

    def header(self, path: Path) -> Header | None:
        """The header of a file that is neither safetensors nor a pickle; None = not in this format."""
        return None

    def refusal(self, file: LoraFile) -> str:
        """Why the format cannot hold this adapter, as a sentence that names one that can; empty if it can."""
        return ""

    def write(self, file: LoraFile, path: Path, metadata: Mapping[str, str] | None = None) -> Path:
        """Write ``file`` with extra text ``metadata``; returns the path.

        Raises:
            InputError: the format cannot hold it, or the disk is full.
        """
        if reason := self.refusal(file):
            raise InputError(reason)
        return self._write(file, path, metadata or {})

    def _write(self, file: LoraFile, path: Path, metadata: Mapping[str, str]) -> Path:
        raise InputError(f"Adapters are read from the {self.name} format but not written in it.")


class TensorFormat(Format):
    """A format that is one table of named tensors with text metadata."""

    @abstractmethod
    def parse(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> LoraFile:
        """The adapter made of the tensors; ``source`` names the file in errors. Raises :class:`InputError`."""

    def read(self, head: Header) -> LoraFile:
        from adapters.formats.tensors import check_finite, read_tensors

        source = f"'{head.path.name}'"
        tensors, metadata = read_tensors(head.path)
        if not tensors:
            raise InputError(f"{source} holds no tensors.")
        refuse_foreign(tensors, source)
        check_finite(tensors, source)
        tensors, words = split_words(tensors, source)
        if not tensors:
            raise InputError(
                f"{source} holds words ({', '.join(words)}) but no layers: it is an embedding, not an adapter."
            )
        made = self.parse(tensors, metadata, source)
        return read_beside(replace(made, format=self.name, path=head.path, words=words), head.path)


@cache
def _discovered() -> Mapping[str, Format]:
    package = __name__.rpartition(".")[0]
    files = sorted(Path(__file__).parent.glob("*.py"))  # searched as text: modules without a format may import torch
    modules = [f"{package}.{file.stem}" for file in files if "\nFORMAT = " in file.read_text(encoding="utf-8")]
    return discovery.objects(modules, "FORMAT", Format, GROUP)


def formats() -> Mapping[str, Format]:
    """Every format by name, in the order in which they are tried."""
    return _discovered()


def writable() -> tuple[str, ...]:
    """Names of the formats in which adapters can be written."""
    return tuple(name for name, one in formats().items() if one.writes)


def find(name: str) -> Format:
    """The format called ``name``, to write in.

    Raises:
        InputError: there is none.
    """
    if name not in writable():
        raise InputError(f"There is no format '{name}'{nearest(name, writable())}: use one of {', '.join(writable())}.")
    return formats()[name]


def recognise(head: Header) -> Format | None:
    """The format of a file with this header; None if no format recognises it."""
    return next((one for one in formats().values() if one.recognises(head)), None)
