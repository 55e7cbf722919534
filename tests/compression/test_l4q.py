"""L4Q: gradients against autograd, the start, the integer path in ours and torch's format, a training to its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from adapters.compression import L4Q_FILE
from adapters.compression.l4q import (
    FakeQuantised,
    Grid,
    IntegerLinear,
    codes_of,
    from_torch_int4,
    integer_parts,
    merged,
    start,
    to_torch_int4,
    torch_int4,
    values_of,
)
from adapters.compression.storage import storage, stored_bytes
from adapters.errors import InputError
from adapters.learn.l4q import L4QLinear, attach
from adapters.progress import Silent
from pipelines.language import compressed
from pipelines.language.loading import open_model
from studio import library
from studio.compression import ready
from studio.compression.estimate import of_l4q
from studio.compression.methods import l4q as job
from studio.compression.schema import CompressL4qConfig
from studio.conversation import Question, Variant
from studio.conversation.session import Session
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.tasks.language import run as train
from tests.language import tiny
from tests.language.conftest import Watcher, settings, write_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _own_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(home))
    torch.set_num_threads(1)


def values(dtype: torch.dtype = torch.float64, bits: int = 3, shrink: float = 0.6) -> dict[str, Any]:
    """A layer with clipped entries (steps shrunk) and offsets."""
    generator = torch.Generator().manual_seed(bits)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    grid = Grid(bits, 8)
    W0, A, B = random(12, 32), random(4, 32), random(12, 4) * 0.3
    step, _ = start(merged(W0, A, B, 0.7), grid)
    made = {"x": random(2, 5, 32), "A": A, "B": B, "step": step.double() * shrink, "zero": random(12, 4) * 0.05}
    return {"W0": W0.to(dtype), "s": 0.7, "grid": grid, **{k: v.to(dtype).requires_grad_() for k, v in made.items()}}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shrink", [0.6, 1.5])
def test_gradients_are_those_of_autograd_straight_through_the_rounding(bits: int, shrink: float) -> None:
    v = values(bits=bits, shrink=shrink)
    grid: Grid = v["grid"]
    w = ((v["W0"] + v["s"] * v["B"] @ v["A"]).view(12, 4, 8) - v["zero"][..., None]) / v["step"][..., None]
    c = w.clamp(grid.low, grid.high)
    q = c + (c.round() - c).detach()
    Wq = (q * v["step"][..., None] + v["zero"][..., None]).view(12, 32)
    outside = float((w != c).double().mean())
    assert outside > 0.05 if shrink < 1 else outside < 0.05
    expected = v["x"] @ Wq.T
    learnt = [v[name] for name in ("x", "A", "B", "step", "zero")]
    g = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, learnt, g)
    found = FakeQuantised.apply(v["x"], v["W0"], v["A"], v["B"], v["step"], v["zero"], v["s"], grid, 1.0)
    assert torch.allclose(found, expected, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(found, learnt, g), wanted, strict=True):
        assert float((mine - theirs).abs().max()) <= 1e-10
    scaled = FakeQuantised.apply(v["x"], v["W0"], v["A"], v["B"], v["step"], v["zero"], v["s"], grid, 0.25)
    for mine, theirs, factor in zip(torch.autograd.grad(scaled, learnt, g), wanted, (1, 1, 1, 4, 4), strict=True):
        assert torch.allclose(mine * factor, theirs, atol=1e-10)


def test_nothing_of_the_weights_size_is_kept_but_the_weight() -> None:
    v = values(torch.float32)
    y = FakeQuantised.apply(v["x"], v["W0"], v["A"], v["B"], v["step"], v["zero"], v["s"], v["grid"], 1.0)
    large = [t for t in y.grad_fn.saved_tensors if t.shape == v["W0"].shape]
    assert [t.data_ptr() for t in large] == [v["W0"].data_ptr()]
    with torch.no_grad():
        v["B"].add_(1.0)  # the backward pass would compute another w
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_start_clips_nothing_and_is_rounding_to_nearest(bits: int) -> None:
    W, grid = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), Grid(bits, 16)
    step, zero = start(W, grid)
    codes = codes_of(W, step, zero, grid)
    off = (W - values_of(codes, step, zero, grid)).view(6, 4, 16)
    assert bool((off.abs() <= step[..., None] / 2 * 1.0001).all())
    for row in range(6):  # round-to-nearest, a slow loop
        for group in range(4):
            block = W[row, group * 16 : group * 16 + 16]
            S = max(abs(float(block.min()) / grid.low), abs(float(block.max()) / grid.high))
            assert float(step[row, group]) == pytest.approx(S, rel=1e-6)
    parts = integer_parts(W, step, zero, grid)
    layer = IntegerLinear(parts, (6, 64), grid)
    assert torch.equal(layer.numbers, codes)
    assert stored_bytes(layer) == grid.stored_bytes(6, 64) == 6 * 64 * bits / 8 + 8 * 6 * 4
    assert Grid.parse(str(grid)) == grid
    x = torch.randn(3, 64, requires_grad=True)
    y = FakeQuantised.apply(x, W, torch.zeros(2, 64), torch.zeros(6, 2), step, zero, 1.0, grid, 1.0)
    assert torch.allclose(layer(x), y, atol=1e-5)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dequantise().sum(0).expand(3, 64), atol=1e-5)  # type: ignore[arg-type]
    assert layer.to(torch.bfloat16).step.dtype == torch.float32


def test_torchs_int4_product_computes_the_same_and_comes_back() -> None:
    generator = torch.Generator().manual_seed(1)
    W, grid = torch.randn(32, 128, generator=generator), Grid(4, 64)
    step, zero = start(W, grid)
    zero = zero + torch.randn(zero.shape, generator=generator) * 0.1 * step  # offsets that are no whole numbers
    layer = IntegerLinear(integer_parts(W, step, zero, grid), (32, 128), grid)
    packed, scales = to_torch_int4(layer)
    x = torch.randn(5, 128, generator=generator)
    expected = layer(x)
    assert torch.allclose(torch_int4(x, packed, 64, scales), expected, atol=1e-5 * float(expected.abs().max()))
    again = from_torch_int4(packed, scales, 64)
    assert torch.equal(again.codes, layer.codes)
    assert torch.equal(again.step, layer.step)
    with pytest.raises(InputError, match="4 bits in groups of 32, 64, 128, 256, not int4-16"):
        to_torch_int4(IntegerLinear(integer_parts(W, *start(W, Grid(4, 16)), Grid(4, 16)), (32, 128), Grid(4, 16)))


def test_what_cannot_be_rounded(tmp_path: Path) -> None:
    for wrong in ((1, 8), (9, 8), (4, 0)):
        with pytest.raises(InputError):
            Grid(*wrong)
    with pytest.raises(InputError, match="Groups of 64 do not fill its 96 inputs: use 32"):
        start(torch.zeros(4, 96), Grid(4, 64))
    step, zero = start(torch.randn(4, 64), Grid(4, 64))
    with pytest.raises(InputError, match="positive and finite"):
        integer_parts(torch.zeros(4, 64), -step, zero, Grid(4, 64))
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    for changes, said in (
        ({"dropout": 0.1}, "dropout"), ({"use_dora": True}, "dora"), ({"quantization": "4bit"}, "quantization"),
        ({"init": "pissa"}, "init"), ({"perturb": "ggpo"}, "perturb"), ({"l4q_bits": 1}, "l4q_bits"),
        ({"optimizer": "prodigy"}, "choose adamw or sgd"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            TrainLanguageConfig.parse({"data": str(rows), "l4q_bits": 4} | changes)


def test_output_layers_and_stored_weights_are_not_rounded(home: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    for tied in (True, False):
        base = tiny.llama(tmp_path / f"tied-{tied}", tie_word_embeddings=tied)
        config = settings(base, rows, l4q_bits=4, l4q_group=16, steps=1, target_regex=r".*(q_proj|lm_head)")
        with pytest.raises(InputError, match="leaves the output layer whole"):
            train(config, tmp_path / f"run-{tied}", Watcher())
    grid, W = Grid(4, 16), torch.ones(16, 16)
    stored = nn.Sequential(IntegerLinear(integer_parts(W, *start(W, grid), grid), (16, 16), grid), nn.LayerNorm(16))
    wrapped: Any = get_peft_model(stored, LoraConfig(r=2, target_modules=["0"]))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="l4q rounds ordinary linear layers, not int4"):
        attach(wrapped.base_model.model[0], Grid(4, 16))


@pytest.fixture(scope="module")
def trained(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTER_STUDIO_HOME", str(home))
        base = tiny.llama(home / "tiny")
        rows = write_rows(home / "rows.jsonl", [{"prompt": f"{n}?", "completion": "red"} for n in range(8)])
        config = settings(base, rows, l4q_bits=3, l4q_group=16, steps=6, checkpoint_every=3, rank=4, alpha=8.0,
                          validation_data=str(rows), weight_decay=0.1)  # fmt: skip
        watcher = Watcher()
        folder = tmp_path_factory.mktemp("run")
        result = train(config, folder, watcher)
    return {"base": base, "result": result, "config": config, "folder": folder, "losses": watcher.losses}


def test_a_training_becomes_the_integer_base_that_was_trained(trained: dict[str, Any], tmp_path: Path) -> None:
    base, result = trained["base"], trained["result"]
    assert trained["losses"][-1] < trained["losses"][0]
    asked = CompressL4qConfig.parse({"base": str(base), "adapter": result["adapter"], "name": "whole numbers"})
    ready.l4q(asked)
    made = job.run(asked, tmp_path, Silent())
    expected = of_l4q(asked)
    assert expected.bits == pytest.approx(made["bits"])
    assert expected.base_bytes == made["base_bytes"]
    weights = sum(file.stat().st_size for file in Path(made["path"]).glob("*.safetensors"))
    assert expected.bytes == pytest.approx(weights, rel=0.1)
    assert library.find("whole numbers", "base").notes["compressed"].startswith("l4q, ")
    opened = open_model(made["path"])
    assert storage(opened.model.model.layers[0].self_attn.q_proj) == "int3"
    assert made["bits"] == pytest.approx(3 + 64 / 16)
    samples = [(f"{n}?", "red") for n in range(8)]
    from studio.training.language.data import Collate
    from studio.training.tasks.language import task_for

    task = task_for(trained["config"])
    task.rows()
    batch = Collate(0)(list(task.tokens(opened.tokenizer).shown))
    assert len(batch["input_ids"]) == len(samples)
    with torch.no_grad():
        loss = float(opened.model(**batch).loss)
    assert loss == pytest.approx(result["validation"][-1]["validation_loss"], abs=1e-4)  # fake = integer
    # the LoRA alone is the change before rounding: merging and rounding to nearest gives other numbers
    learnt = job.trained(result["adapter"])
    name = "model.layers.0.self_attn.q_proj"
    Wc = merged(open_model(base).model.get_submodule(name).weight, learnt[f"{name}.A"], learnt[f"{name}.B"],
                float(learnt[f"{name}.scale"]))  # fmt: skip
    assert not torch.equal(start(Wc, Grid(3, 16))[0], learnt[f"{name}.step"])
    assert bool((learnt[f"{name}.step"] > 0).all())
    assert bool(learnt[f"{name}.zero"].any())


def test_the_chat_says_that_the_lora_alone_is_not_rounded(trained: dict[str, Any]) -> None:
    name = trained["result"]["adapter"]
    question = Question(str(trained["base"]), (Variant("x", ((name, 1.0),)),), (({"role": "user", "content": "a"},),),
                        "cpu", "fp32", {"max_tokens": 1})  # fmt: skip
    events = list(Session().ask(question))
    assert any("trained through a rounding" in event.get("text", "") for event in events if event["event"] == "remark")


def test_a_resumed_training_is_the_same(trained: dict[str, Any], tmp_path: Path) -> None:
    config = trained["config"]
    from adapters.errors import Cancelled

    with pytest.raises(Cancelled):
        train(config, tmp_path, Watcher(stop_at=3))
    again = train(config, tmp_path, Silent(), resume=True)
    mine, theirs = job.trained(again["adapter"]), job.trained(trained["result"]["adapter"])
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_another_base_or_adapter_is_refused(trained: dict[str, Any], home: Path, tmp_path: Path) -> None:
    other = tiny.llama(tmp_path / "other", seed=9)
    asked = CompressL4qConfig.parse({"base": str(other), "adapter": trained["result"]["adapter"]})
    with pytest.raises(InputError, match="trained on another model"):
        job.run(asked, tmp_path, Silent())
    plain = train(settings(trained["base"], home / "rows.jsonl", steps=1), tmp_path / "plain", Silent())
    with pytest.raises(InputError, match="not trained through a rounding"):
        job.trained(plain["adapter"])
    assert (Path(trained["result"]["adapter"]) / L4Q_FILE).is_file()
    assert json.loads((Path(trained["result"]["adapter"]) / "adapter_config.json").read_text())["r"] == 4


def test_adapters_off_is_the_whole_base() -> None:
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from adapters.layers.variant import untouched
    from adapters.learn.l4q import attach

    plain = nn.Sequential(nn.Linear(32, 16))
    x = torch.randn(2, 32)
    before = plain(x).detach()
    model: Any = get_peft_model(plain, LoraConfig(r=2, target_modules=["0"]))  # type: ignore[arg-type]
    layer = model.base_model.model[0]
    attach(layer, Grid(2, 16))
    assert isinstance(layer, L4QLinear)
    assert not torch.allclose(model(x), before)
    with untouched(model):
        assert torch.equal(model(x), before)
    with pytest.raises(InputError, match="merged by  studio compress l4q"):
        layer.merge()
    assert compressed.FILE == "compression.json"
