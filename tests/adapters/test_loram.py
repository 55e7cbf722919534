"""LoRAM: recovery against products of matrices and PEFT."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from adapters.compression import loram
from adapters.compression.slicing import entries, member_of, small_model
from adapters.compression.structure import Pruning, sizes_of
from adapters.errors import InputError
from adapters.formats.lora import MODEL, LoraFile, LoraLayer
from adapters.formats.peft_directory import write_directory
from adapters.layers.variant import read_layers
from tests.adapters.test_pruning import even, tiny, uneven

Layers = dict[str, LoraLayer]


def adapter_of(model: Any, seed: int = 0, rank: int = 2) -> Layers:
    """A random LoRA on every linear layer, in the model's precision."""
    torch.manual_seed(seed)
    targets = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=3, target_modules=targets))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    found = read_layers(wrapped)
    wrapped.unload()
    return found


@pytest.fixture(scope="module", params=[2, 4], ids=["grouped", "one query head each"])
def trained(request: pytest.FixtureRequest) -> tuple[Any, Pruning, Layers]:
    model = tiny(request.param)
    pruning = uneven(sizes_of(model.config))
    return model, pruning, adapter_of(small_model(model, pruning))


def test_recovered_products_are_the_small_ones_and_zero(trained: tuple[Any, Pruning, Layers]) -> None:
    model, pruning, layers = trained
    whole = loram.recovered(layers, pruning)
    assert whole.keys() == layers.keys()
    assert "lm_head" in whole
    for name, layer in whole.items():
        assert layer.delta().shape == model.get_parameter(f"{name}.weight").shape
        assert (layer.alpha, layer.rank, layer.A.dtype) == (3.0, 2, torch.float64)
        found = member_of(name)
        index = found and entries(pruning.sizes, pruning.layers[found[0]].of(found[1].axis), found[1].axis)
        if found is None or index is None:
            assert torch.equal(layer.A, layers[name].A)
            assert torch.equal(layer.B, layers[name].B)
            continue
        axis = 0 if found[1].rows else 1
        product, small = layer.B @ layer.A, layers[name].B @ layers[name].A
        torch.testing.assert_close(product.index_select(axis, index), small, rtol=1e-12, atol=1e-14)
        rest = [i for i in range(product.shape[axis]) if i not in set(index.tolist())]
        assert torch.count_nonzero(product.index_select(axis, torch.tensor(rest))) == 0
    assert loram.is_recovered(whole, pruning)


def test_shrinking_undoes_recovery(trained: tuple[Any, Pruning, Layers]) -> None:
    _, pruning, layers = trained
    back = loram.shrunk(loram.recovered(layers, pruning), pruning)
    assert all(torch.equal(back[n].A, one.A) and torch.equal(back[n].B, one.B) for n, one in layers.items())


def test_the_small_model_with_its_adapter_is_the_whole_one_cut(trained: tuple[Any, Pruning, Layers]) -> None:
    """Merging and cutting commute."""
    model, pruning, layers = trained
    ids = torch.arange(8)[None]
    small, whole = small_model(copy.deepcopy(model), pruning), copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in layers.items():
            small.get_parameter(f"{name}.weight").add_(layer.scale * layer.B @ layer.A)
        for name, layer in loram.recovered(layers, pruning).items():
            whole.get_parameter(f"{name}.weight").add_(layer.scale * layer.B @ layer.A)
        torch.testing.assert_close(small_model(whole, pruning)(ids).logits, small(ids).logits, rtol=1e-10, atol=1e-12)


def test_recovered_adapter_in_plain_peft(trained: tuple[Any, Pruning, Layers], tmp_path: Path) -> None:
    model, pruning, layers = trained
    whole = loram.recovered(layers, pruning)
    tmp_path.mkdir(exist_ok=True)
    write_directory(tmp_path, whole, {}, {"task_type": "CAUSAL_LM"})
    merged: Any = PeftModel.from_pretrained(tiny(pruning.sizes.kv_heads), tmp_path).merge_and_unload()
    for name, layer in whole.items():
        wanted = model.get_parameter(f"{name}.weight").detach() + layer.scale * layer.B @ layer.A
        torch.testing.assert_close(merged.get_parameter(f"{name}.weight"), wanted, rtol=1e-6, atol=1e-6)


def test_nothing_pruned_changes_nothing() -> None:
    model = tiny(2)
    layers = adapter_of(model)
    assert loram.recovered(layers, loram.sized(sizes_of(model.config), 0)) == layers


def test_foreign_adapters_are_refused() -> None:
    model = tiny(2)
    sizes = sizes_of(model.config)
    layers = adapter_of(model)
    with pytest.raises(InputError, match="the whole model"):
        loram.recovered(layers, uneven(sizes))
    with pytest.raises(InputError, match="another pruning"):
        loram.recovered(adapter_of(small_model(model, even(sizes))), uneven(sizes))
    dora = {name: replace(layer, magnitude=torch.ones(layer.B.shape[0])) for name, layer in layers.items()}
    small = {name: dora[name] for name in dora if "layers.1" not in name}
    with pytest.raises(InputError, match="DoRA"):
        loram.shrunk(small, uneven(sizes))
    assert LoraFile({MODEL: layers}).parameters() > 0


def test_plans_keep_the_counts_and_the_outer_blocks() -> None:
    from adapters.compression import importance

    model = tiny(4, num_hidden_layers=8)
    sizes = sizes_of(model.config)
    chosen = loram.blocks(sizes, 0.5)
    assert list(chosen) == [4, 5]
    pruning = loram.plan(sizes, importance.magnitude(model, sizes, chosen), 0.5, "magnitude")
    assert pruning.counts() == [(4, 40)] * 4 + [(2, 20)] * 2 + [(4, 40)] * 2
    assert pruning.identity != loram.plan(sizes, importance.random(sizes, chosen, 1), 0.5, "random").identity
