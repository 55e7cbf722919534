"""What every job schema shares: strict keys, YAML in and out, errors a person can act on.

A job's pydantic model is the YAML file, the command line's options, the page's form and the record saved in the
result. Defaults and help texts are in the model's fields and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from adapters.errors import InputError, nearest


class JobConfig(BaseModel):
    """Base of the job schemas."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)
    kind: ClassVar[str] = ""
    """Name of the job in the queue and of its command ("compose", "train-image")."""

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str = "the configuration") -> Self:
        """Validate ``values``; raise :class:`InputError` naming each wrong key (and the nearest right one) or value."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise InputError(f"{source}: " + "; ".join(_explain(cls, item) for item in error.errors())) from None

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Self:
        """Read a configuration file (YAML or JSON)."""
        return cls.parse(read_yaml(path), source=str(path))

    def kept_in(self, folder: Path) -> Self:
        """The configuration of a job whose ``folder`` was made: files of which the job needs a copy lie there."""
        return self

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The default of every optional key, in the form of the YAML file."""
        found = {
            name: field.get_default(call_default_factory=True)
            for name, field in cls.model_fields.items()
            if not field.is_required()
        }
        return {name: _plain(value) for name, value in found.items()}

    def to_yaml(self) -> str:
        """The complete configuration, for :meth:`from_yaml`."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return text


def _plain(value: Any) -> Any:
    """A default in YAML's form."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML mapping; raise :class:`InputError` when the file is missing, unreadable or not a mapping."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"Configuration file '{file}' does not exist.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"Configuration file '{file}' is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"Configuration file '{file}' must hold 'key: value' lines, found {type(values).__name__}.")
    return values


def _of_logits(key: str) -> str:
    """Why a job without logits has no field ``key``; empty if it is no field of the methods for models with logits."""
    from adapters.catalogue import choices

    for choice in choices():
        if choice.slot is not None and choice.slot.logits and key in (choice.key, *(o.name for o in choice.options())):
            names = ", ".join(method.name for method in choice.methods)
            return f"'{key}' belongs to {names}, which train language models only: leave it out"
    return ""


def _explain(model: type[BaseModel], item: Any) -> str:
    parts = tuple(part for part in item["loc"] if not str(part).startswith("["))  # without the tags of unions
    place = ".".join(str(part) for part in parts)
    if item["type"] == "extra_forbidden":
        if reason := _of_logits(str(parts[-1])):
            return reason
        return f"unknown key '{place}'{nearest(str(parts[-1]), _field_names(model, parts[:-1]))}"
    given = item.get("input")
    shown = "" if item["type"] == "missing" or isinstance(given, dict) else f", got {given!r}"
    said = f"{item['msg'].removeprefix('Value error, ')}{shown}"
    return f"{place}: {said}" if place else said


def _field_names(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Names of the fields at ``path`` inside ``model``, through lists and unions."""
    current: Any = model
    for part in path:
        if isinstance(part, int) or not (isinstance(current, type) and issubclass(current, BaseModel)):
            continue
        info = current.model_fields.get(str(part))
        current = _inner_model(info.annotation) if info else None
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _inner_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _inner_model(argument)
        if found is not None:
            return found
    return None
