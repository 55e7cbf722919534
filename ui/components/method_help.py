"""Training methods on a form: titles and summaries from the catalogue, warnings from its rules."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import gradio as gr

from adapters.errors import InputError
from studio import catalogue
from studio.training.schemas import combinations
from ui import markup
from ui.components import schema_form
from ui.components.schema_form import Field
from ui.errors import errors_shown
from ui.events import PRIVATE

CHOICES = {choice.key: choice for choice in catalogue.choices()}
"""Fields that choose a training method."""

STAGES = {key: choice.slot.stage for key, choice in CHOICES.items() if choice.slot is not None}
"""Fields whose values are methods of the catalogue, and the stage of those methods."""

SWITCHES = {key: choice.methods[0].name for key, choice in CHOICES.items() if choice.slot is None}
"""Fields that switch one method on."""

OPTIONS = {
    option.name: (key, readers)
    for key, choice in CHOICES.items()
    for option, readers in choice.options().items()
    if option.name != key
}
"""Fields that only some methods read: the field that chooses the method, and the methods."""

WATCHED = combinations.looked_at()
"""Fields that the methods' rules read."""


def choices(item: Field) -> list[tuple[str, str]]:
    """A method field's menu: the methods' titles; values that are not methods keep their name."""
    titles = {method.name: method.title for method in CHOICES[item.name].methods}
    return [(titles.get(value, value), value) for value in item.choices]


def widget(item: Field, page: str, **options: Any) -> gr.components.Component:
    """The widget of a field on ``page``, with the catalogue's titles where it chooses a method.

    Options of a method are hidden; :func:`watch` shows them when it is chosen.
    """
    if item.name in STAGES:
        options.setdefault("choices", choices(item))
    hidden = item.name in OPTIONS
    return schema_form.widget(item, elem_id=f"{page}-{item.name.replace('_', '-')}", visible=not hidden, **options)


def needed(name: str, chosen: Any) -> bool:
    """Whether the method option ``name`` is read when its method field has the value ``chosen``."""
    choice, readers = CHOICES[OPTIONS[name][0]], OPTIONS[name][1]
    method = choice.chosen(chosen)
    return method is not None and method.name in readers


def explain(values: Mapping[str, Any]) -> str:
    """HTML: a sentence for every chosen method, then refused combinations and warnings."""
    chosen = [choice.chosen(values.get(key)) for key, choice in CHOICES.items()]
    lines = "".join(f"<p><b>{markup.text(m.title)}</b>: {markup.text(m.summary)}</p>" for m in chosen if m is not None)
    config = SimpleNamespace(**values)
    refused = combinations.refusal(config)
    problem = f"{refused[0].upper()}{refused[1:]}." if refused else ""
    notes = [markup.notice(problem), *(markup.notice(text, "info") for text in combinations.warnings(config))]
    return f'<div class="as-help">{lines}</div>{"".join(notes)}'


def watch(form: Mapping[str, Any], known: Mapping[str, Field], page: str) -> gr.HTML:
    """Draw the explanation here; update it, and show the chosen methods' options, as the form changes."""
    names = [name for name in WATCHED if name in form]
    shown = gr.HTML(
        explain({name: known[name].default for name in names}),
        elem_id=f"{page}-method-help",
        apply_default_css=False,
    )

    @errors_shown
    def changed(*values: Any) -> str:
        try:
            return explain(schema_form.read_all(known, names, values))
        except InputError as error:  # a number that is still being written
            return markup.notice(str(error))

    for name in names:
        form[name].change(changed, [form[n] for n in names], shown, **PRIVATE)
    for chooser in CHOICES:
        options = [name for name, (decides, _) in OPTIONS.items() if decides == chooser and name in form]
        if options:
            form[chooser].change(
                lambda value, options=tuple(options): [gr.update(visible=needed(name, value)) for name in options],
                form[chooser], [form[name] for name in options], **PRIVATE,
            )  # fmt: skip
    return shown
