"""Presets on a form: a choice fills the widgets of the fields that a preset sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from studio.training import presets
from ui.components import schema_form
from ui.components.schema_form import Field
from ui.events import PRIVATE


def values(kind: str, known: Mapping[str, Field], names: Sequence[str], preset: str, base: str) -> list[Any]:
    """Widget values of the fields ``names`` for a preset of a kind of job on a base."""
    chosen = {**presets.preset(kind, preset, base), "preset": preset}
    return [schema_form.show(known[name], chosen.get(name, known[name].default)) for name in names]


def follow_base(kind: str, known: Mapping[str, Field], form: Mapping[str, Any], base: gr.Dropdown) -> None:
    """When another base is chosen, fill in what presets say otherwise on some bases."""
    names = sorted({name for kinds in presets.MEASURED.values() for name in kinds.get(kind, {})})
    if names:
        base.input(lambda preset, name: values(kind, known, names, preset, str(name)), [form["preset"], base],
                   [form[name] for name in names], **PRIVATE)  # fmt: skip
