"""The training methods that a configuration asks for, as plugins for any driver."""

from __future__ import annotations

import importlib
from typing import Any

from adapters.catalogue import Choice, choices
from adapters.errors import InputError
from adapters.plugin import Plugin
from studio.training.schemas.combinations import refusal


def plugins_for(config: Any) -> list[Plugin]:
    """The plugins of a configuration with :class:`~studio.training.schemas.method.MethodFields`, not yet configured.

    Raises:
        InputError: a combination a method refuses.
    """
    refused = refusal(config)
    if refused:
        raise InputError(refused[0].upper() + refused[1:] + ".")
    named = [_plugin(choice, getattr(config, choice.key, None)) for choice in choices()]
    return [_made(entry) for entry in named if entry]


def _plugin(choice: Choice, value: Any) -> str:
    """``"module:class"`` of the plugin for a field's value, empty for none."""
    method = choice.chosen(value)
    if method is None or method.training is None:
        return ""
    if choice.slot is not None and choice.slot.plugin:
        return "" if method.training.sets == "nothing" else choice.slot.plugin
    return method.training.plugin or method.entry


def _made(entry: str) -> Plugin:
    module, _, name = entry.partition(":")
    plugin: Plugin = getattr(importlib.import_module(module), name)()
    return plugin
