"""A disk that fills up: one sentence, what was there before stays, nothing half written is left."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from adapters.errors import InputError
from adapters.formats import LoraFile, LoraLayer, tensors, write_diffusers, write_kohya, write_peft
from studio.composition import recipe_png
from studio.library import edit

ADAPTER = LoraFile({"unet": {"down_blocks.0.to_q": LoraLayer(torch.ones(1, 3), torch.ones(4, 1), 1.0)}})
FULL = "No space left on device"


def half_a_picture(self: Image.Image, place: Path, *_: Any, **__: Any) -> None:
    Path(place).write_bytes(b"half")
    raise OSError(errno.ENOSPC, FULL)


def kept(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, FULL), SafetensorError(f"I/O error: {FULL} (os error 28)")])
@pytest.mark.parametrize(("write", "name"), [(write_diffusers, "a.safetensors"), (write_kohya, "a.safetensors"),
                                             (write_peft, "a")])  # fmt: skip
def test_adapters(
    write: Callable[[LoraFile, Path], Path], name: str, error: Exception, tmp_path: Path, monkeypatch: Any
) -> None:
    write(ADAPTER, tmp_path / name)
    before = kept(tmp_path)

    def full(_: Any, part: Path, **__: Any) -> None:
        part.write_bytes(b"half")
        raise error

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(InputError, match=rf"could not be written \(.*{FULL}.*\): free some space") as caught:
        write(ADAPTER, tmp_path / name)
    assert "\n" not in str(caught.value)
    assert before
    assert kept(tmp_path) == before


def test_pictures(tmp_path: Path, monkeypatch: Any) -> None:
    picture = Image.new("RGB", (4, 4), "red")
    recipe_png.save_png(picture, tmp_path / "p.png", {"version": 1})
    before = kept(tmp_path)
    monkeypatch.setattr(Image.Image, "save", half_a_picture)
    with pytest.raises(InputError, match=rf"'.*p.png' could not be written \({FULL}\)"):
        recipe_png.save_png(picture, tmp_path / "p.png", {"version": 1})
    assert kept(tmp_path) == before


def test_previews_of_the_library(tmp_path: Path, monkeypatch: Any) -> None:
    source = tmp_path / "source.png"
    Image.new("RGB", (4, 4), "red").save(source)
    write_diffusers(ADAPTER, tmp_path / "fox.safetensors")
    record: Any = SimpleNamespace(path=tmp_path / "fox.safetensors")
    edit.set_preview(record, source)
    before = kept(tmp_path)
    assert "fox.png" in before
    monkeypatch.setattr(Image.Image, "save", half_a_picture)
    with pytest.raises(InputError, match=FULL):
        edit.set_preview(record, source)
    assert kept(tmp_path) == before
