"""What the library says about bases follows from the families' descriptions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import InputError
from pipelines.diffusion.families import FAMILIES
from studio import library
from studio.cli.app import run
from studio.library import base_families
from ui.pages import compose
from ui.pages.library import describe


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_says_what_it_works_with(name: str) -> None:
    family, found = FAMILIES[name], base_families.works_with(name)
    assert found[:3] == ("merge", "switch", "composite")
    assert ("training" in found) == (not family.untrainable)
    assert any(one.startswith("regions") for one in found) == (family.video is None or family.video.regions)
    assert ("inpainting" in found) == ("inpaint" in family.other_pipelines)
    assert any(one.startswith("image to") for one in found) == ("image" in family.other_pipelines)
    assert base_families.licence(name)


@pytest.mark.parametrize(("name", "wanted"), [
    ("sdxl", "regions (activation, output, lora-composer, cross)"), ("flux", "regions (activation, output)"),
    ("wan", "regions (activation, output)"), ("hidream", "regions (output)"), ("ltx2", ""),
])  # fmt: skip
def test_methods_whose_regions_work_are_named(name: str, wanted: str) -> None:
    found = [one for one in base_families.works_with(name) if "regions" in one]
    assert [set(re.findall(r"[\w-]+", one)) for one in found] == (
        [set(re.findall(r"[\w-]+", wanted))] if wanted else []
    )


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.inner_regions])
def test_regions_that_are_not_named_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"not possible.*: use method 'output'"):
        FAMILIES[name].joined([])


def test_unknown_family() -> None:
    assert base_families.works_with("unknown") == ()
    assert base_families.licence("unknown") == ""


def test_pages_and_commands_show_it(capsys: Any) -> None:
    record = library.find("tinymoji", "base")
    wanted = ", ".join(base_families.works_with("sd"))
    assert wanted in describe(record)
    assert wanted in compose.about_base("tinymoji")
    assert compose.about_base("someone/else") == ""
    assert any("tinymoji" in label and "MB" in label for label, _ in compose.base_choices())
    assert run(["library", "show", "tinymoji", "--base"]) == 0
    assert "works with" in capsys.readouterr().out
