"""How an adapter starts and learns: the part of a training schema that image and language jobs share.

A training schema inherits :class:`MethodFields` (and, where the model gives logits, :class:`RegulariserFields`). The
fields are made from what the methods declare (:mod:`adapters.options`): one option is one YAML key, one flag and one
widget, in the group "Method".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, create_model

from adapters.catalogue import Choice, choices
from adapters.options import Option

GROUP = "Method"


def option_field(option: Option) -> tuple[Any, Any]:
    """An option as pydantic's (type, field)."""
    bounds = {key: getattr(option, key) for key in ("gt", "ge", "lt", "le") if getattr(option, key) is not None}
    if option.finite:
        bounds["allow_inf_nan"] = False
    extra: dict[str, Any] = {"group": GROUP, "advanced": option.advanced}
    field = Field(option.default, description=option.help, json_schema_extra=extra, **bounds)
    return option.annotation(), field


def _slot_field(choice: Choice) -> tuple[Any, Any]:
    """The field that chooses a slot's method: the usual value first, the others by name."""
    assert choice.slot is not None
    values = dict.fromkeys((choice.slot.off, *(method.name for method in choice.methods)))
    extra: dict[str, Any] = {"group": GROUP, "advanced": False}
    return Literal[tuple(values)], Field(choice.slot.off, description=choice.slot.help, json_schema_extra=extra)


def _fields(logits: bool) -> dict[str, Any]:
    """The fields of all methods that need logits, or of all that do not."""
    found: dict[str, Any] = {}
    for choice in choices():
        if (choice.slot is not None and choice.slot.logits) == logits:
            if choice.slot is not None:
                found[choice.key] = _slot_field(choice)
            found |= {option.name: option_field(option) for option in choice.options()}
    return found


class _Declared(BaseModel):
    """Base of generated fields; a schema may not redefine one."""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        for base in _generated:
            for name, field in base.model_fields.items() if issubclass(cls, base) else ():
                if cls.model_fields[name].description != field.description:
                    raise TypeError(f"a method's option '{name}' has the name of a field of {cls.__name__}: rename it")


_generated: list[type[BaseModel]] = []

if TYPE_CHECKING:

    class _Method(_Declared):
        def __getattr__(self, name: str) -> Any: ...

    class _Regulariser(_Declared):
        def __getattr__(self, name: str) -> Any: ...

else:
    _Method = create_model("_Method", __base__=_Declared, **_fields(logits=False))
    _Regulariser = create_model("_Regulariser", __base__=_Declared, **_fields(logits=True))
    _generated += [_Method, _Regulariser]


class MethodFields(_Method):
    """Initialisation, frozen parts, gradient rule, perturbation, measures during training."""


class RegulariserFields(_Regulariser):
    """Terms on the logits, for language and classification models. Empty numbers take the paper's values."""
