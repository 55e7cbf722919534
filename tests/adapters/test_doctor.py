"""The composition doctor: overlaps against whole matrices and scipy's principal angles, and advice that follows."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from adapters.errors import FamilyError, InputError
from adapters.formats.lora import LoraFile, LoraLayer
from adapters.inspection.doctor import Subject, balanced_weights, common_words, diagnose, outliers
from adapters.inspection.interference import compare, compare_layer, update, updates

OUT, IN = 12, 10


def layer(seed: int, rank: int = 3, alpha: float = 2.0, out: int = OUT, inside: int = IN) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    return LoraLayer(torch.randn(rank, inside, generator=generator), torch.randn(out, rank, generator=generator), alpha)


def file(**layers: LoraLayer) -> LoraFile:
    return LoraFile({"unet": layers})


def projector(basis: torch.Tensor) -> torch.Tensor:
    return basis @ torch.linalg.pinv(basis)


@settings(max_examples=30, deadline=None)
@given(
    seeds=st.tuples(st.integers(0, 99), st.integers(100, 199)), ranks=st.tuples(st.integers(1, 4), st.integers(1, 4))
)
def test_numbers_are_those_of_the_whole_matrices(seeds: tuple[int, int], ranks: tuple[int, int]) -> None:
    first, second = layer(seeds[0], ranks[0]), layer(seeds[1], ranks[1])
    found = compare_layer(update(first), update(second))
    D, E = first.delta().double(), second.delta().double()
    assert found.first == pytest.approx(float(D.norm()), rel=1e-5)
    assert found.cosine == pytest.approx(float((D * E).sum() / D.norm() / E.norm()), abs=1e-5)
    for side, bases in (("inputs", (first.A.T, second.A.T)), ("outputs", (first.B, second.B))):
        cosines = torch.tensor(subspace_angles(bases[0].numpy(), bases[1].numpy())).cos()
        assert getattr(found, side) == pytest.approx(float(cosines.square().mean()), abs=1e-5)
    PA, PB, QA, QB = (projector(x.double()) for x in (first.A.T, first.B, second.A.T, second.B))
    shared = 0.5 * float((PB @ E @ PA).norm() ** 2 / E.norm() ** 2 + (QB @ D @ QA).norm() ** 2 / D.norm() ** 2)
    assert found.shared == pytest.approx(shared, abs=1e-5)


def test_an_adapter_and_itself_share_everything_and_others_nothing() -> None:
    one = updates(file(a=layer(0), b=layer(1)))
    assert compare(one, one).interference == pytest.approx(1)
    assert compare(one, one).cosine == pytest.approx(1)
    other = updates(file(c=layer(2)))
    assert compare(one, other).interference == 0
    assert compare(one, other).layers == {}


def test_orthogonal_inputs_do_not_interfere() -> None:
    A = torch.eye(IN)
    first, second = (LoraLayer(A[i : i + 2], torch.ones(OUT, 2), 1.0) for i in (0, 4))
    found = compare_layer(update(first), update(second))
    assert found.inputs == pytest.approx(0, abs=1e-12)
    assert found.outputs > 0
    assert found.shared == pytest.approx(0, abs=1e-12)


def test_random_adapters_share_about_what_chance_says() -> None:
    size = 60
    parts = [updates(file(**{str(k): layer(s * 100 + k, 6, out=size, inside=size) for k in range(20)})) for s in (1, 2)]
    found = compare(*parts)
    assert found.chance == pytest.approx(0.01)
    assert found.interference == pytest.approx(found.chance, rel=0.3)


def test_the_same_of_both_orders_and_of_any_strength() -> None:
    a, b = updates(file(x=layer(0), y=layer(1))), updates(file(x=layer(2), z=layer(3)))
    stronger = updates(file(x=layer(2, alpha=8.0), z=layer(3, alpha=8.0)))
    assert compare(a, b).interference == pytest.approx(compare(b, a).interference)
    assert compare(a, b).interference == pytest.approx(compare(a, stronger).interference)
    assert 0 < compare(a, b).common < 1


def test_formats_with_other_spellings_are_compared() -> None:
    dotted = LoraFile({"text_encoder": {"text_model.encoder.layers.0.q": layer(0)}})
    flat = LoraFile({"text_encoder": {"encoder_layers_0_q": layer(0)}}, flat=True)
    assert compare(updates(dotted), updates(flat)).interference == pytest.approx(1)


def test_another_base_model_is_refused() -> None:
    with pytest.raises(FamilyError, match="different base models"):
        compare(updates(file(a=layer(0))), updates(file(a=layer(0, inside=IN + 1))))


def test_advice_follows_what_was_found() -> None:
    apart = diagnose([Subject("a", file(x=layer(0))), Subject("b", file(y=layer(1)))])
    assert (apart.advice.method, apart.pairs[0].level) == ("merge", "none")
    same = [Subject("a", file(x=layer(0)), kind="concept"), Subject("b", file(x=layer(0)), kind="concept")]
    assert diagnose(same).pairs[0].level == "high"
    assert diagnose(same).advice.regions
    styled = [same[0], Subject("b", file(x=layer(0)), kind="style")]
    assert diagnose(styled).advice.method == "switch"
    assert "np-lora" in diagnose(styled).advice.reasons[-1]
    json.dumps(diagnose(same).to_dict())


def test_strengths_and_words() -> None:
    weak, strong = (
        Subject("weak", file(x=layer(0)), ("zq fox",)),
        Subject("strong", file(x=layer(1, alpha=6.0)), ("zq cat",)),
    )
    found = diagnose([weak, strong], prompt="a zq fox")
    assert found.advice.weights["weak"] == 1
    ratio = found.strengths["strong"] / found.strengths["weak"]
    assert found.advice.weights["strong"] == pytest.approx(1.5 / ratio, abs=0.01)
    assert found.pairs[0].words == ("zq",)
    assert any("does not trigger strong" in remark for remark in found.remarks)
    assert common_words(("Style of Zed",), ("the style",)) == ()
    assert balanced_weights({"a": 0.0, "b": 2.0}, {"a": 1.0, "b": 1.0}) == {"a": 1.0, "b": 1.0}


def test_refusals() -> None:
    with pytest.raises(InputError, match="at least one"):
        diagnose([])
    with pytest.raises(InputError, match="twice"):
        diagnose([Subject("a", file(x=layer(0)))] * 2)
    idle = diagnose([Subject("a", file(x=LoraLayer(torch.ones(1, IN), torch.zeros(OUT, 1), 1.0)))])
    assert "changes nothing" in idle.remarks[0]


def test_validation_finds_the_order_and_its_absence() -> None:
    from benchmarks.interference import validate

    pairs = [(f"a{k}", f"b{k}") for k in range(12)]
    predicted = {pair: k / 12 for k, pair in enumerate(pairs)}
    agreeing = {(b, a): value**3 for (a, b), value in predicted.items()}  # any growing function, names in any order
    found = validate(predicted, agreeing, resamples=200)
    assert found.rho == pytest.approx(1)
    assert found.p < 0.02
    opposite = {pair: -value for pair, value in predicted.items()}
    assert validate(predicted, opposite, resamples=200).rho == pytest.approx(-1)
    assert validate(predicted, opposite, resamples=200).p > 0.9
    with pytest.raises(InputError, match="three pairs"):
        validate(predicted, {pairs[0]: 1.0})


@pytest.mark.parametrize(
    ("strengths", "weights", "weak"),
    [
        ({"a": 1.0, "b": 1.2}, {"a": 1, "b": 1}, []),
        ({"a": 1.0, "b": 3.0}, {"a": 1, "b": 0.5}, []),
        ({"a": 1.0, "b": 1.0, "c": 3.0}, {"a": 1, "b": 1, "c": 0.5}, []),
        ({"a": 0.1, "b": 1.0}, {"a": 1, "b": 1}, ["a"]),
        ({"a": 0.1, "b": 1.0, "c": 1.2}, {"a": 1, "b": 1, "c": 1}, ["a"]),
        ({"a": 0.0, "b": 1.0}, {"a": 1, "b": 1}, []),
    ],
)
def test_weights_aim_at_the_typical_and_a_far_weaker_adapter_silences_nobody(strengths, weights, weak):
    assert balanced_weights(strengths, dict.fromkeys(strengths, 1)) == weights
    assert outliers(strengths) == weak


@pytest.mark.slow
def test_advice_over_the_shipped_adapters_and_one_that_was_hardly_trained():
    import assets
    from adapters import formats
    from adapters.formats.lora import LoraFile, LoraLayer

    places = sorted(assets.path("adapters").glob("*/*.safetensors"))
    files = {place.stem: formats.read(place) for place in places if not place.stem.startswith("agd")}
    files = {name: file for name, file in files.items() if not file.is_dora() and set(file.parts) & {"unet"}}
    fox = files["fox"]
    parts = {
        part: {name: LoraLayer(layer.A, 0.05 * layer.B, layer.alpha) for name, layer in layers.items()}
        for part, layers in fox.parts.items()
    }
    for other, file in files.items():
        if other == "fox":
            continue
        found = diagnose([Subject("hardly", LoraFile(parts)), Subject(other, file), Subject("fox", fox)])
        assert any(reason.startswith("hardly is far weaker") for reason in found.advice.reasons)
        assert min(found.advice.weights.values()) >= 0.3
