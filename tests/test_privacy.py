"""Files that people share say nothing about the disk they were made on: one of each, made under a telling folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

import assets
from adapters.progress import Silent
from studio import privacy
from studio.composition import job as compose
from studio.composition.schema import ComposeConfig
from studio.reconstruction import job as reconstruct
from studio.reconstruction.schema import ReconstructConfig
from studio.training.tasks import image, language
from tests import tiny
from tests.language import tiny as tiny_language
from tests.language.conftest import settings as language_settings
from tests.language.conftest import write_rows
from tests.training import bed
from tests.training.conftest import settings as image_settings

WORD = "quokkabrook"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's folder with the studio's home in it."""
    folder = tmp_path / WORD
    folder.mkdir()
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(folder / "home"))
    monkeypatch.setenv("HOME", str(folder))
    return folder


def telling(paths: Iterable[str | Path]) -> list[str]:
    """The files (of folders: all in them) that hold the word, in plain bytes or in UTF-16."""
    files = [file for path in map(Path, paths) for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    files = [file for file in files if file.is_file()]
    assert files
    words = (WORD.encode(), WORD.encode("utf-16-le"))
    return [file.name for file in files if any(word in file.read_bytes() for word in words)]


def test_pictures_and_adapters_of_images(place: Path) -> None:
    base, photos = tiny.saved("sd", place), bed.crosses(place / "photos")
    config = image_settings(base, photos, steps=1, name="cross", export=["diffusers", "kohya", "peft"], sample_every=1)
    trained = image.run(config, place / "job")
    shared = [path for path in (place / "job").rglob("*") if path.is_file() and path.name != "config.yaml"]
    assert {"card.md", "cross.safetensors", "cross-kohya.safetensors"} <= {path.name for path in shared}
    made = compose.run(
        ComposeConfig(base=str(base), prompt="a cross", steps=1, device="cpu", adapters=[{"path": trained["adapter"]}],
                      image=str(sorted(photos.glob("*.png"))[0]), strength=1),
        place / "composed", Silent(),
    )  # fmt: skip
    assert telling([*shared, *made["images"], made["recipe"]]) == []


def test_adapters_of_language_models(place: Path) -> None:
    rows = write_rows(place / "rows.jsonl", [{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(8)])
    base = tiny_language.llama(place / "llama")
    language.run(language_settings(base, rows, steps=1), place / "job")
    assert telling([place / "job" / "little"]) == []


def test_scenes(place: Path) -> None:
    pictures = [shutil.copy(file, place) for file in sorted(assets.path("scenes/room").glob("*.png"))[::3]]
    config = ReconstructConfig(images=[str(file) for file in pictures], steps=2, epochs=1, device="cpu", calibrate=True,
                               rank=2)  # fmt: skip
    done = reconstruct.run(config, place / "job", Silent())
    exported = []
    for kind in ("glb", "ply", "npz", "colmap", "nerfstudio"):
        exported.append(reconstruct.export(done["scene"], place / f"as-{kind}", kind).place)
    assert telling([*exported, done["adapter"]]) == []


def test_only_paths_of_this_disk_are_cut(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    kept = {"prompt": "/imagine a cat", "list": ["a/b", "~nobody/x", "owner/model", "\0", "/" * 9999], "number": 1}
    assert privacy.names_only(kept) == kept
    assert privacy.names_only({"data": [str(tmp_path / "a.png")], "base": str(tmp_path)}) == {
        "data": ["a.png"],
        "base": tmp_path.name,
    }
