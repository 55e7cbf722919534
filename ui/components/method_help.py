"""Training methods on a form: names and a sentence each from the catalogue, warnings from the combinations table."""

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

STAGES = {"init": "initialise", "grad_rule": "learn", "perturb": "learn", "reg": "learn"}
"""Fields whose values are methods of the catalogue, and the stage those are in."""

SWITCHES = {"freeze_a": "ffa"}
"""Fields that switch one method on."""

OPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "init_batches": ("init", combinations.CALIBRATED_INITS),
    **dict.fromkeys(("ga_gamma", "ga_direction", "ga_scale", "ga_norm_clip"), ("init", ("lora_ga",))),
    "corda_mode": ("init", ("corda",)),
    "sb_step": ("init", ("lora_sb",)),
    **dict.fromkeys(("allora_eta", "allora_mode"), ("grad_rule", ("allora",))),
    **dict.fromkeys(("perturb_sigma", "perturb_schedule"), ("perturb", ("ggpo", "flat"))),
    **dict.fromkeys(("perturb_beta", "perturb_norm"), ("perturb", ("ggpo",))),
    **dict.fromkeys(("perturb_rho", "perturb_ema", "perturb_direction"), ("perturb", ("mgpo",))),
    "perturb_every": ("perturb", ("ggpo", "flat", "mgpo")),
    **dict.fromkeys(("ba_task", "ba_l1", "ba_l2", "ba_l3", "ba_k", "ba_topk", "ba_temp", "ba_norm", "ba_schedule",
                     "ba_version"), ("reg", ("ba",))),
}  # fmt: skip
"""Fields that only some methods read: the field that chooses the method, and which those are."""

WATCHED = (*STAGES, *SWITCHES, "allora_mode", "perturb_sigma", "optimizer", "beta1", "rank", "alpha", "conv_rank",
           "conv_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "dropout", "loraplus_ratio",
           "continue_from", "intruders_every", "ema")  # fmt: skip
"""Fields the table of combinations reads."""


def choices(item: Field) -> list[tuple[str, str]]:
    """What a method field's menu shows: the methods' titles; values that are no method keep their name."""
    titles = {method.name: method.title for method in catalogue.declared() if method.stage == STAGES[item.name]}
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
    """Whether the method option ``name`` is read when the field that decides over it is ``chosen``."""
    return chosen in OPTIONS[name][1]


def explain(values: Mapping[str, Any]) -> str:
    """HTML: a sentence for every method that is chosen, then what does not go together or may surprise."""
    known: dict[tuple[str, Any], Any] = {(method.stage, method.name): method for method in catalogue.declared()}
    chosen = [known.get((stage, values.get(name))) for name, stage in STAGES.items()]
    chosen += [known.get(("learn", method)) for name, method in SWITCHES.items() if values.get(name)]
    lines = "".join(f"<p><b>{markup.text(m.title)}</b>: {markup.text(m.summary)}</p>" for m in chosen if m is not None)
    config = SimpleNamespace(**values)
    refused = combinations.refusal(config)
    problem = f"{refused[0].upper()}{refused[1:]}." if refused else ""
    notes = [markup.notice(problem), *(markup.notice(text, "info") for text in combinations.warnings(config))]
    return f'<div class="as-help">{lines}</div>{"".join(notes)}'


def watch(form: Mapping[str, Any], known: Mapping[str, Field], page: str) -> gr.HTML:
    """Draw the explanation here; keep it true, and show the options of what is chosen, while the form changes."""
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
        form[name].change(changed, [form[n] for n in names], shown, show_progress="hidden", api_visibility="private")
    for chooser in STAGES:
        options = [name for name, (decides, _) in OPTIONS.items() if decides == chooser and name in form]
        if options:
            form[chooser].change(
                lambda value, options=tuple(options): [gr.update(visible=needed(name, value)) for name in options],
                form[chooser], [form[name] for name in options], show_progress="hidden", api_visibility="private",
            )  # fmt: skip
    return shown
