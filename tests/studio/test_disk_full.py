"""A disk that fills up: one sentence, what was there before stays, nothing half written is left."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from adapters.errors import InputError
from adapters.formats import LoraFile, LoraLayer, tensors, write_diffusers, write_kohya, write_peft
from studio import database, error_sentences, jobs, library, settings
from studio.cli.app import run
from studio.composition import recipe_png
from studio.library import edit
from tests.studio.files import diffusers_lora

SIZE = "3m"
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


@pytest.fixture
def full_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Path]]:
    """A home on a small disk of its own, which the returned function fills to the last byte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(place))

    def fill() -> Path:
        handle = os.open(place / "fill", os.O_CREAT | os.O_WRONLY)
        with contextlib.suppress(OSError):
            while True:
                os.write(handle, b"x" * 512)
        os.close(handle)
        return place

    try:
        yield fill
    finally:
        database._local.__dict__.clear()
        subprocess.run(["umount", "-l", str(place)], check=False)


def shelve(*names: str) -> None:
    for seed, name in enumerate(names):
        diffusers_lora(settings.folder("library", "adapters") / f"{name}.safetensors", rank=1, seed=seed)


@pytest.mark.parametrize("before", [True, False], ids=["known", "new"])
def test_commands_on_a_full_disk(full_home: Callable[[], Path], before: bool, capsys: Any) -> None:
    shelve("cat", "dog")
    if before:
        assert run(["library", "list"]) == run(["jobs", "list"]) == 0
    place = full_home()
    capsys.readouterr()
    assert run(["jobs", "list"]) == 0
    assert run(["library", "list"]) == 0
    assert "cat" in capsys.readouterr().out
    assert run(["library", "delete", "cat"]) == 0
    assert [record.name for record in library.adapters() if not record.read_only] == ["dog"]
    assert [item.name for item in library.trashed()] == ["cat"]
    assert run(["compose", "--prompt", "x", "--steps", "1"]) != 0
    assert run(["library", "import", str(place / "library/adapters/dog.safetensors"), "--name", "twin"]) != 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("studio:")]
    assert len(said) == 2
    assert all(FULL in line or "disk is full" in line for line in said), said
    assert "Unexpected" not in " ".join(said)
    (place / "fill").unlink()
    assert library.restore("cat").name == "cat"
    assert [record.name for record in library.adapters() if not record.read_only] == ["cat", "dog"]


def test_jobs_are_listed_and_deleted_on_a_full_disk(full_home: Callable[[], Path]) -> None:
    job = jobs.submit("compose", {"prompt": "x"})
    (jobs.get(job).folder / "picture.png").write_bytes(bytes(100_000))
    full_home()
    assert [each.id for each in jobs.list()] == [job]
    jobs.delete(job)
    assert jobs.list() == []


def test_what_killed_processes_left_goes_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path))
    folder = tmp_path / "jobs" / "a-job"
    half = folder / "checkpoints" / ".step-000010.0123456789ab"
    half.mkdir(parents=True)
    (half / "optimizer.pt").write_bytes(b"half")
    (folder / ".adapter.0123456789ab.safetensors").write_bytes(b"half")
    kept_files = [folder / ".hidden", folder / "checkpoints" / "step-000005", folder / ".a.0123456789ab.tar.gz"]
    for file in kept_files:
        file.write_bytes(b"whole")
    assert jobs.clean() == 2
    assert sorted(folder.rglob("*")) == sorted([*kept_files, folder / "checkpoints"])


@pytest.mark.parametrize(
    "error", [sqlite3.OperationalError, shutil.Error([("a", "b", f"[Errno {errno.ENOSPC}] {FULL}")])]
)
def test_every_full_disk_is_the_same_sentence(error: Any) -> None:
    if error is sqlite3.OperationalError:
        with contextlib.closing(sqlite3.connect(":memory:")) as link:
            link.execute("pragma max_page_count=1")
            with pytest.raises(error) as caught:
                link.execute("create table a (b)")
        error = caught.value
    assert error_sentences.sentence(error).startswith("The disk is full: free some space")
    assert error_sentences.expected(error)
