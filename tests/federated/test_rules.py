"""Server rules: algebraic invariants in fp64 and independent solvers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import InputError
from adapters.federated import fed_sb, fedex_lora, fedit, ffa_lora, flexlora, flora, lora_fair
from adapters.federated.facts import facts, refuse_secure_aggregation, rules, sent
from adapters.federated.state import Options, bias, check_reply, deviation, digest, mean, shares, stacked
from adapters.low_rank import norm

OUT, IN, RANK = 9, 7, 3


def clients(count: int = 3, seed: int = 0, rank: int = RANK, spread: float = 1.0):
    """Replies with one layer and a head, and unequal weights."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    A0, B0 = draw(rank, IN), draw(OUT, rank)
    replies = [
        {"m.lora_A": A0 + spread * draw(rank, IN), "m.lora_B": B0 + spread * draw(OUT, rank), "head": draw(2, 4)}
        for _ in range(count)
    ]
    return replies, [float(n) for n in range(1, count + 1)]


def ideal(replies, weights):
    p = shares(weights)
    return sum(share * reply["m.lora_B"] @ reply["m.lora_A"] for share, reply in zip(p, replies, strict=True))


def close(first, second, tolerance=1e-10):
    torch.testing.assert_close(first, second, rtol=0, atol=tolerance)


def product(state):
    return state["m.lora_B"] @ state["m.lora_A"]


@given(seed=st.integers(0, 10**6), count=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_deviation_is_the_covariance_of_the_drifts(seed, count):
    replies, weights = clients(count, seed)
    average = mean(replies, weights, ["m.lora_A", "m.lora_B"])
    left, right = deviation(replies, weights, "m")
    close(left @ right, ideal(replies, weights) - product(average))
    assert right.shape[0] == (count - 1) * RANK
    assert bias(replies, weights, "m") == pytest.approx(
        float(norm(left, right) / torch.linalg.norm(ideal(replies, weights))), abs=1e-9
    )


def test_exact_rules_reach_the_ideal_update():
    replies, weights = clients()
    goal = ideal(replies, weights)
    made = flora.aggregate(replies, weights, Options())
    close(made.residual["m"][0] @ made.residual["m"][1], goal)
    assert set(made.tensors) == {"head"}
    made = fedex_lora.aggregate(replies, weights, Options())
    close(product(made.tensors) + made.residual["m"][0] @ made.residual["m"][1], goal)
    made = flexlora.aggregate(replies, weights, Options(rank=min(OUT, IN)))
    close(product(made.tensors), goal)
    assert made.report["m"]["bias"] < 1e-12


def test_flexlora_is_the_nearest_pair_of_its_rank_and_serves_lower_ranks():
    replies, weights = clients()
    replies[0]["m.lora_A"], replies[0]["m.lora_B"] = replies[0]["m.lora_A"][:2], replies[0]["m.lora_B"][:, :2]
    made = flexlora.aggregate(replies, weights, Options())
    goal = ideal(replies, weights)
    U, S, Vh = torch.linalg.svd(goal)
    for rank in (1, RANK):
        cut = made.tensors["m.lora_B"][:, :rank] @ made.tensors["m.lora_A"][:rank]
        close(cut, (U[:, :rank] * S[:rank]) @ Vh[:rank])
    assert made.report["m"]["bias"] == pytest.approx(float(S[RANK:].norm() / S.norm()))


def test_linear_rules_average_exactly():
    replies, weights = clients()
    for reply in replies:
        reply["m.lora_A"] = replies[0]["m.lora_A"]
    made = ffa_lora.aggregate([{k: v for k, v in r.items() if k != "m.lora_A"} for r in replies], weights, Options())
    close(made.tensors["m.lora_B"] @ replies[0]["m.lora_A"], ideal(replies, weights), 1e-12)
    g = torch.Generator().manual_seed(3)
    A, B = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((RANK, IN), (OUT, RANK)))
    cores = [{"m.lora_R": torch.randn(RANK, RANK, generator=g, dtype=torch.float64)} for _ in weights]
    made = fed_sb.aggregate(cores, weights, Options())
    whole = sum(p * B @ core["m.lora_R"] @ A for p, core in zip(shares(weights), cores, strict=True))
    close(B @ made.tensors["m.lora_R"] @ A, whole, 1e-12)


def test_fed_sb_takes_the_sign_of_the_sum():
    g = [torch.randn(OUT, IN, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in range(3)]
    fixed, cores = fed_sb.basis([{"m": one} for one in g], RANK, {"m": 2.0}, 0.1)
    A, B, R = fixed["m.lora_A"], fixed["m.lora_B"], cores["m.lora_R"]
    eye = torch.eye(RANK, dtype=torch.float64)
    close(B.T @ B, eye)
    close(A @ A.T, eye)
    U, S, Vh = torch.linalg.svd(-0.1 * sum(g).sign())
    close(2.0 * B @ R @ A, (U[:, :RANK] * S[:RANK]) @ Vh[:RANK])
    # the gradient of R moves the weight by the projection of the full gradient
    W = torch.randn(OUT, IN, dtype=torch.float64)
    core = R.clone().requires_grad_()
    ((2.0 * B @ core @ A) * W).sum().backward()
    close(core.grad, 2.0 * B.T @ W @ A.T)
    with pytest.raises(InputError, match=r"^m: .*zero or not finite"):
        fed_sb.basis([{"m": torch.zeros(OUT, IN)}], RANK, {"m": 1.0}, 0.1)
    with pytest.raises(InputError, match="m: Rank 8"):
        fed_sb.basis([{"m": g[0]}], 8, {"m": 1.0}, 0.1)


def fair(replies, weights, mode="ridge", strength=0.01):
    return lora_fair.aggregate(replies, weights, Options(correction=mode, strength=strength))


def test_ridge_without_penalty_is_least_squares():
    replies, weights = clients()
    made = fair(replies, weights, strength=0.0)
    A, goal = made.tensors["m.lora_A"], ideal(replies, weights)
    close(made.tensors["m.lora_B"], torch.linalg.lstsq(A.T, goal.T).solution.T, 1e-9)
    P = A.T @ torch.linalg.solve(A @ A.T, A)
    left = torch.linalg.norm(goal - goal @ P) / torch.linalg.norm(goal)
    assert made.report["m"]["bias"] == pytest.approx(float(left), abs=1e-9)


@given(seed=st.integers(0, 10**6), count=st.integers(2, 5), spread=st.floats(0.05, 2))
@settings(max_examples=60, deadline=None)
def test_ridge_residual_rises_and_cosine_falls_with_lambda(seed, count, spread):
    replies, weights = clients(count, seed, spread=spread)
    found = [fair(replies, weights, strength=s).report["m"] for s in (1e-6, 1e-3, 1e-2, 0.1, 1.0, 10.0)]
    errors, cosines = [f["bias"] for f in found], [f["cosine_bias"] for f in found]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(errors))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(cosines))
    assert errors[-1] <= found[0]["before"] + 1e-12
    assert found[2]["cosine_bias"] >= found[2]["cosine_before"] - 1e-12


def test_ridge_limits_and_symmetries():
    replies, weights = clients()
    plain = fedit.aggregate(replies, weights, Options()).tensors
    for made in (fair(replies, weights, strength=math.inf), fair(replies, weights, "none")):
        assert all(torch.equal(made.tensors[name], plain[name]) for name in plain)
    for mode in ("ridge", "cosine"):
        one = fair(replies[:1], [3.0], mode, 1e-3).tensors
        close(one["m.lora_B"], replies[0]["m.lora_B"], 1e-6)
        same = [{**reply, "m.lora_A": replies[0]["m.lora_A"]} for reply in replies]
        made = fair(same, weights, mode, 1e-3)
        close(made.tensors["m.lora_B"], mean(same, weights, ["m.lora_B"])["m.lora_B"], 1e-6)
        order, scaled = [2, 0, 1], [7 * w for w in weights]
        first = fair(replies, scaled, mode).tensors
        second = fair([replies[i] for i in order], [weights[i] for i in order], mode).tensors
        close(first["m.lora_B"], second["m.lora_B"], 1e-8)
    X = fair(replies, weights).tensors["m.lora_B"] - plain["m.lora_B"]
    larger = [{**reply, "m.lora_B": 5 * reply["m.lora_B"]} for reply in replies]
    close(fair(larger, weights).tensors["m.lora_B"] - 5 * plain["m.lora_B"], 5 * X)


def test_cosine_finds_the_direction_and_the_length_nearest_to_the_mean():
    replies, weights = clients(spread=0.3)
    made = fair(replies, weights, "cosine", 1e-8)
    A, Bm = made.tensors["m.lora_A"], mean(replies, weights, ["m.lora_B"])["m.lora_B"]
    best = ideal(replies, weights) @ A.T @ torch.linalg.inv(A @ A.T)
    close(made.tensors["m.lora_B"], best * ((Bm * best).sum() / best.square().sum()), 1e-4)


def test_cosine_is_a_minimum_of_the_papers_objective():
    replies, weights = clients(spread=0.5)
    strength, goal = 0.01, ideal(replies, weights)
    made = fair(replies, weights, "cosine", strength)
    A, Bm = made.tensors["m.lora_A"], mean(replies, weights, ["m.lora_B"])["m.lora_B"]
    X = (made.tensors["m.lora_B"] - Bm).requires_grad_()
    (-torch.cosine_similarity(((Bm + X) @ A).flatten(), goal.flatten(), dim=0) + strength * X.square().sum()).backward()
    assert float(X.grad.abs().max()) < 1e-7


def test_bad_input_of_the_rules():
    replies, weights = clients()
    with pytest.raises(InputError, match="lambda must be 0 or more"):
        fair(replies, weights, strength=-1.0)
    flat = [{**reply, "m.lora_A": reply["m.lora_A"] * torch.tensor([1.0, 1.0, 0.0])[:, None]} for reply in replies]
    with pytest.raises(InputError, match="full rank"):
        fair(flat, weights, strength=0.0)
    for wrong in ([], [0.0, 0.0], [1.0, -1.0], [1.0, math.nan]):
        with pytest.raises(InputError, match="weighted"):
            shares(wrong)
    expected = {name: tuple(tensor.shape) for name, tensor in replies[0].items()}
    good = {name: tensor.float() for name, tensor in replies[0].items()}
    check_reply(good, expected, "a")
    bad = {
        "sent no 'head'": {k: v for k, v in good.items() if k != "head"},
        "not asked for": {**good, "extra": torch.zeros(1)},
        "of shape": {**good, "head": torch.zeros(3, 3)},
        "not finite in 'head'": {**good, "head": torch.full((2, 4), torch.nan)},
        "torch.int64": {**good, "head": torch.zeros(2, 4, dtype=torch.int64)},
        "torch.bfloat16": {**good, "head": torch.zeros(2, 4, dtype=torch.bfloat16)},
    }
    for words, reply in bad.items():
        with pytest.raises(InputError, match=f"(?s)client 'a' .*{words}"):
            check_reply(reply, expected, "a")
    smaller = {**good, "m.lora_A": good["m.lora_A"][:2], "m.lora_B": good["m.lora_B"][:, :2]}
    check_reply(smaller, expected, "a", ragged=True)
    with pytest.raises(InputError):
        check_reply(smaller, expected, "a")


def test_catalogue_and_secure_aggregation():
    known = {rule.name: facts(rule) for rule in rules()}
    assert set(known) == {"fedit", "ffa-lora", "fed-sb", "lora-fair", "flora", "flexlora", "fedex-lora"}
    for rule in rules():
        assert callable(rule.load())
        if known[rule.name].linear:
            refuse_secure_aggregation(rule)
        else:
            with pytest.raises(InputError, match="fed-sb, fedit, ffa-lora"):
                refuse_secure_aggregation(rule)


def test_traffic_by_count():
    """Fed-SB's table: 8.96 M numbers on Mistral-7B at rank 200 against 2097 M of FedEx and FLoRA at rank 32."""
    known = {rule.name: facts(rule) for rule in rules()}
    hidden, inner, kv = 4096, 14336, 1024
    mistral = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (inner, hidden), (inner, hidden),
               (hidden, inner)] * 32  # fmt: skip

    def total(name, rank, clients=25):
        return [sum(part) for part in zip(*(sent(known[name], m, n, rank, clients) for m, n in mistral), strict=True)]

    assert total("fed-sb", 200) == [224 * 200**2] * 2 == [8_960_000] * 2
    assert total("fedit", 32)[0] == 83_886_080
    assert total("flora", 32)[1] == total("fedex-lora", 32)[1] == 25 * 83_886_080
    assert round(25 * 83_886_080 / 8_960_000) == 234
    up, _ = zip(*(sent(known["ffa-lora"], m, n, 8, 4) for m, n in ((64, 64), (128, 64), (64, 128))), strict=True)
    assert sum(up) == 8 * (64 + 128 + 64)
    vit = [(64, 64)] * 4 + [(128, 64), (64, 128)]
    ratio = sum(sent(known["fedit"], m, n, 8, 4)[0] for m, n in vit) / sum(
        sent(known["fed-sb"], m, n, 8, 4)[0] for m, n in vit
    )
    assert ratio == pytest.approx(18.67, abs=0.004)


def test_noise_reaches_the_weight_least_through_fed_sb():
    """One noised step on 768 x 768 at the same sigma C: |dW| of Fed-SB (r 64) < FFA-LoRA (r 32) < LoRA (r 32)."""
    g = torch.Generator().manual_seed(0)
    size, sigma = 768, 0.01

    def noise(*shape):
        return sigma * torch.randn(*shape, generator=g)

    basis = [torch.linalg.qr(torch.randn(size, 64, generator=g))[0] for _ in range(2)]
    through_core = float(torch.linalg.norm(basis[0] @ noise(64, 64) @ basis[1].T))
    A = torch.empty(32, size)
    torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=g)
    B = 0.02 * torch.randn(size, 32, generator=g)
    first, second = noise(size, 32), noise(32, size)
    through_B = float(torch.linalg.norm(first @ A))
    through_both = float(torch.linalg.norm((B + first) @ (A + second) - B @ A))
    assert through_core == pytest.approx(sigma * 64, rel=0.05)
    assert through_B == pytest.approx(sigma * math.sqrt(size * 32 / 3), rel=0.05)
    assert through_core < through_B < through_both


def test_digest_sees_names_shapes_and_numbers():
    state = {"a": torch.zeros(2, 3)}
    assert digest(state) == digest({"a": torch.zeros(2, 3)})
    assert len({digest(s) for s in (state, {"b": state["a"]}, {"a": torch.zeros(3, 2)}, {"a": torch.ones(2, 3)})}) == 4
    assert torch.equal(stacked(*clients(1), "m")[1], clients(1)[0][0]["m.lora_A"])
