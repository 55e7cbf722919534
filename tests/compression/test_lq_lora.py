"""NormalFloat against bitsandbytes' table and written loops; the decomposition and the allocation by identities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from adapters.compression import backends
from adapters.compression.bits import pack, packed_bytes, unpack
from adapters.compression.lq_lora import allocate, decompose, first_errors, pareto
from adapters.compression.normal_float import (
    NF3,
    NF4,
    Configuration,
    NormalFloatLinear,
    codebook,
    dequantise,
    every_configuration,
    nearest,
    quantise,
    rounded,
)
from adapters.compression.storage import plain_weight, storage, stored_bytes
from adapters.errors import InputError

SMALL = Configuration(3, 8, "fp32", 64, 16)

# bitsandbytes 0.50.2, functional.create_normal_map / the table of its NF4 kernels
TABLE = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
         1.0]  # fmt: skip


def gaussian(out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=70))
def test_numbers_come_back_from_their_bits(bits: int, numbers: list[int]) -> None:
    codes = torch.tensor(numbers) % 2**bits
    packed = pack(codes, bits)
    assert packed.numel() == packed_bytes(len(numbers), bits) == math.ceil(len(numbers) * bits / 8)
    assert torch.equal(unpack(packed, bits, len(numbers)).long(), codes)
    stream = sum(int(code) << (bits * place) for place, code in enumerate(codes))  # one long number, written out
    assert bytes(packed.tolist()) == stream.to_bytes(packed.numel(), "little")


def test_codebooks() -> None:
    assert torch.allclose(codebook(4), torch.tensor(TABLE), atol=2e-7)
    assert torch.allclose(codebook(2), torch.tensor([-1, 0, 0.3379, 1]), atol=1e-4)
    assert torch.allclose(codebook(3), torch.tensor([-1, -0.4786, -0.2171, 0, 0.1609, 0.3379, 0.5626, 1]), atol=1e-4)
    for bits in (2, 3, 4, 8):
        values = codebook(bits)
        assert len(values) == 2**bits
        assert bool((values.diff() > 0).all())
        assert {-1.0, 0.0, 1.0} <= set(values.tolist())
        assert torch.equal(nearest(values, bits), torch.arange(2**bits))
        assert nearest(torch.tensor([-9.0, 9.0]), bits).tolist() == [0, 2**bits - 1]


def test_bits_are_those_of_the_stored_tensors() -> None:
    assert NF4.bits_per_weight == 4.126953125
    assert NF3.bits_per_weight == 3.126953125
    assert len(every_configuration(thorough=True)) == 432
    assert set(every_configuration()) <= set(every_configuration(thorough=True))
    for how in [*every_configuration()[::7], NF3, NF4]:
        for shape in ((64, 256), (24, 40)):  # the second is filled up
            stored, count = quantise(gaussian(*shape), how), shape[0] * shape[1]
            assert stored.nbytes == how.stored_bytes(count)
            if how.divides(count):
                assert stored.nbytes == how.bits_per_weight * count / 8 + 4
            assert Configuration.parse(str(how)) == how


@pytest.mark.parametrize("how", [SMALL, Configuration(2, 4, "bf16", 16, 16), Configuration(4, 3, "fp16", 32, 8)])
def test_quantising_is_the_written_rule(how: Configuration) -> None:
    """A slow loop over blocks, from the description."""
    W = gaussian(16, 128)
    blocks = W.flatten().view(-1, how.block)
    s0 = [float(block.abs().max()) for block in blocks]
    offset, steps = min(s0), 2**how.scale_bits - 1
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[how.scale]
    expected = []
    for number, block in enumerate(blocks):
        first = number // how.blocks * how.blocks
        s1 = float(torch.tensor(max(s - offset for s in s0[first : first + how.blocks])).to(kind))
        scale = min(round((s0[number] - offset) * steps / s1), steps) * s1 / steps + offset
        values = codebook(how.bits) * scale
        expected.append(torch.stack([values[(values - w).abs().argmin()] for w in block]))
    assert torch.allclose(dequantise(quantise(W, how)), torch.stack(expected).view(W.shape), atol=1e-5)
    assert torch.equal(rounded(W, how), dequantise(quantise(W, how)))


def test_awkward_matrices() -> None:
    for W in (torch.zeros(8, 64), torch.ones(8, 64), torch.cat([torch.zeros(4, 64), gaussian(4, 64)])):
        found = dequantise(quantise(W, Configuration(4, 8, "fp32", 16, 16)))
        assert bool(found.isfinite().all())
        assert float((found - W).abs().max()) < 0.5
    constant = dequantise(quantise(torch.ones(8, 64), SMALL))  # equal scales: s1 = 0
    assert torch.equal(constant, torch.ones(8, 64))
    for wrong, said in ((torch.tensor([[math.nan]]), "not finite"), (torch.zeros(2, 2, 2), "Only matrices")):
        with pytest.raises(InputError, match=said):
            quantise(wrong, NF4)
    for values in ({"bits": 5}, {"bits": 4, "scale": "fp8"}, {"bits": 4, "block": 0}):
        with pytest.raises(InputError):
            Configuration(**values)


def test_nf4_is_that_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    W = gaussian(32, 64)
    codes, state = bnb.functional.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=False)
    theirs = bnb.functional.dequantize_4bit(codes, state)
    scales = W.view(-1, 64).abs().amax(1, keepdim=True)
    ours = codebook(4)[nearest(W.view(-1, 64) / scales, 4)] * scales
    assert torch.allclose(ours.view(W.shape), theirs, atol=1e-6)


# ------------------------------------------------------------------------------------------------ decomposition


@pytest.mark.parametrize(("rank", "most"), [(8, 0.85), (32, 0.64)])
def test_the_error_falls_to_the_published_share(rank: int, most: float) -> None:
    W = gaussian(256, 512)
    found = decompose(W, SMALL, rank, steps=20)
    assert all(later <= earlier for earlier, later in itertools.pairwise(found.errors))
    assert found.errors[-1] / found.plain <= most
    rebuilt = dequantise(found.Q) + found.L1 @ found.L2
    assert float((W - rebuilt).norm()) == pytest.approx(found.errors[-1], rel=1e-5)
    loftq = W - dequantise(quantise(W, SMALL))  # one step from Q = quant(W)
    U, S, Vh = torch.linalg.svd(loftq, full_matrices=False)
    one_step = float((loftq - U[:, :rank] * S[:rank] @ Vh[:rank]).norm())
    assert found.errors[-1] < one_step


def test_a_strong_low_rank_part_is_taken_out() -> None:
    W = gaussian(128, 256) + 3 * gaussian(128, 8, 1) @ gaussian(8, 256, 2)
    found = decompose(W, SMALL, 8, steps=10)
    assert found.errors[-1] / found.plain < 0.35


def test_rank_zero_is_quantising_alone() -> None:
    W = gaussian(32, 64)
    found = decompose(W, SMALL, 0)
    assert torch.equal(dequantise(found.Q), dequantise(quantise(W, SMALL)))
    assert found.errors == (found.plain,)


def test_equal_weights_change_nothing_and_a_rank_one_fisher_gives_the_weighted_optimum() -> None:
    W = gaussian(24, 64)
    alike, plain = decompose(W, SMALL, 4, 6, torch.ones(24, 64)), decompose(W, SMALL, 4, 6)
    assert torch.equal(alike.L1, plain.L1)
    assert torch.equal(dequantise(alike.Q), dequantise(plain.Q))
    u, v = gaussian(24, 1, 5).abs() + 0.1, gaussian(1, 64, 6).abs() + 0.1
    fisher = u @ v
    found = decompose(W, SMALL, 4, 1, fisher)
    error = float((fisher.sqrt() * (W - found.L1 @ found.L2)).norm())
    tail = torch.linalg.svdvals(fisher.sqrt() * W)[4:]  # Eckart-Young: for rank one, sqrt(F) o is D_r . D_c
    assert error == pytest.approx(float(tail.norm()), rel=1e-4)
    dead = fisher.clone()
    dead[:3] = 0
    assert bool(decompose(W, SMALL, 4, 3, dead).L1.isfinite().all())


def test_what_cannot_be_decomposed_is_said() -> None:
    W = gaussian(8, 16)
    for given_, said in (
        ((W, SMALL, 9), "Rank 9 does not fit a matrix of 8 x 16: use 0 to 8"),
        ((W[None], SMALL, 2), "Only matrices"),
        ((W * math.inf, SMALL, 2), "not finite"),
        ((W, SMALL, 2, 5, torch.ones(16, 8)), "another model"),
        ((W, SMALL, 2, 5, -torch.ones(8, 16)), "not negative"),
        ((W, SMALL, 2, 5, torch.zeros(8, 16)), "zero everywhere"),
    ):
        with pytest.raises(InputError, match=said):
            decompose(*given_)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ allocation


def table(seed: int, choices: list[Configuration]) -> tuple[dict[str, dict[Configuration, float]], dict[str, int]]:
    generator = torch.Generator().manual_seed(seed)
    counts = {name: 4096 * (number + 1) for number, name in enumerate("abc")}
    costs = {
        name: {how: float(torch.rand(1, generator=generator)) * 4.0**-how.bits * counts[name] for how in choices}
        for name in counts
    }
    return costs, counts


@pytest.mark.parametrize("seed", range(4))
def test_the_allocation_is_the_best_of_all_that_fit(seed: int) -> None:
    choices = [Configuration(bits, 8, "bf16", 64, 16) for bits in (2, 3, 4, 8)]
    costs, counts = table(seed, choices)
    total, budget = sum(counts.values()), 3.6
    every = (dict(zip(costs, picked, strict=True)) for picked in itertools.product(choices, repeat=3))
    fitting = [one for one in every
               if sum(8 * how.stored_bytes(counts[name]) for name, how in one.items()) <= budget * total]  # fmt: skip
    best = min(sum(costs[name][how] for name, how in one.items()) for one in fitting)
    found = allocate(costs, counts, budget)
    assert found.cost == pytest.approx(best)
    assert found.bits <= budget
    greedy = allocate(costs, counts, budget, seconds=0)
    assert greedy.bits <= budget


def test_the_front_and_the_limits_of_a_budget() -> None:
    choices = every_configuration()
    matrices = {name: gaussian(64, 256, number) * (1 + 3 * number) for number, name in enumerate("abcd")}
    costs = {n: dict(zip(choices, first_errors(W, choices, 4), strict=True)) for n, W in matrices.items()}
    counts = {name: W.numel() for name, W in matrices.items()}
    sizes = {how: float(how.stored_bytes(counts["a"])) for how in choices}
    front = pareto(costs["a"], sizes)
    for how in choices:
        assert any(sizes[one] <= sizes[how] and costs["a"][one] <= costs["a"][how] for one in front)
    found = allocate(costs, counts, 3.0)
    assert 2.98 <= found.bits <= 3.0
    uniform = [sum(costs[name][how] for name in costs) for how in choices if 8 * sizes[how] <= 3.0 * counts["a"]]
    assert found.cost <= min(uniform)
    assert found.chosen["d"].bits >= found.chosen["a"].bits
    with pytest.raises(InputError, match=r"1\.5 bits per weight is too little: these matrices need at least 2\.\d+"):
        allocate(costs, counts, 1.5)
    with pytest.raises(InputError, match="more than these configurations can use"):
        allocate(costs, counts, 12)


# ------------------------------------------------------------------------------------------------ the layer


@pytest.mark.parametrize("s", [0.25, 1.0, 2.0])
def test_the_layer_with_its_pair_is_the_dense_product(s: float) -> None:
    W, x = gaussian(24, 64), torch.randn(5, 64, requires_grad=True)
    found = decompose(W, SMALL, 4, 5)
    layer = nn.Sequential(NormalFloatLinear(found.Q), nn.LayerNorm(24)).requires_grad_(False)
    codes = layer[0].codes.clone()
    config = LoraConfig(r=4, lora_alpha=int(4 * s) or 1, target_modules=["0"])
    wrapped = get_peft_model(layer, config)  # type: ignore[arg-type]
    lora = wrapped.base_model.model[0]
    assert lora.scaling["default"] == s
    with torch.no_grad():
        lora.lora_A["default"].weight.copy_(found.L2 / math.sqrt(s))
        lora.lora_B["default"].weight.copy_(found.L1 / math.sqrt(s))
    dense = dequantise(found.Q) + found.L1 @ found.L2
    y = lora(x)
    assert torch.allclose(y, x @ dense.T, atol=1e-5)
    y.sum().backward()
    assert torch.allclose(x.grad, torch.ones(5, 24) @ dense, atol=1e-4)  # type: ignore[arg-type]
    learning = [p for p in wrapped.parameters() if p.requires_grad]
    assert len(learning) == 2
    torch.optim.SGD(learning, lr=0.1).step()
    assert torch.equal(lora.get_base_layer().codes, codes)
    with pytest.raises(AttributeError):  # PEFT's own merge fails aloud
        lora.merge()
    assert backends.merge(lora) < 3


def test_the_layer_keeps_its_numbers_wherever_it_goes() -> None:
    found = decompose(gaussian(24, 64), SMALL, 4, 5)
    layer = NormalFloatLinear(found.Q, torch.zeros(24), (found.L2, found.L1))
    dense = dequantise(found.Q) + found.L1 @ found.L2
    assert torch.allclose(plain_weight(layer), dense, atol=1e-6)
    assert storage(layer) == "nf3 with a low-rank part"
    assert stored_bytes(NormalFloatLinear(found.Q)) == found.Q.nbytes
    half = layer.to(torch.bfloat16)
    assert half.super_scales.dtype == torch.float32
    assert torch.allclose(plain_weight(half), dense, atol=1e-6)
    assert half(torch.ones(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    x = torch.randn(3, 64, requires_grad=True)
    y = layer.float()(x)
    saved = y.grad_fn.next_functions[0][0] if y.grad_fn.name() != "_ProductBackward" else y.grad_fn  # type: ignore[union-attr]
    assert not getattr(saved, "saved_tensors", ())
    other = NormalFloatLinear(quantise(torch.zeros(24, 64), SMALL), torch.zeros(24), (found.L2 * 0, found.L1 * 0))
    other.load_state_dict(layer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), layer.buffers(), strict=True))
