"""The share of a model's layers that an adapter changes, against a count by hand."""

from __future__ import annotations

from peft import LoraConfig, get_peft_model
from torch import nn

from adapters.formats.coverage import Coverage, coverage, told, trained


def model() -> nn.Module:
    return nn.ModuleDict(
        {
            "a": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
            "b": nn.Linear(4, 4),
            "conv": nn.Conv2d(4, 4, 1),
            "norm": nn.LayerNorm(4),
        }
    )


def test_layers_that_a_file_changes() -> None:
    found = coverage(model(), ["a.0", "b", "conv"])
    assert found == Coverage(2, 3, 1)
    assert str(found) == "2 of 3 linear layers (67%) and 1 other"
    assert str(coverage(model(), ["b"])) == "1 of 3 linear layers (33%)"
    assert told({"unet": found, "text_encoder": Coverage(1, 2)}).endswith("; text_encoder 1 of 2 linear layers (50%)")
    assert coverage(nn.LayerNorm(2), []).share == 0


def test_layers_that_learn_are_counted_in_the_model_without_peft() -> None:
    made = get_peft_model(model(), LoraConfig(r=2, target_modules=["a.0", "conv"], use_dora=True))
    assert trained(made) == Coverage(1, 3, 1)
    assert trained(model()) == Coverage(0, 3, 0)
