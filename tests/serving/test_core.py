"""Pages, host store, admission and dispatch: invariants, and equality with PEFT adapter by adapter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from adapters.errors import FamilyError, InputError, MissingDependencyError
from adapters.formats.lora import MODEL, LoraLayer
from adapters.serving.admission import Demand, peak
from adapters.serving.dispatch import BatchPlan, LoraDispatch
from adapters.serving.kernels import kernel
from adapters.serving.packing import pack, pages_of
from adapters.serving.pool import PagePool
from adapters.serving.store import AdapterStore
from pipelines.language.adapters import read_fitting


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), max_size=40))
def test_pages_are_conserved(steps):
    """Any order of taking and giving back: each page is free or owned once, the page of zeros by nobody."""
    pool = PagePool(30, 4)
    held: dict[int, int] = {}
    for who, count in steps:
        owner = ("kv" if who % 2 else "adapter", who)
        if count == 0:
            assert pool.free(owner) == held.pop(who, 0)
            continue
        ids = pool.alloc(count, owner)
        assert (ids is None) == (sum(held.values()) + count > 29)
        if ids is not None:
            held[who] = held.get(who, 0) + count
            pool.pages[torch.from_numpy(ids)] = 1.0
        pool.check()
        stats = pool.stats()
        assert stats.kv + stats.adapter + stats.free == stats.total == 29
        assert pool.held(owner) == held.get(who, 0)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 15), st.integers(0, 6), st.integers(1, 3)),
                min_size=1, max_size=6), st.data())  # fmt: skip
def test_no_course_of_events_needs_more_pages_than_admission_counts(requests, data):
    """Requests that start late and end early: a simulation never exceeds the bound, and lock-step reaches it."""
    demands = [Demand(c, m, d, w) for c, m, d, w in requests]
    start = [data.draw(st.integers(0, one.delay)) for one in demands]
    length = [data.draw(st.integers(1, one.remaining)) for one in demands]
    for t in range(40):
        used = 0
        for one, begin, end in zip(demands, start, length, strict=True):
            generated = max(0, t - begin)
            if generated <= end:
                used += one.pages * (one.cached + generated)
        assert used <= peak(demands)
    lockstep = [Demand(c, m) for c, m, _, _ in requests]
    ordered = sorted(lockstep, key=lambda one: -one.remaining)
    paper = max(one.remaining * (j + 1) + sum(other.cached for other in ordered[: j + 1])
                for j, one in enumerate(ordered))  # fmt: skip
    assert peak(lockstep) == paper
    assert peak([]) == 0


def layers(seed: int, rank: int, model: nn.Module, targets: tuple[str, ...] = ("0", "1")) -> dict[str, LoraLayer]:
    torch.manual_seed(seed)
    found = {}
    for name in targets:
        module = model.get_submodule(name)
        found[name] = LoraLayer(torch.randn(rank, module.in_features), torch.randn(module.out_features, rank), 3.0)
    return found


def test_idle_adapters_leave_when_their_pages_are_needed_and_used_ones_stay():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    pool = PagePool(101, 4)
    store = AdapterStore(pool)
    packed = pack([(layers(0, 2, model), 1.0)], model, 4)  # 2 (2 + 2) + 2 (2 + 1) = 14 pages
    assert packed.count == 14 == sum(2 * (pages_of(place.inputs, 4) + pages_of(place.outputs, 4))
                                     for place in packed.places.values())  # fmt: skip
    store.add("pinned", packed, pinned=True)
    for name in "abcdef":
        store.add(name, packed)
    for name in "abc":
        assert store.acquire(name) is not None
    store.release("a")
    store.release("b")
    assert store.acquire("a") is not None  # so b is the one used longest ago
    store.release("a")
    assert store.prefetch("d")
    assert store.prefetch("e")
    assert store.resident == ["pinned", "b", "c", "a", "d", "e"] or set(store.resident) == set("bcade") | {"pinned"}
    assert pool.free_pages == 100 - 6 * 14
    assert not store.prefetch("f") or pool.free_pages >= 0
    assert store.make_room(40)
    assert "b" not in store.resident
    assert {"c", "pinned"} <= set(store.resident)
    assert not store.make_room(90)  # the pinned one and c stay, and nothing is dropped in vain
    store.remove("c")
    assert "c" not in store
    assert store.users("c") == 1
    with pytest.raises(InputError, match="still used by running requests"):
        store.add("c", packed)
    store.release("c")
    store.add("c", packed)
    pool.check()
    with pytest.raises(InputError, match="'c' is loaded already"):
        store.add("c", packed)
    with pytest.raises(InputError, match="'zzz' is not loaded"):
        store.remove("zzz")
    with pytest.raises(InputError, match="more than the 5 of the pool"):
        AdapterStore(PagePool(6, 4)).add("a", packed)


def test_a_thousand_loads_and_unloads_leave_the_pool_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    pool = PagePool(60, 4)
    store = AdapterStore(pool)
    packed = [pack([(layers(seed, 1 + seed, model), 1.0)], model, 4) for seed in range(4)]
    for number in range(1000):
        store.add(number, packed[number % 4])
        assert store.acquire(number) is not None
        store.release(number)
        if number >= 3:
            store.remove(number - 3)
    pool.check()
    for number in (997, 998, 999):
        store.remove(number)
    pool.check()
    assert pool.free_pages == pool.total
    assert len(store) == 0


def outputs(base: Path, several: dict[str, Path], backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a batch of rows with different adapters, ours and PEFT's one by one."""
    names = [None, *several]
    torch.manual_seed(0)
    ids = torch.randint(6, 200, (len(names), 5))
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    pool = PagePool(6000, 32)
    store = AdapterStore(pool)
    dispatch = LoraDispatch(model, pool, backend)
    resident = {}
    for name, path in several.items():
        file = read_fitting(path, model)
        store.add(name, pack([(file.parts[MODEL], 1.0)], model, 32, name=name))
        resident[name] = store.acquire(name)
        dispatch.watch(file.parts[MODEL])
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [resident.get(names[number]) for number in order for _ in range(5)]
    with torch.no_grad(), dispatch.planned(BatchPlan(rows, pool)):
        found = model(input_ids=ids[order]).logits
    found = found[torch.tensor(order).argsort()]
    wanted = []
    for row, name in zip(ids, names, strict=True):
        plain = AutoModelForCausalLM.from_pretrained(base).eval()
        plain = PeftModel.from_pretrained(plain, several[name]).eval() if name else plain
        with torch.no_grad():
            wanted.append(plain(input_ids=row[None]).logits[0])
    pool.check()
    dispatch.close()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids[:1]).logits[0], wanted[0])
    return found, torch.stack(wanted)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_every_token_gets_its_own_adapter_as_with_peft(base, several, backend):
    """Ranks, targets, scales, rank and alpha patterns, rsLoRA, DoRA, embeddings and output layer, in one batch."""
    found, wanted = outputs(base, several, backend)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_segments_of_any_length_are_the_same_in_every_way_of_computing():
    """One token, many, filled up, grouped; several adapters of one rank; fp32 and bf16."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        pool = PagePool(2000, 24, dtype)
        store = AdapterStore(pool)
        held = []
        for number, rank in enumerate((8, 8, 8, 3, 16)):
            store.add(number, pack([(layers(number, rank, model), 1.0)], model, 24, dtype))
            held.append(store.acquire(number))
        for lengths in ((1, 1, 1, 1, 1), (1, 40, 2, 5, 1), (4, 5, 6, 0, 0), (0, 0, 7, 7, 7)):
            rows = [one for one, length in zip(held, lengths, strict=True) for _ in range(length)]
            rows.insert(1, None)
            x = torch.randn(len(rows), 32).to(dtype)
            made = []
            for backend in ("reference", "torch"):
                y = torch.ones(len(rows), 16, dtype=dtype)
                for group in BatchPlan(rows, pool).groups("0"):
                    y = torch.ones(len(rows), 32, dtype=dtype) if y.shape[1] == 16 else y
                    kernel(backend, torch.device("cpu"))(x, y, group, pool)
                made.append(y.float())
            assert torch.allclose(made[0], made[1], rtol=bound, atol=bound * float(made[0].abs().max()))
            assert torch.equal(made[1][1], torch.ones(32))


def test_adapters_at_strengths_add_up_like_the_sum_of_their_updates(base, several):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    files = {name: read_fitting(several[name], model).parts[MODEL] for name in ("small", "large")}
    pool = PagePool(3000, 32)
    store = AdapterStore(pool)
    store.add("both", pack([(files["small"], 0.5), (files["large"], -2.0)], model, 32))
    dispatch = LoraDispatch(model, pool)
    dispatch.watch(files["large"])
    ids = torch.tensor([[10, 20, 30]])
    with torch.no_grad(), dispatch.planned(BatchPlan([store.acquire("both")] * 3, pool)):
        found = model(input_ids=ids).logits
    dispatch.close()
    for name, strength in (("small", 0.5), ("large", -2.0)):
        for path, layer in files[name].items():
            model.get_submodule(path).weight.data += strength * layer.delta()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, found, atol=1e-4)


def test_what_cannot_be_packed_is_refused(base, several, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    file = read_fitting(several["large"], model).parts[MODEL]
    with pytest.raises(InputError, match=r"rank 8 in .* above the largest that is served, 4"):
        pack([(file, 1.0)], model, 32, max_rank=4)
    with pytest.raises(FamilyError, match="which this base lacks"):
        pack([({"model.nowhere": next(iter(file.values()))}, 1.0)], model, 32)
    with pytest.raises(InputError, match="too large"):
        pack([(file, 1e39)], model, 32, torch.float16)
    with pytest.raises(InputError, match="did you mean 'torch'"):
        kernel("tosh", torch.device("cpu"))
    if importlib.util.find_spec("triton") is None:
        with pytest.raises(MissingDependencyError, match=r"adapter-studio\[triton\]"):
            kernel("triton", torch.device("cpu"))


def test_the_triton_kernels_agree_with_peft_under_the_interpreter(base, several):
    """In a process of its own: the interpreter is chosen when triton is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'adapter-studio[triton]'")
    program = (
        "import sys, torch; from pathlib import Path; from tests.serving.test_core import outputs\n"
        "torch.set_num_threads(1)\n"
        "paths = {one.split('=')[0]: Path(one.split('=')[1]) for one in sys.argv[2:]}\n"
        "found, wanted = outputs(Path(sys.argv[1]), paths, 'triton')\n"
        "assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()"
    )
    chosen = [f"{name}={several[name]}" for name in ("small", "patterns", "dora")]
    done = subprocess.run(
        [sys.executable, "-c", program, str(base), *chosen], env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
