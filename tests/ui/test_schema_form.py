"""Every field of the schemas becomes a widget, and what the widgets hold becomes the configuration again."""

from __future__ import annotations

import re

import pytest

from adapters.errors import InputError
from studio.composition.schema import ComposeConfig
from studio.jobs import kinds
from studio.training.schemas.image import TrainImageConfig
from ui.components import schema_form

KNOWN = schema_form.fields(TrainImageConfig)


def test_every_field_of_the_training_schema_has_a_widget_with_help() -> None:
    assert set(KNOWN) == set(TrainImageConfig.model_fields)
    for item in KNOWN.values():
        made = schema_form.widget(item)
        assert made.label
        assert item.help, f"{item.name} has no description"


@pytest.mark.parametrize("kind", ["train-image", "train-language", "distill", "compose", "reconstruct"])
def test_no_help_names_a_field_by_its_key(kind: str) -> None:
    model = kinds.find(kind).model()
    for item in schema_form.fields(model).values():
        words = set(re.findall(r"\w+_\w+", item.help))
        assert not words & set(model.model_fields), item.name
    assert KNOWN["text_encoder_learning_rate"].help.endswith('empty = half of "Learning rate".')


def test_the_default_form_is_the_default_configuration() -> None:
    names = [name for name in KNOWN if name not in ("base", "data", "trigger")]
    given = {"base": "any", "data": "pictures", "trigger": "zxq"}
    shown = [schema_form.show(KNOWN[name], KNOWN[name].default) for name in names]
    config = TrainImageConfig.parse({**schema_form.read_all(KNOWN, names, shown), **given})
    assert config == TrainImageConfig(**given)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mode", "choice"), ("export", "choices"), ("rank", "integer"), ("learning_rate", "number"), ("alpha", "number"),
     ("ema", "flag"), ("sample_prompts", "lines"), ("rank_pattern", "mapping"), ("trigger", "text")],
)  # fmt: skip
def test_kinds(name: str, kind: str) -> None:
    assert KNOWN[name].kind == kind


def test_empty_widgets_mean_automatic_or_the_default() -> None:
    assert schema_form.read(KNOWN["alpha"], None) is None
    assert schema_form.read(KNOWN["rank"], None) == 16
    assert schema_form.read(KNOWN["sample_prompts"], "a\n\n b ") == ["a", "b"]
    assert schema_form.read(KNOWN["rank_pattern"], "attn2: 8") == {"attn2": 8}
    with pytest.raises(InputError, match="Rank pattern"):
        schema_form.read(KNOWN["rank_pattern"], "8")


def test_limits_come_from_the_schema() -> None:
    assert schema_form.fields(ComposeConfig)["steps"].limits == (1, 1000)
