"""Where the studio keeps its files, and the settings of an installation.

Everything is below one home folder: ``ADAPTER_STUDIO_HOME``, or the platform's folder for application data. A value
comes from the environment (``ADAPTER_STUDIO_<NAME>``), else from ``settings.yaml`` in the home folder, else from the
defaults below.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from adapters.errors import InputError
from adapters.files import write_text as write_text  # pages write through the application
from studio.schema import JobConfig, read_yaml

PREFIX = "ADAPTER_STUDIO_"


class Settings(JobConfig):
    """The settings of an installation."""

    adapter_folders: list[Path] = Field(
        default_factory=list, description="More folders with adapters, besides library/adapters in the home folder."
    )
    base_folders: list[Path] = Field(
        default_factory=list, description="More folders with base models, besides library/bases in the home folder."
    )
    queue_url: str = Field(
        "", description="Job queue: empty = SQLite file in the home folder; redis://host:6379/0 = several machines."
    )
    worker_idle_minutes: float = Field(
        30.0, ge=0, description="A worker started on demand stops after this many minutes without a job; 0 = never."
    )
    plugins: list[str] = Field(
        default_factory=list, description="Python modules to import, which may register kinds of jobs."
    )


def home() -> Path:
    """The home folder; it need not exist yet."""
    given = os.environ.get(PREFIX + "HOME")
    return Path(given).expanduser().absolute() if given else _data_folder() / "adapter-studio"


def settings_file() -> Path:
    return home() / "settings.yaml"


def load() -> Settings:
    """The current settings; raises :class:`InputError` for a wrong file or environment variable."""
    file = settings_file()
    values = read_yaml(file) if file.is_file() and file.stat().st_size else {}
    return Settings.parse({**values, **_environment()}, source=f"the settings ({file})")


def save(settings: Settings) -> Path:
    """Write ``settings`` to the settings file and return its path."""
    file = settings_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, settings.to_yaml())
    return file


def folder(*parts: str) -> Path:
    """A folder below home, created if missing; raises :class:`InputError` when that fails."""
    path = home().joinpath(*parts)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"The folder '{path}' cannot be created ({error.strerror}): set {PREFIX}HOME to a folder you can write to."
        ) from None
    return path


def adapter_folders() -> list[Path]:
    """Folders searched for adapters; imported ones go to the first."""
    return [folder("library", "adapters"), *(path.expanduser() for path in load().adapter_folders)]


def base_folders() -> list[Path]:
    """Folders searched for base models; imported ones go to the first."""
    return [folder("library", "bases"), *(path.expanduser() for path in load().base_folders)]


def _environment() -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in Settings.model_fields:
        text = os.environ.get(PREFIX + name.upper())
        if text is not None:
            values[name] = _environment_value(name, text)
    return values


def _environment_value(name: str, text: str) -> Any:
    if name.endswith("_folders"):
        return [part for part in text.split(os.pathsep) if part]
    if name == "plugins":
        return [part for part in text.replace(",", " ").split() if part]
    return text if name.endswith("_url") else yaml.safe_load(text)


def _data_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
