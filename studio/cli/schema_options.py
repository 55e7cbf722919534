"""Command line options made from a job's schema: one field, one flag, with the help text of the schema."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
import yaml
from pydantic.fields import FieldInfo

from adapters.errors import InputError
from studio.schema import JobConfig

GROUPS = {"base": "Model", "family": "Model", "dtype": "Model", "device": "Model", "attention": "Model",
          "memory": "Model", "quantization": "Model", "denoiser": "Model"}  # fmt: skip


def with_options(
    schema: type[JobConfig], skip: Collection[str] = (), without: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Give a command one option per field of ``schema``; those that were given reach it as the dict ``fields``.

    Args:
        skip: fields without an option.
        without: parameters of the command that it does not take here.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        names = [name for name in schema.model_fields if name not in skip]

        def wrapper(**values: Any) -> Any:
            given = {name: values.pop(name) for name in names}
            fields = {
                name: _value(schema.model_fields[name], name, text) for name, text in given.items() if text is not None
            }
            return command(fields=fields, **values)

        taken = inspect.signature(command, eval_str=True).parameters.values()
        own = [parameter for parameter in taken if parameter.name not in ("fields", *without)]
        often_first = sorted(names, key=lambda name: bool(_extra(schema.model_fields[name]).get("advanced")))
        options = [_parameter(name, schema.model_fields[name]) for name in often_first]
        wrapper.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        wrapper.__doc__ = command.__doc__
        wrapper.__name__ = command.__name__
        return wrapper

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    panel = str(_extra(field).get("group") or GROUPS.get(name, "Options"))
    text = _help(field)
    kind: Any
    if _is(field, bool):
        off = f"--{flag[5:]}" if flag.startswith("--no-") else f"--no-{flag[2:]}"
        kind, option = bool, typer.Option(f"{flag}/{off}", help=text, rich_help_panel=panel)
    elif _is_many(field):
        kind, option = list[str], typer.Option(flag, help=text, rich_help_panel=panel, metavar=_metavar(field))
    else:
        kind, option = str, typer.Option(flag, help=text, rich_help_panel=panel, metavar=_metavar(field))
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _extra(field: FieldInfo) -> dict[str, Any]:
    """A field's group, and whether few people need it."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("[", "\\[")
    default = field.get_default(call_default_factory=True)
    if field.is_required() or default is None or default in ("", [], {}):
        return text
    if isinstance(default, list):
        default = ", ".join(str(item) for item in default)
    shown = "on" if default is True else "off" if default is False else default
    return f"{text} (default {shown})"


def _metavar(field: FieldInfo) -> str:
    choices = _choices(field.annotation)
    if choices:
        return "|".join(choices)
    if _is_many(field):
        return "KEY=VALUE" if _origin(field) is dict else "TEXT"
    for plain, name in ((int, "N"), (float, "NUMBER")):
        if _is(field, plain):
            return name
    return "TEXT"


def _value(field: FieldInfo, name: str, given: Any) -> Any:
    """The value for pydantic: text stays text, everything else is read as YAML (so that 'null' and lists work)."""
    if isinstance(given, bool) or _is(field, str) or _choices(field.annotation):
        return None if given == "null" and type(None) in get_args(field.annotation) else given
    if _origin(field) is dict:
        return dict(_pair(name, text) for text in given)
    if isinstance(given, list):
        return [_yaml(name, text) if not _items_are_text(field) else text for text in given]
    return _yaml(name, given)


def pair(flag: str, text: str) -> tuple[str, Any]:
    """``key=value`` with the value read as YAML; raises :class:`InputError` when there is no '='."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"{flag} needs key=value, got '{text}'.")
    return key.strip(), _yaml(key, value)


def _pair(name: str, text: str) -> tuple[str, Any]:
    return pair("--" + name.replace("_", "-"), text)


def _yaml(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"{name}: '{text}' cannot be read as a value.") from None


def _plain(annotation: Any) -> Any:
    """The annotation without None."""
    if get_origin(annotation) in (Union, type(int | None)):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        return inner[0] if len(inner) == 1 else annotation
    return annotation


def _is(field: FieldInfo, kind: type) -> bool:
    return _plain(field.annotation) is kind


def _origin(field: FieldInfo) -> Any:
    return get_origin(_plain(field.annotation))


def _is_many(field: FieldInfo) -> bool:
    return _origin(field) in (list, dict)


def _items_are_text(field: FieldInfo) -> bool:
    return get_args(_plain(field.annotation))[:1] == (str,)


def _choices(annotation: Any) -> list[str]:
    plain = _plain(annotation)
    return [str(choice) for choice in get_args(plain)] if get_origin(plain) is Literal else []
