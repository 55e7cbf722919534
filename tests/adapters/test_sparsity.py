"""Zeros in place: masks against slow loops, Wanda's norms, zeros that stay zeros while weights learn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from adapters.compression import sparsity
from adapters.errors import InputError
from tests.adapters.test_pruning import tiny

IDS = torch.arange(1, 17).view(2, 8)


def test_masks_keep_the_highest_of_every_row_or_group() -> None:
    scores = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    stays = sparsity.keep(scores, "unstructured", 0.75)
    for row, kept in zip(scores, stays, strict=True):
        assert set(kept.nonzero().flatten().tolist()) == set(row.topk(4).indices.tolist())
    for pattern, n, m in (("4:8", 4, 8), ("2:4", 2, 4)):
        stays = sparsity.keep(scores, pattern, 0.5)
        for row, kept in zip(scores, stays, strict=True):
            for start in range(0, 16, m):
                wanted = sorted(range(start, start + m), key=lambda j, row=row: -float(row[j]))[:n]
                assert {j for j in range(start, start + m) if kept[j]} == set(wanted)
    assert bool(sparsity.keep(scores, "unstructured", 0.0).all())
    ties = sparsity.keep(torch.ones(2, 8), "2:4", 0.5)
    assert ties.sum(1).tolist() == [4, 4]
    with pytest.raises(InputError, match="Groups of 8 do not fill 12 inputs"):
        sparsity.keep(torch.ones(2, 12), "4:8", 0.5)
    with pytest.raises(InputError, match="Unknown pattern '1:2': use one of unstructured, 2:4, 4:8"):
        sparsity.keep(torch.ones(2, 8), "1:2", 0.5)


def test_wanda_is_the_weight_times_the_norm_of_its_input() -> None:
    model = tiny(2)
    before = copy.deepcopy(model)
    layer, seen = model.model.layers[1].mlp.gate_proj, []
    hook = layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, -2)))
    norms = sparsity.input_norms(model, [1], [lambda: model(IDS), lambda: model(IDS.flip(1))])
    hook.remove()
    assert set(norms) == {f"model.layers.1.{part}" for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj")}  # fmt: skip
    wanted = torch.cat(seen).norm(dim=0)
    torch.testing.assert_close(norms["model.layers.1.mlp.gate_proj"], wanted.float(), rtol=1e-5, atol=1e-6)
    zeros, mask = sparsity.put_zeros(model, [1], "unstructured", 0.5, lambda name, W: W.abs() * norms[name])
    assert zeros == pytest.approx(0.5, abs=0.01)
    W, kept = before.model.layers[1].mlp.gate_proj.weight, layer.weight != 0
    for row in range(3):
        scores = W[row].abs() * wanted
        assert set(kept[row].nonzero().flatten().tolist()) == set(scores.topk(len(scores) // 2).indices.tolist())
    assert torch.equal(layer.weight[kept], W[kept])
    pairs = zip(model.model.layers[0].parameters(), before.model.layers[0].parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert sparsity.put_zeros(before, [1], "unstructured", 0.5, lambda name, W: W.abs())[1] != mask
    with pytest.raises(InputError, match="there are none"):
        sparsity.input_norms(model, [1], [])


def test_zeros_stay_while_all_weights_learn() -> None:
    model: Any = tiny(2)
    sparsity.put_zeros(model, [0, 1, 2], "2:4", 0.5, lambda name, W: W.abs())
    masks = {name: p == 0 for name, p in model.named_parameters() if "proj" in name}
    model.requires_grad_(True)
    hooks = sparsity.keep_zeros(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, zero in masks.items():
        weight = model.get_parameter(name)
        assert float(weight[zero].abs().max()) == 0
        assert float(zero.double().mean()) == 0.5
        assert bool((weight[~zero] != 0).all())
    for hook in hooks:
        hook.remove()
