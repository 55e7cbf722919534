"""Layers that several adapters share: each gets what it would get alone, and the base computes once."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adapters.errors import InputError
from adapters.layers import packed
from adapters.layers.packed import Layout, PackedLayer, Segment, own_layers, pack, tie, twin


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def with_adapter(base: nn.Module, rank: int, targets: list[str]) -> nn.Module:
    model = get_peft_model(twin(base), LoraConfig(r=rank, target_modules=targets, init_lora_weights=False))
    return model.base_model.model


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Small().requires_grad_(False)


@pytest.mark.parametrize("small", [0.0, 10.0])
@pytest.mark.parametrize("merged", [False, True])
def test_outputs_and_gradients_are_those_of_separate_passes(base, merged, small, monkeypatch):
    """Rows of unlike length, one adapter on one layer only, one segment without an adapter; positions may be rows."""
    monkeypatch.setattr(packed, "SMALL", small)
    models = [with_adapter(base, 2, ["first", "second"]), with_adapter(base, 3, ["second"]), twin(base)]
    assert all(model.get_parameter(name) is base.first.weight for model, name in
               ((models[0], "first.base_layer.weight"), (models[2], "first.weight")))  # fmt: skip
    batches = [torch.randn(rows, length, 6) for rows, length in ((2, 3), (1, 4), (2, 4))]
    whole = torch.cat([nn.functional.pad(batch, (0, 0, 0, 4 - batch.shape[1])) for batch in batches])
    segments = [
        Segment(rows, batch.shape[1], own_layers(model))
        for rows, batch, model in zip((slice(0, 2), slice(2, 3), slice(3, 5)), batches, models, strict=True)
    ]
    shared, layout, calls = twin(base), Layout(), []
    pack(shared, ["first", "second"], layout)
    shared.second.base.register_forward_hook(lambda *_: calls.append(1))
    with layout.of(segments, 4):
        found = shared(whole.flatten(0, 1) if merged else whole)
    found = found.unflatten(0, (5, 4)) if merged else found
    assert len(calls) == 1
    parts = [found[s.rows, : s.width] for s in segments]
    parameters = [[p for p in model.parameters() if p.requires_grad] for model in models[:2]]
    gradients = torch.autograd.grad(sum(part.square().sum() for part in parts), [*parameters[0], *parameters[1]])
    alone = [model(batch) for model, batch in zip(models, batches, strict=True)]
    expected = [g for output, own in zip(alone, parameters, strict=False)
                for g in torch.autograd.grad(output.square().sum(), own)]  # fmt: skip
    for one, other in zip((*parts, *gradients), (*alone, *expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_layer_that_mixes_rows_is_refused(base):
    layer = PackedLayer(base.first, "first", layout := Layout())
    with layout.of([Segment(slice(0, 2), 3, {})], 3), pytest.raises(InputError, match="mixes the rows"):
        layer(torch.randn(5, 3, 6))
    with pytest.raises(InputError, match="no layer 'third'"):
        pack(base, ["third"], layout)


def test_other_weights_are_refused(base):
    other = twin(base)
    other.second = nn.Linear(5, 4)
    with pytest.raises(InputError, match="differ in 'second"):
        tie(other, base)
    same = Small()
    same.load_state_dict(base.state_dict())
    tie(same, base)
    assert same.second.weight is base.second.weight
