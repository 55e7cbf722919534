"""LEGO and the baselines: invariants of the clustering, PEFT's own functions on the same updates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from torch import nn

from adapters.errors import InputError
from adapters.formats import LoraFile, LoraLayer, write_peft
from adapters.merging.concatenate import concatenate, join
from adapters.merging.dare import dare
from adapters.merging.lego import kmeans, lego
from adapters.merging.linear import linear, svd
from adapters.merging.magnitude import magnitude
from adapters.merging.ties import ties

METHODS = (lego, ties, dare, magnitude, linear, svd)


def layer(rank: int = 4, seed: int = 0, conv: bool = False, alpha: float = 8.0, **more) -> LoraLayer:
    g = torch.Generator().manual_seed(seed)
    inner, outer = ((3, 3, 3), (1, 1)) if conv else ((7,), ())
    return LoraLayer(torch.randn(rank, *inner, generator=g), torch.randn(9, rank, *outer, generator=g), alpha, **more)


def file(*layers: LoraLayer, name: str = "model") -> LoraFile:
    return LoraFile({name: {f"layer{i}": one for i, one in enumerate(layers)}})


def delta(merged, module: str = "layer0") -> torch.Tensor:
    return merged.file.parts["model"][module].delta()


def permuted(one: LoraLayer, seed: int = 5) -> LoraLayer:
    order = torch.randperm(one.rank, generator=torch.Generator().manual_seed(seed))
    return replace(one, A=one.A[order], B=one.B[:, order])


def close(first, second, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("conv", [False, True])
def test_order_of_ranks_and_adapters_does_not_matter(conv):
    one, two = layer(seed=1, conv=conv), layer(seed=2, conv=conv, alpha=2.0)
    wanted = delta(lego([file(one), file(two)], [1, 0.5], rank=5))
    close(delta(lego([file(permuted(one)), file(permuted(two))], [1, 0.5], rank=5)), wanted)
    close(delta(lego([file(two), file(one)], [0.5, 1], rank=5)), wanted)
    assert torch.equal(delta(lego([file(one), file(two)], [1, 0.5], rank=5)), wanted)
    assert torch.linalg.matrix_rank(wanted.flatten(1)) <= 5


def test_all_ranks_kept_is_the_exact_sum():
    files = [file(layer(seed=1)), file(layer(6, seed=2, rslora=True)), file(layer(2, seed=3))]
    exact = delta(concatenate(files, [1, -0.5, 2]))
    close(delta(lego(files, [1, -0.5, 2], rank=12, output_reweight=False)), exact, 1e-4)
    close(delta(lego(files, [1, -0.5, 2], rank=12)), exact * (4 / 12) ** 0.5, 1e-4)


def test_copies_and_single_adapters_come_back():
    one = layer(seed=1)
    close(delta(lego([file(one), file(permuted(one)), file(one)], [1, 1, 1])), one.delta())
    close(delta(lego([file(one)], [1])), one.delta())
    pruned = lego([file(one)], [1], rank=2)
    assert pruned.file.parts["model"]["layer0"].rank == 2
    assert 0 < pruned.errors["model.layer0"] < 1.5


def test_balance_makes_the_result_free_of_the_gauge():
    one, two = layer(seed=1), layer(seed=2)
    factors = torch.tensor([0.1, 30.0, -2.0, 5.0])
    other = replace(one, A=one.A * factors[:, None], B=one.B / factors)
    close(other.delta(), one.delta(), 1e-4)
    first = delta(lego([file(one), file(two)], [1, 1], rank=3, balance=True))
    close(delta(lego([file(other), file(two)], [1, 1], rank=3, balance=True)), first, 1e-4)


@pytest.mark.parametrize(("norm", "order"), [("inf", float("inf")), ("l2", 2.0)])
def test_centroids_get_their_members_length(norm, order):
    one, two = layer(seed=1), layer(seed=2)
    merged = lego([file(one), file(two)], [1, 1], rank=1, parameter_norm=norm, output_reweight=False)
    found = merged.file.parts["model"]["layer0"]
    centre = torch.cat([found.A[0], found.B[:, 0]])
    units = torch.cat([2**0.5 * torch.cat([one.A, one.B.T], 1), 2**0.5 * torch.cat([two.A, two.B.T], 1)])
    wanted = torch.linalg.vector_norm(units, order, dim=1).mean()
    close(torch.linalg.vector_norm(centre, order), wanted, 1e-4)
    assert merged.report["model.layer0"]["sizes"] == [8]
    assert merged.report["model.layer0"]["adapters_mixed"] == [2]


def test_modules_of_some_adapters_only_are_kept():
    one, two = file(layer(seed=1), layer(seed=2)), file(layer(seed=3))
    merged = lego([one, two], [1, 1], features="unit_halves")
    close(delta(merged, "layer1"), layer(seed=2).delta())
    assert merged.file.parts["model"]["layer0"].rank == 4


def test_kmeans_finds_blobs_and_leaves_no_cluster_empty():
    g = torch.Generator().manual_seed(0)
    blobs = torch.cat([torch.randn(10, 3, generator=g) * 0.1 + 5 * k for k in range(3)]).double()
    labels, inertia = kmeans(blobs, 3)
    assert len({tuple(labels[10 * k : 10 * k + 10].tolist()) for k in range(3)}) == 3
    assert all(len(set(labels[10 * k : 10 * k + 10].tolist())) == 1 for k in range(3))
    assert inertia < 2
    labels, _ = kmeans(torch.ones(5, 2).double(), 3)
    assert set(labels.tolist()) == {0, 1, 2}


def test_merged_file_is_what_peft_loads(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 9))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"]))
    one = LoraFile({"model": {"0": layer(seed=1)}})
    merged = lego([one, LoraFile({"model": {"0": layer(seed=2)}})], [1, 1], rank=6)
    write_peft(merged.file, tmp_path / "out")
    x = torch.randn(3, 7)
    with model.disable_adapter():
        plain = model(x)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "out")
    close(loaded(x) - plain, x @ merged.file.parts["model"]["0"].delta().T, 1e-4)


@pytest.mark.parametrize("method", [ties, dare, magnitude])
def test_whole_update_methods_equal_pefts_on_the_same_updates(method, monkeypatch):
    layers = [layer(seed=1), layer(seed=2), layer(seed=3)]
    updates = [one.delta() for one in layers]
    weights = torch.tensor([1.0, 0.5, 2.0])
    files = [file(one) for one in layers]
    if method is ties:
        weights = torch.ones(3)  # PEFT elects signs before it weighs, we after (a negative weight turns signs)
        wanted = merge_utils.ties(updates, weights, density=0.4)
        found = ties(files, weights.tolist(), rank=9, density=0.4)
    elif method is magnitude:
        wanted = merge_utils.magnitude_prune(updates, weights, density=0.4)
        found = magnitude(files, weights.tolist(), rank=9, density=0.4)
    else:
        found = dare(files, weights.tolist(), rank=9, density=0.5, seed=3)
        kept = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(3)) < 0.5
        wanted = sum(w * u * m / 0.5 for w, u, m in zip(weights, updates, kept, strict=True))
    close(delta(found), wanted, 1e-4)


def test_density_one_is_the_exact_sum():
    files = [file(layer(seed=1)), file(layer(seed=2))]
    exact = delta(concatenate(files, [1, 2]))
    for method in (dare, magnitude):
        close(delta(method(files, [1, 2], density=1.0)), exact, 1e-4)


def test_svd_is_the_nearest_and_linear_has_cross_terms():
    one, two = layer(seed=1), layer(seed=2)
    exact = delta(concatenate([file(one), file(two)], [1, 1]))
    best = delta(svd([file(one), file(two)], [1, 1]))
    U, S, Vh = torch.linalg.svd(exact)
    close(best, (U[:, :4] * S[:4]) @ Vh[:4], 1e-4)
    added = linear([file(one), file(two)], [1, 1])
    close(delta(added), 2 * (one.B + two.B) @ (one.A + two.A), 1e-4)
    assert added.errors["model.layer0"] > 0.3
    assert join([(one, 1.0)]).rank == 4


@pytest.mark.parametrize("method", METHODS)
def test_bad_input(method):
    one = file(layer())
    dora = file(replace(layer(), magnitude=torch.ones(9)))
    wide = file(replace(layer(), A=torch.ones(4, 8)))
    broken = file(replace(layer(), A=torch.full((4, 7), torch.nan)))
    for files, weights, sentence in (
        ([], [], "no adapter"),
        ([one], [0], "Every weight is 0"),
        ([one, one], [1], "2 weights"),
        ([dora], [1], "DoRA"),
        ([one, wide], [1, 1], "different shapes"),
        ([one, file(layer(), name="unet")], [1, 1], "for a single model, others for a pipeline"),
        ([broken], [1], "not finite"),
    ):
        with pytest.raises(InputError, match=sentence):
            method(files, weights)


def test_bad_options():
    one = file(layer())
    for call, sentence in (
        (lambda: lego([one], [1], rank=5), "from 1 to 4"),
        (lambda: lego([one], [1], rank=0), "from 1 to 4"),
        (lambda: lego([one], [1], features="x"), "unit_halves"),
        (lambda: lego([one], [1], parameter_norm="l1"), "'inf', 'l2'"),
        (lambda: ties([one], [1], density=0), "density"),
        (lambda: dare([one], [1], then="x"), "'sum' or 'ties'"),
        *((lambda method=method: method([one], [1], rank=0), "at least 1") for method in (magnitude, linear, svd)),
        (lambda: linear([one, file(layer(3))], [1, 1]), "equal ranks"),
        (lambda: linear([one], [-1]), "negative"),
    ):
        with pytest.raises(InputError, match=sentence):
            call()
