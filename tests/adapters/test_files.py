"""Files and folders are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapters import files
from adapters.errors import InputError


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), KeyError("x")])
def test_a_failure_leaves_what_was_there_and_nothing_else(error: BaseException, tmp_path: Path) -> None:
    target = files.write_text(tmp_path / "a" / "note.txt", "first")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise error

    with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
        files.write(target, fail)
    assert target.read_text() == "first"
    assert names(target.parent) == ["note.txt"]


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with files.whole(tmp_path / "made") as part:
            part.mkdir()
            (part / content).write_text(content)
    assert names(tmp_path) == ["made"]
    assert names(tmp_path / "made") == ["two"]


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "kept").write_text("")
    with pytest.raises(InputError, match="could not be written"):
        files.write_text(tmp_path / "made", "text")
    assert names(tmp_path / "made") == ["kept"]


def test_writers_that_look_at_the_ending_find_it(tmp_path: Path) -> None:
    path = files.write(tmp_path / "a.pt", lambda part: torch.save({"x": torch.ones(1)}, part))
    assert names(tmp_path) == ["a.pt"]
    assert torch.load(path)["x"].item() == 1


def test_safetensors_are_as_readable_as_any_other_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    plain = tmp_path / "plain.txt"
    plain.write_text("x")
    made = files.write(tmp_path / "a.safetensors", lambda part: save_file({"a": torch.zeros(1)}, part))
    assert made.stat().st_mode == plain.stat().st_mode
