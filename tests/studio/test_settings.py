"""Where things are, and what changes that."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.errors import InputError
from studio import settings


def test_home_comes_from_the_environment(home):
    assert settings.home() == home
    assert settings.folder("jobs") == home / "jobs"
    assert (home / "jobs").is_dir()


def test_home_is_the_platforms_place(monkeypatch):
    monkeypatch.delenv("ADAPTER_STUDIO_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    monkeypatch.setattr("sys.platform", "linux")
    assert settings.home() == Path("/data/adapter-studio")


def test_a_home_that_cannot_be_made_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(InputError, match="set ADAPTER_STUDIO_HOME to a folder you can write to"):
        settings.folder("jobs")


def test_the_environment_wins_over_the_file(monkeypatch, tmp_path):
    settings.save(settings.Settings(worker_idle_minutes=5, adapter_folders=[tmp_path]))
    assert settings.load().worker_idle_minutes == 5
    assert settings.adapter_folders()[1:] == [tmp_path]
    monkeypatch.setenv("ADAPTER_STUDIO_WORKER_IDLE_MINUTES", "7")
    assert settings.load().worker_idle_minutes == 7


def test_a_wrong_settings_file_names_the_key(home):
    home.mkdir()
    settings.settings_file().write_text("adapter_folder: [x]")
    with pytest.raises(InputError, match=r"unknown key 'adapter_folder' \(did you mean 'adapter_folders'\?\)"):
        settings.load()
