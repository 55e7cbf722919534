"""The API reference shows what people import, although packages import it on first use."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import pytest

import studio

SCRIPT = Path(__file__).parents[1] / "docs" / "reference.py"


def reference():
    spec = importlib.util.spec_from_file_location("reference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("error:Found")
def test_the_public_functions_are_documented(tmp_path: Path) -> None:
    reference().build(tmp_path, ["studio", "adapters.formats"])
    page = (tmp_path / "studio.html").read_text("utf-8")
    for name in ("load", "compose", "train", "reconstruct", "chat"):
        first = inspect.getdoc(getattr(studio, name)).splitlines()[0].split("`")[0].split("'")[0]
        assert f'id="{name}"' in page, name
        assert first.strip() in page, first


def test_every_public_module_has_a_page() -> None:
    names = reference().modules()
    assert {"studio.api", "pipelines.geometry.scene", "adapters.formats.kohya", "ui.app"} <= set(names)
    assert not any("__main__" in name for name in names)
