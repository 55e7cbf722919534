"""The catalogue: declarations read from the source text, properties, packages that bring methods."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from adapters import catalogue, discovery
from adapters.catalogue import Method

CALLS = {"Method": Method}
PLAIN = {"title": "T", "summary": "S.", "stage": "compose", "makes": "picture", "paper": "", "entry": "m:f"}


def test_read_from_the_text_is_what_the_modules_hold() -> None:
    held = []
    for package in catalogue.SEARCHED:
        for info in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            try:
                module = importlib.import_module(info.name)
            except ModuleNotFoundError as error:  # the compiled kernels of a package that is not installed
                if (error.name or "").partition(".")[0] != "triton":
                    raise
                continue
            held += getattr(module, "METHODS", ()) or ([module.METHOD] if hasattr(module, "METHOD") else [])
    by_name = {(method.stage, method.name): method for method in catalogue.methods()}
    assert held == [by_name[method.stage, method.name] for method in held]
    assert {method.entry.partition(".")[0] for method in held} == set(catalogue.SEARCHED)


def test_listing_loads_no_torch() -> None:
    code = "import sys; from adapters import catalogue; catalogue.methods(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_declarations_may_name_constants_of_their_file(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text(
        "import torch\nSHARED = {'regional': True}\n"
        "METHODS = (Method(name='x', title='T', summary='S' ' and S.', stage='compose', makes='picture', paper='', "
        "entry='m:f', properties=SHARED), Method('y', 'T', 'S.', 'learn', 'LoRA', '', 'm:f'))\n"
    )
    first, second = discovery.declarations(file, CALLS)
    assert (first.summary, dict(first.properties)) == ("S and S.", {"regional": True})
    assert (second.name, second.stage) == ("y", "learn")


def test_a_computed_declaration_is_refused_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text("import os\nMETHOD = Method(name=os.getcwd())\n")
    with pytest.raises(ValueError, match=r"m\.py: line 2: 'os.getcwd\(\)' is not a plain value"):
        discovery.declarations(file, CALLS)


@dataclass(frozen=True)
class Draws:
    regional: bool = False
    text: Literal["mean", "each"] = "mean"


def test_properties_are_read_as_the_stages_dataclass() -> None:
    assert Method(name="x", **PLAIN).typed(Draws) == Draws()  # type: ignore[arg-type]
    assert Method(name="x", **PLAIN, properties={"text": "each"}).typed(Draws) == Draws(text="each")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("properties", "sentence"),
    [({"regionel": True}, "did you mean 'regional'"), ({"text": "all"}, "'text' cannot be 'all'"),
     ({"regional": 1}, "'regional' cannot be 1")],
)  # fmt: skip
def test_wrong_properties_are_named(properties: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Method(name="x", **PLAIN, properties=properties).typed(Draws)  # type: ignore[arg-type]


def _install(folder: Path, module: str, text: str) -> None:
    (folder / f"{module}.py").write_text(text)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{discovery.GROUP}]\n{module} = {module}\n")


@pytest.fixture
def fresh():
    catalogue.methods.cache_clear()
    yield
    catalogue.methods.cache_clear()


def test_installed_packages_bring_methods_and_broken_ones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fresh: None
) -> None:
    text = f"raise ImportError  # never imported\nMETHOD = Method(name={{!r}}, **{PLAIN!r})\n"
    good = text.replace(f"**{PLAIN!r}", ", ".join(f"{key}={value!r}" for key, value in PLAIN.items()))
    _install(tmp_path, "good_methods", good.format("mine"))
    _install(tmp_path, "taken_methods", good.format("merge"))
    _install(tmp_path, "broken_methods", "METHOD = Method(name=f())\n")
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert catalogue.find("compose", "mine").entry == "m:f"
    assert catalogue.find("compose", "merge").entry.startswith("pipelines.")
    assert "'taken_methods' are left out: two methods are registered as compose 'merge'" in caplog.text
    assert "'broken_methods' are left out" in caplog.text
