"""A form made from a job's schema: one field, one widget, with the help text of the schema."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import gradio as gr
import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from adapters.errors import InputError

Kind = Literal["flag", "choice", "choices", "integer", "number", "text", "lines", "mapping"]

_WRITTEN = {
    "lr": "LR",
    "snr": "SNR",
    "ema": "EMA",
    "tf32": "TF32",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "loraplus": "LoRA+",
    "te": "Text encoder",
    "init": "start",
    "ga": "LoRA-GA",
    "corda": "CorDA",
    "sb": "LoRA-SB",
    "a": "A",
    "grad": "gradient",
    "allora": "ALLoRA",
    "perturb": "perturbation",
    "reg": "regulariser",
    "ba": "BA-LoRA",
    "id": "ID",
}


@dataclass(frozen=True)
class Field:
    """One field of a schema, as a form sees it."""

    name: str
    kind: Kind
    help: str
    default: Any
    group: str = "Base model"
    advanced: bool = True
    optional: bool = False
    choices: tuple[str, ...] = ()
    limits: tuple[float | None, float | None] = field(default=(None, None))

    @property
    def label(self) -> str:
        """The name in words."""
        words = " ".join(_WRITTEN.get(word, word) for word in self.name.removeprefix("use_").split("_"))
        return words[:1].upper() + words[1:]


def fields(model: type[BaseModel]) -> dict[str, Field]:
    """Every field of ``model`` by name, in its order; their help names other fields as the form labels them."""
    known = {name: _field(name, info) for name, info in model.model_fields.items()}
    return {name: replace(item, help=_in_words(item.help, known)) for name, item in known.items()}


def _in_words(text: str, known: Mapping[str, Field]) -> str:
    """``text`` with the keys of fields (``warmup_steps``) as their labels ("Warm-up steps")."""
    return re.sub(r"\w+_\w+", lambda key: f'"{known[key[0]].label}"' if key[0] in known else key[0], text)


def groups(known: Mapping[str, Field], shown: Container[str]) -> dict[str, list[str]]:
    """Names of the fields not in ``shown`` by the schema's groups, the base's last; the often needed fields first."""
    found: dict[str, list[str]] = {}
    for item in sorted(known.values(), key=lambda item: item.advanced):
        if item.name not in shown:
            found.setdefault(item.group, []).append(item.name)
    order = sorted(dict.fromkeys(item.group for item in known.values()), key=lambda group: group == "Base model")
    return {"Model and device" if group == "Base model" else group: found[group] for group in order if group in found}


def widget(item: Field, **changes: Any) -> gr.components.Component:
    """The widget of one field; ``changes`` replace what would be chosen."""
    common = {"label": item.label, "info": item.help, "value": show(item, item.default), "interactive": True}
    options: dict[str, Any] = {**common, **changes}
    if item.kind == "flag":
        return gr.Checkbox(**options)
    if item.kind == "choice":
        return gr.Dropdown(**{"choices": list(item.choices), **options})
    if item.kind == "choices":
        return gr.CheckboxGroup(choices=list(item.choices), **options)
    if item.kind in ("integer", "number") and item.optional:
        return gr.Textbox(max_lines=1, placeholder="automatic", **options)
    if item.kind in ("integer", "number"):
        return gr.Number(**_number_options(item), **options)
    lines = 1 if item.kind == "text" else 2
    return gr.Textbox(lines=lines, max_lines=8, **{"placeholder": _PLACEHOLDER[item.kind], **options})


def read(item: Field, value: Any) -> Any:
    """The configuration's value for the widget's ``value``."""
    if item.kind == "flag":
        return bool(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return _nothing(item)
    if item.kind in ("integer", "number"):
        return _number(item, value)
    if item.kind == "lines":
        return [line.strip() for line in str(value).splitlines() if line.strip()]
    if item.kind == "mapping":
        return _mapping(item, str(value))
    return value


def show(item: Field, value: Any) -> Any:
    """The widget's value for the configuration's ``value``."""
    if item.kind == "lines":
        return "\n".join(value or ())
    if item.kind == "mapping":
        return yaml.safe_dump(dict(value), sort_keys=False).strip() if value else ""
    if item.kind == "choices":
        return list(value or ())
    if item.kind in ("integer", "number") and item.optional:
        return "" if value is None else str(value).removesuffix(".0")
    return value


def read_all(known: Mapping[str, Field], names: Sequence[str], values: Iterable[Any]) -> dict[str, Any]:
    """The configuration of a whole form; ``values`` are in the order of ``names``."""
    return {name: read(known[name], value) for name, value in zip(names, values, strict=True)}


_PLACEHOLDER: dict[Kind, str] = {"text": "", "lines": "one per line", "mapping": "name: value, one per line"}


def _field(name: str, info: FieldInfo) -> Field:
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    inner, optional = _without_none(info.annotation)
    kind, choices = _kind(inner)
    default = info.get_default(call_default_factory=True, validated_data={}) if not info.is_required() else None
    return Field(
        name, kind, info.description or "", default, str(extra.get("group", "Base model")),
        bool(extra.get("advanced", True)), optional, choices, _limits(info),
    )  # fmt: skip


def _without_none(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) not in (Union, UnionType):
        return annotation, False
    rest = [part for part in get_args(annotation) if part is not NoneType]
    return rest[0], len(rest) < len(get_args(annotation))


def _kind(annotation: Any) -> tuple[Kind, tuple[str, ...]]:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "choice", tuple(parts)
    if origin is list:
        return ("choices", tuple(get_args(parts[0]))) if get_origin(parts[0]) is Literal else ("lines", ())
    if origin is dict:
        return "mapping", ()
    simple: dict[Any, Kind] = {bool: "flag", int: "integer", float: "number"}
    return simple.get(annotation, "text"), ()


def _limits(info: FieldInfo) -> tuple[float | None, float | None]:
    low: float | None = None
    high: float | None = None
    for rule in info.metadata:
        if isinstance(rule, Ge | Gt):
            low = _as_float(rule.ge if isinstance(rule, Ge) else rule.gt)
        elif isinstance(rule, Le | Lt):
            high = _as_float(rule.le if isinstance(rule, Le) else rule.lt)
    return low, high


def _as_float(value: Any) -> float:
    return float(value)


def _number_options(item: Field) -> dict[str, Any]:
    low, high = item.limits
    options: dict[str, Any] = {"minimum": low, "maximum": high}
    if item.kind == "integer":
        return {**options, "precision": 0, "step": 1}
    size = abs(item.default) if isinstance(item.default, int | float) and item.default else 1.0
    return {**options, "step": 10.0 ** (math.floor(math.log10(size)) - 1)}


def _nothing(item: Field) -> Any:
    if item.optional:
        return None
    empty: dict[Kind, Any] = {"lines": [], "mapping": {}, "choices": [], "text": ""}
    return empty.get(item.kind, item.default)


def _number(item: Field, value: Any) -> float | int:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{item.label}: '{value}' is not a number.") from None
    if item.kind == "number":
        return number
    if not number.is_integer():
        raise InputError(f"{item.label}: '{value}' is not a whole number.")
    return int(number)


def _mapping(item: Field, written: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(written)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{item.label}: write one 'name: value' per line, got '{written}'.")
    return value
