"""Optimisers, groups, learning rates, the average of the weights."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import nn

from studio.training.inject import find_targets, lora_config
from studio.training.optimizers import OPTIMIZERS, averaged, lr_factor, make_optimizer, parameter_groups
from studio.training.schemas.image import TrainImageConfig
from tests import tiny


def config(**values):
    return TrainImageConfig.parse({"base": "any", "data": "x", "trigger": "zxq", **values})


def test_warm_up_then_schedule():
    warm = config(warmup_steps=10, lr_schedule="constant")
    factors = [lr_factor(step, 100, warm) for step in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert 0 < factors[0] < factors[9] < 1
    assert set(factors[10:]) == {1.0}
    assert lr_factor(5, 100, config(warmup_ratio=0.1)) < 1
    assert lr_factor(50, 100, config(lr_schedule="linear")) == 0.5
    assert lr_factor(50, 100, config(lr_schedule="polynomial", lr_power=2.0)) == 0.25
    assert lr_factor(50, 100, config(lr_schedule="cosine-restarts", lr_cycles=2)) == 1.0


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "cosine-restarts"])
def test_schedules_end_at_the_smallest_rate(name):
    assert lr_factor(100, 100, config(lr_schedule=name, min_lr_ratio=0.1)) == pytest.approx(0.1)
    assert lr_factor(0, 100, config(lr_schedule=name)) == pytest.approx(1.0)


def test_groups_have_their_own_rates():
    pipe = tiny.sd()
    for model, targets in ((pipe.unet, ["to_q"]), (pipe.text_encoder, ["q_proj"])):
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, target_modules=targets, use_dora=True))
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    groups = parameter_groups(models, "unet", config(learning_rate=1e-3, loraplus_ratio=16, weight_decay=0.1))
    rates = {(group["component"], group["part"]): group["lr"] for group in groups}
    assert rates["unet", "B"] == 16e-3
    assert rates["unet", "A"] == rates["unet", "other"] == 1e-3
    assert rates["text_encoder", "A"] == rates["text_encoder", "B"] == 5e-4
    members = sum(len(group["params"]) for group in groups)
    assert members == sum(p.requires_grad for model in models.values() for p in model.parameters())


@pytest.mark.parametrize("name", [name for name, entry in OPTIMIZERS.items() if entry.installed])
def test_every_installed_optimizer_learns(name):
    torch.manual_seed(0)
    layer, inputs = nn.Linear(4, 1), torch.randn(32, 4)
    wanted = inputs @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    chosen = config(optimizer=name, learning_rate=1.0 if name == "prodigy" else 0.03)
    optimizer = make_optimizer([{"params": list(layer.parameters()), "lr": chosen.learning_rate}], chosen)
    if hasattr(optimizer, "train"):
        optimizer.train()
    losses = []
    for _ in range(80):
        loss = (layer(inputs) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_looking_at_averaged_weights_leaves_no_trace():
    pytest.importorskip("schedulefree")
    layer = nn.Linear(3, 1)
    parameters = list(layer.parameters())
    chosen = config(optimizer="schedulefree-adamw", learning_rate=0.1)
    optimizer = make_optimizer([{"params": parameters, "lr": 0.1}], chosen)
    optimizer.train()
    for _ in range(3):
        layer(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    before = [p.detach().clone() for p in parameters]
    with averaged(optimizer, parameters):
        assert any(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_presets_choose_layers():
    unet, text = tiny.unet(), tiny.sd().text_encoder
    attention = find_targets(unet, config(), text=False)
    assert {name.split(".")[-1] for name in attention.all} == {"to_q", "to_k", "to_v", "0"}
    more = find_targets(unet, config(targets="attention-mlp"), text=False)
    assert any(name.endswith("ff.net.2") for name in more.linear)
    assert any(name.endswith("proj_in") for name in more.convolution)
    everything = find_targets(unet, config(targets="all"), text=False)
    assert any(name.endswith("conv1") for name in everything.convolution)
    assert not {"conv_in", "conv_out"} & set(everything.all)
    assert set(attention.all) < set(more.all) < set(everything.all)
    less = find_targets(unet, config(exclude_regex=r".*attn2.*"), text=False)
    assert not any("attn2" in name for name in less.all)
    assert {n.split(".")[-1] for n in find_targets(text, config(), text=True).all} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
    }
    transformer = tiny.flux().transformer
    assert any("single_transformer_blocks" in n for n in find_targets(transformer, config(), text=False).all)


def test_convolutions_have_their_own_rank():
    made = lora_config(tiny.unet(), config(rank=4, conv_rank=2, conv_alpha=1.0, alpha=8.0))
    assert (made.r, made.lora_alpha) == (4, 8.0)
    assert set(made.rank_pattern.values()) == {2}
    assert set(made.alpha_pattern.values()) == {1.0}
    text = lora_config(tiny.sd().text_encoder, config(rank=4, alpha=8.0, text_encoder_rank=2), text=True)
    assert (text.r, text.lora_alpha) == (2, 4.0)
