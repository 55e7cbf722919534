"""The published mixtures of experts as choices of :class:`~adapters.layers.experts.config.MoeConfig`, one file each.

A file declares its method and has a function that gives the choices, for the values of the method's options. Options
that all of them share (see :data:`adapters.options.SLOTS`) are read here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from adapters.catalogue import Method, find
from adapters.errors import InputError, nearest
from adapters.layers.experts.config import SHAPES, MoeConfig


def preset(name: str, value: Callable[[str], Any] = lambda name: None, **more: Any) -> MoeConfig:
    """The configuration of a method.

    Args:
        name: of the method ("mixlora", "mola", ...).
        value: option -> its value; None = the method's own.
        more: fields of the configuration (``r``, ``target_modules``, ...), which have the last word.

    Raises:
        InputError: an unknown method, or values that contradict each other.
    """
    method = find("layers", name)
    choices: Any = method.load()
    own = {key: found for key in inspect.signature(choices).parameters if (found := value(key)) is not None}
    made = {"preset": name, **choices(**own), **_shared(method, value), **more}
    return MoeConfig(**made)


def _shared(method: Method, value: Callable[[str], Any]) -> dict[str, Any]:
    """The fields that the shared options set."""
    names = {"experts_per_token": "top_k", "router_loss": "aux_coefficient", "router_loss_scope": "aux_scope"}
    found = {field: value(option) for option, field in names.items() if value(option) is not None}
    if value("experts"):
        found["num_experts"] = experts(value("experts"))
    return found


def experts(text: str) -> Any:
    """Experts per layer as written in an option: "8", "2,4,6,8", or a shape.

    Raises:
        InputError: it is none of these.
    """
    if text in SHAPES:
        return text
    try:
        numbers = [int(part) for part in text.replace("-", ",").split(",")]
    except ValueError:
        raise InputError(
            f"experts cannot be '{text}'{nearest(text, SHAPES)}: give a number, numbers for blocks of layers from "
            f"bottom to top (2,4,6,8), or a shape ({', '.join(SHAPES)})."
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers
