"""ICM-LoRA: flattening and gauges by algebra, the loss by torch's distributions and finite differences, the file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributions import Normal, kl_divergence

from adapters.errors import Cancelled, FamilyError, InputError
from adapters.formats import LoraFile, LoraLayer, read, write_peft
from adapters.generation.conditional_vae import build, kl, parameters
from adapters.generation.flat_lora import LoraCodec, aligned, balanced, in_gauge
from adapters.generation.icm_lora import (
    Generator,
    denormalised,
    fit,
    loss,
    normalised,
    task_vector,
    tensor_statistics,
    untold,
)
from adapters.generation.settings import Settings
from adapters.progress import Progress

SETTINGS = Settings(hidden=48, latent=8, steps=250, batch=8, learning_rate=3e-3)


def layer(seed: int, A: tuple[int, ...] = (2, 6), B: tuple[int, ...] = (5, 2), **more) -> LoraLayer:
    g = torch.Generator().manual_seed(seed)
    return LoraLayer(torch.randn(A, generator=g), torch.randn(B, generator=g), more.pop("alpha", 4.0), **more)


def lora(seed: int, base: str = "tiny") -> LoraFile:
    layers = {"layers.0.q": layer(seed), "layers.0.conv": layer(seed + 1, (2, 3, 3, 3), (4, 2, 1, 1))}
    return LoraFile({"model": layers}, config={"base_model_name_or_path": base})


def near(file: LoraFile, seed: int, noise: float = 0.02) -> LoraFile:
    """A snapshot: the LoRA with a little noise."""
    g = torch.Generator().manual_seed(seed)

    def moved(x):
        return x + noise * torch.randn(x.shape, generator=g)

    layers = {module: replace(one, A=moved(one.A), B=moved(one.B)) for module, one in file.parts["model"].items()}
    return replace(file, parts={"model": layers})


@pytest.fixture(scope="module")
def tasks():
    snapshots = {f"task{t}": [near(lora(10 * t), 100 * t + i) for i in range(6)] for t in range(3)}
    g = torch.Generator().manual_seed(5)
    return snapshots, {name: torch.randn(7, generator=g) for name in snapshots}


@pytest.fixture(scope="module")
def generator(tasks):
    return fit(*tasks, SETTINGS)


# ---------------------------------------------------------------- vectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("embedding", [False, True])
def test_flatten_and_unflatten_are_inverse(dtype, embedding):
    layers = {
        f"m{i}": layer(i, (r, *rest), (3 + i, r, *([1] * (len(rest) - 1))), alpha=1.5 * r, rslora=True,
                       embedding=embedding)
        for i, (r, rest) in enumerate([(1, (4,)), (3, (2, 3, 3)), (4, (5, 1, 1)), (2, (7,))])
    }  # fmt: skip
    layers = {name: replace(one, A=one.A.to(dtype), B=one.B.to(dtype)) for name, one in layers.items()}
    file = LoraFile({"unet": layers, "text_encoder": {"x": layers["m0"]}})
    codec = LoraCodec.from_dict(LoraCodec.of(file).to_dict())
    assert codec.size == file.parameters()
    back = codec.unflatten(codec.flatten(file))
    assert [(c, m) for c, m, _ in back.layers()] == [(c, m) for c, m, _ in file.layers()]
    for (_, _, one), (_, _, two) in zip(file.layers(), back.layers(), strict=True):
        assert one.A.dtype == two.A.dtype
        assert torch.equal(one.A, two.A)
        assert torch.equal(one.B, two.B)
        assert (one.scale, one.rslora, one.embedding) == (two.scale, two.rslora, two.embedding)
    turned = LoraFile({"text_encoder": {"x": layers["m0"]}, "unet": dict(reversed(layers.items()))})
    assert torch.equal(codec.flatten(turned), codec.flatten(file))


@pytest.mark.parametrize("shapes", [((4, 6), (5, 4)), ((4, 3, 3, 3), (5, 4, 1, 1))])
def test_gauges_keep_the_update_and_undo_permutation_sign_and_scale(shapes):
    one = layer(3, *shapes)
    order, signs = torch.tensor([2, 0, 3, 1]), torch.tensor([1.0, -1, -1, 1])
    t = torch.tensor([0.3, 2, 1, 5]) * signs
    A, B = one.A[order], one.B[:, order]
    other = replace(one, A=A * t.reshape(-1, *[1] * (A.ndim - 1)), B=B / t.reshape(1, -1, *[1] * (B.ndim - 2)))
    plain = balanced(one)
    again = aligned(balanced(other), plain)
    for made in (plain, again):
        torch.testing.assert_close(made.delta(), one.delta(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made.A.flatten(1).norm(dim=1), made.B.flatten(1).norm(dim=0))
    torch.testing.assert_close(again.A, plain.A, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.B, plain.B, rtol=1e-5, atol=1e-5)
    dead = balanced(replace(one, B=torch.zeros_like(one.B)))
    assert dead.A.isfinite().all()
    assert not dead.B.any()


def test_normalisation_is_per_tensor_and_inverse(tasks):
    codec = LoraCodec.of(lora(0))
    x = torch.stack([codec.flatten(file) for own in tasks[0].values() for file in own])
    statistics = tensor_statistics(x, codec)
    y = normalised(x, statistics, codec)
    for part in y.split([length for _, length in codec.tensors()], 1):
        assert abs(float(part.mean())) < 1e-5
        assert abs(float(part.std(correction=0)) - 1) < 1e-5
    torch.testing.assert_close(denormalised(y, statistics, codec), x, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- network and loss


def test_the_authors_layout_has_their_number_of_parameters():
    assert parameters("conv", 1_929_928, 768, 256, 0) == 7_508_369


def test_the_authors_layout_halves_twelve_times_and_doubles_twelve_times():
    network = build("conv", 2 * 4096, 5, 4, 0).eval()
    x, shapes = torch.randn(3, 1, 8192), []
    for part in network.encoder:
        x = part(x)
        if isinstance(part, nn.Conv1d):
            shapes.append(tuple(x.shape[1:]))
    channels = (8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8)
    assert shapes == [(width, 4096 >> step) for step, width in enumerate(channels)]
    assert x.shape == (3, 256)
    x, shapes = network.spread(torch.randn(3, 9)).unflatten(1, (8, 2)), []
    for part in network.decoder:
        x = part(x)
        if isinstance(part, nn.ConvTranspose1d | nn.Conv1d):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [*((width, 4 << step) for step, width in enumerate((*channels[-2::-1], 8))), (1, 8192)]


def test_convolutions_never_show_the_padding():
    network = build("conv", 100, 3, 4, 0)
    decoded, mu, logvar = network(torch.randn(2, 100), torch.randn(2, 3), torch.randn(2, 4))
    assert network.padded == 4096
    assert decoded.shape == (2, 100)
    assert mu.shape == logvar.shape == (2, 4)


def test_kl_is_torchs():
    mu, logvar = torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(kl(mu, logvar), kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)))


def test_loss_is_its_formula_and_its_gradient_that_of_differences():
    network = build("mlp", 6, 2, 3, 5).double()
    x, c, e = (torch.randn(4, n, dtype=torch.float64) for n in (6, 2, 3))
    value, mse = loss(network, x, c, e, 0.3)[:2]
    mu, logvar = network.encode(x, c)
    decoded = network.decode(mu + (logvar / 2).exp() * e, c)
    torch.testing.assert_close(value, (decoded - x).square().mean() + 0.3 * kl(mu, logvar).sum(1).mean())
    assert (loss(network, x, c, e, 1.0, free_bits=100.0)[0] - mse).item() == pytest.approx(300)
    value.backward()
    weight = network.mu.weight
    for place in ((0, 0), (2, 4)):
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                weight[place] += step
                ends.append(loss(network, x, c, e, 0.3)[0].item())
                weight[place] -= step
        assert float(weight.grad[place]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-7)
    with torch.no_grad():  # a decoder that gives x leaves the KL alone
        network.decoder[-1].weight.zero_()
        network.decoder[-1].bias.copy_(x[0])
    assert loss(network, x[:1], c[:1], e[:1], 1.0)[1].item() == 0


# ---------------------------------------------------------------- training and generating


def test_each_task_gets_its_own_lora(tasks, generator):
    snapshots, vectors = tasks
    codec = generator.codec
    first = in_gauge(snapshots["task0"][0], "balanced")
    means = {
        name: torch.stack([codec.flatten(in_gauge(one, "aligned", first)) for one in own]).mean(0)
        for name, own in snapshots.items()
    }
    for name, mean in means.items():
        made = codec.flatten(generator.generate(name, seed=1))
        distances = {other: float((made - x).norm() / x.norm()) for other, x in means.items()}
        assert distances[name] < 0.1
        assert min(d for other, d in distances.items() if other != name) > 0.5
        assert torch.equal(made, codec.flatten(generator.generate(vectors[name], seed=1)))
        exact = float((codec.flatten(generator.generate(name, temperature=0)) - mean).norm() / mean.norm())
        told = generator.figures["tasks"][name]
        assert told["error"] == pytest.approx(exact, rel=1e-4)
        assert told["mean_error"] > 0.5
    assert not torch.equal(codec.flatten(generator.generate("task0", 1)), codec.flatten(generator.generate("task0", 2)))


def test_a_generator_that_ignores_the_vector_is_told(tasks, generator):
    assert untold(generator.figures) == []
    same = {name: torch.zeros(7) for name in tasks[0]}
    assert untold(fit(tasks[0], same, SETTINGS).figures) == ["task0", "task1", "task2"]


class StopAt:
    def __init__(self, step: int) -> None:
        self.step, self.seen = step, 0

    def report(self, progress: Progress) -> None:
        self.seen = progress.step

    def cancelled(self) -> bool:
        return self.seen >= self.step


def test_a_stopped_training_goes_on_exactly(tasks, tmp_path):
    settings, state = replace(SETTINGS, steps=20, warm_up=10), tmp_path / "state.pt"
    whole = fit(*tasks, settings)
    with pytest.raises(Cancelled):
        fit(*tasks, settings, StopAt(7), state)
    monitor = StopAt(99)
    resumed = fit(*tasks, settings, monitor, state)
    for one, two in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(InputError, match="another training"):
        fit(*tasks, replace(settings, seed=1), checkpoint=state)


def test_a_generator_file_gives_the_same_lora(generator, tmp_path):
    again = Generator.load(generator.save(tmp_path / "icm.safetensors"))
    assert again.settings == generator.settings
    assert again.figures == generator.figures
    one, two = generator.generate("task1", 3), again.generate("task1", 3)
    assert torch.equal(generator.codec.flatten(one), again.codec.flatten(two))
    assert two.config["base_model_name_or_path"] == "tiny"
    assert "icm-lora" in two.metadata["generated_by"]


def test_statistics_of_a_reference_and_the_authors_layout(tasks, tmp_path):
    settings = replace(SETTINGS, arch="conv", normalise="reference", steps=2, batch=8)
    made = fit(*tasks, settings)
    made = Generator.load(made.save(tmp_path / "conv.safetensors"))
    with pytest.raises(InputError, match="give a LoRA"):
        made.generate("task0")
    reference = tasks[0]["task0"][-1]
    file = made.generate("task0", reference=reference)
    assert file.parameters() == reference.parameters()
    flat = made.codec.flatten(file)
    assert flat.isfinite().all()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.v(self.q(x))


def test_peft_loads_what_was_generated(tmp_path):
    """Snapshots that PEFT wrote, and PEFT's own output with the generated LoRA against base + s B A."""
    torch.manual_seed(0)
    snapshots: dict[str, list[LoraFile]] = {"a": [], "b": []}
    for name, own in snapshots.items():
        for i in range(2):
            model = get_peft_model(Small(), LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["q", "v"]))
            for key, value in model.named_parameters():
                if "lora_B" in key:
                    nn.init.normal_(value)
            model.save_pretrained(tmp_path / f"{name}{i}")
            own.append(read(tmp_path / f"{name}{i}"))
    made = fit(snapshots, {"a": torch.ones(4), "b": -torch.ones(4)}, replace(SETTINGS, steps=5)).generate("a")
    base = Small()
    x = torch.randn(3, 6)
    W = {name: getattr(base, name).weight + made.parts["model"][name].delta() for name in ("q", "v")}
    wanted = (x @ W["q"].T + base.q.bias) @ W["v"].T + base.v.bias
    loaded = PeftModel.from_pretrained(base, write_peft(made, tmp_path / "made"))
    torch.testing.assert_close(loaded(x), wanted, rtol=1e-5, atol=1e-5)
    assert loaded.peft_config["default"].r == 2
    assert loaded.peft_config["default"].use_rslora


def test_a_tasks_vector_is_the_mean_hidden_state():
    from transformers import BatchEncoding, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    model = LlamaModel(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    ).eval()

    def tokenizer(text, return_tensors):
        return BatchEncoding({"input_ids": torch.tensor([[ord(letter) % 32 for letter in text]], dtype=torch.long)})

    texts = ["abc", "hello"]
    states = [model(**tokenizer(text, "pt")).last_hidden_state[0] for text in texts]
    torch.testing.assert_close(task_vector(model, tokenizer, texts), (states[0][-1] + states[1][-1]) / 2)
    mean = task_vector(model, tokenizer, texts, position="mean")
    torch.testing.assert_close(mean, (states[0].mean(0) + states[1].mean(0)) / 2)
    shown = task_vector(model, tokenizer, texts, shots=1)
    torch.testing.assert_close(shown, task_vector(model, tokenizer, ["hello\nabc", "abc\nhello"]))
    with pytest.raises(InputError, match="shots must be 0 to 1 with 2 examples"):
        task_vector(model, tokenizer, texts, shots=2)
    for examples, layer_, message in (([], -1, "at least one"), (["", "a"], -1, "empty"), (["a"], 9, "0 to 2")):
        with pytest.raises(InputError, match=message):
            task_vector(model, tokenizer, examples, layer_)


# ---------------------------------------------------------------- wrong input


def _changed(**to) -> LoraFile:
    file = lora(0)
    return replace(file, parts={"model": {**file.parts["model"], **to}})


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        (_changed(**{"layers.0.q": layer(0, (2, 8), (5, 2))}), InputError, r"differs in 'model.layers.0.q'.*\(2, 8\)"),
        (_changed(**{"layers.0.q": layer(0, (3, 6), (5, 3))}), InputError, "same shapes, rank and alpha"),
        (_changed(**{"layers.0.q": layer(0, alpha=8.0)}), InputError, "alpha 8"),
        (_changed(more=layer(0)), InputError, "'model.more' is in only one"),
        (_changed(**{"layers.0.q": replace(layer(0), A=torch.full((2, 6), torch.nan))}), InputError, "not finite"),
        (_changed(**{"layers.0.q": layer(0, magnitude=torch.ones(5))}), InputError, "DoRA"),
        (lora(0, base="huge"), FamilyError, "'huge'.*'tiny'"),
    ],
    ids=["shape", "rank", "alpha", "layers", "nan", "dora", "base"],
)  # fmt: skip
def test_snapshots_that_do_not_belong_together_are_refused(tasks, file, error, message):
    snapshots, vectors = tasks
    with pytest.raises(error, match=message):
        fit({**snapshots, "task1": [snapshots["task1"][0], file]}, vectors, SETTINGS)


def test_too_little_or_useless_data_is_refused(tasks):
    snapshots, vectors = tasks
    one = {"task0": snapshots["task0"]}, {"task0": vectors["task0"]}
    zero = _changed(**{"layers.0.q": replace(layer(0), B=torch.zeros(5, 2))})
    for given, told, more, message in (
        (*one, {}, "two tasks or more, got 1"),
        ({**snapshots, "task1": snapshots["task1"][:1]}, vectors, {}, "'task1' has 1 snapshots"),
        (snapshots, one[1], {}, "'task1' has only one"),
        (snapshots, {**vectors, "task1": torch.ones(3)}, {}, r"'task1' has the shape \(3,\)"),
        (snapshots, {**vectors, "task1": torch.full((7,), torch.inf)}, {}, "not finite"),
        ({"a": [zero, zero], "b": [zero, zero]}, {"a": torch.ones(1), "b": torch.zeros(1)}, {}, r"layers.0.q.B' has"),
        (snapshots, vectors, {"memory": 1000}, "GiB of memory"),
    ):
        with pytest.raises(InputError, match=message):
            fit(given, told, SETTINGS, **more)
    fit(*one, replace(SETTINGS, steps=1, single_task=True))
    for wrong in (
        {"latent": 0}, {"kld_weight": -1.0}, {"arch": "gan"}, {"learning_rate": 0.0}, {"batch": 1},
        {"arch": "conv", "batch": 2},
    ):  # fmt: skip
        with pytest.raises(InputError):
            Settings(**wrong)


def test_generating_refuses_what_it_does_not_know(generator, tmp_path):
    for task, more, message in (
        ("task9", {}, "did you mean 'task0'|knows task0"),
        (torch.ones(3), {}, "expected"),
        (torch.full((7,), torch.nan), {}, "not finite"),
        ("task0", {"base": "other"}, "for the base 'other', .*for 'tiny'"),
        ("task0", {"reference": lora(0)}, "leave the reference out"),
        ("task0", {"temperature": -1.0}, "temperature"),
    ):
        with pytest.raises(InputError, match=message):
            generator.generate(task, **more)
    path = generator.save(tmp_path / "icm.safetensors")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="not a readable"):
        Generator.load(path)
    write_peft(lora(0), tmp_path / "plain")
    with pytest.raises(InputError, match="is no generator"):
        Generator.load(tmp_path / "plain" / "adapter_model.safetensors")
