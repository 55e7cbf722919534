"""Training methods on the pages: the catalogue's names and sentences, the methods' warnings."""

from __future__ import annotations

import gradio as gr
import pytest

from studio import catalogue
from studio.training.schemas.image import TrainImageConfig
from studio.training.schemas.language import TrainLanguageConfig
from ui.components import method_help, schema_form
from ui.pages import train

SCHEMAS = (TrainImageConfig, TrainLanguageConfig)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_method_of_the_core_can_be_chosen_and_explains_itself(schema):
    known = schema_form.fields(schema)
    offered = {
        (stage, value)
        for name, stage in method_help.STAGES.items() if name in known
        for value in known[name].choices
    } | {("learn", method) for name, method in method_help.SWITCHES.items() if name in known}  # fmt: skip
    for method in catalogue.declared():
        if method.entry.startswith(("adapters.initialise", "adapters.learn")) and method.name != "ba":
            assert (method.stage, method.name) in offered
    for name in method_help.STAGES:
        if name in known:
            assert [value for _, value in method_help.choices(known[name])] == list(known[name].choices)


def test_sentences_follow_the_choice():
    text = method_help.explain({"init": "lora_ga", "perturb": "mgpo", "freeze_a": True, "optimizer": "adamw"})
    by_name = {method.name: method for method in catalogue.declared()}
    for name in ("lora_ga", "mgpo", "ffa"):
        assert by_name[name].title in text
        assert by_name[name].summary.split(":")[0].split(",")[0] in text
    assert "switch use_rslora on" in text
    refused = method_help.explain({"grad_rule": "allora", "alpha": 3, "rank": 4, "optimizer": "adamw"})
    assert "no scaling factor" in refused
    assert "normalise gradients" in refused


def test_every_rule_looks_at_fields_that_some_schema_has():
    known = {name for schema in SCHEMAS for name in schema_form.fields(schema)}
    assert set(method_help.WATCHED) - known <= {"fused_loss"}
    assert {*method_help.STAGES, *method_help.SWITCHES, "use_dora", "alpha", "optimizer"} <= set(method_help.WATCHED)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_options_show_with_their_method(schema):
    known = schema_form.fields(schema)
    method = {name for name, item in known.items() if item.group == "Method"}
    always = {*method_help.STAGES, *method_help.SWITCHES, "intruders_every"}
    assert method - always == set(method_help.OPTIONS) & set(known)
    for name in method - always:
        chooser, values = method_help.OPTIONS[name]
        named = {method_help.SWITCHES[chooser]} if chooser in method_help.SWITCHES else set(known[chooser].choices)
        assert set(values) <= named
        assert not method_help.needed(name, known[chooser].default)
    assert method_help.needed("ga_gamma", "lora_ga")
    assert method_help.needed("l4q_group", 4)


def test_the_page_has_the_help():
    with gr.Blocks():
        page = train.build()
    assert page.form["init"].choices[0] == ("Kaiming-uniform", "default")
