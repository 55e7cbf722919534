"""S2-LoRA: its algebra against dense products and finite sums, its layers against PEFT, its files and its training."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters.errors import FamilyError, InputError
from adapters.formats.peft_directory import write_directory
from adapters.layers import shared, variant
from adapters.learn import s2_lora
from adapters.plugin import Handles, Plugins
from studio.training.schemas.language import TrainLanguageConfig

RANK = 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(self.q_proj(x) * self.k_proj(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.decoder = nn.Module()
        self.encoder.layers = nn.ModuleList([Block(), Block()])
        self.decoder.layers = nn.ModuleList([Block()])

    def forward(self, x):
        for block in (*self.encoder.layers, *self.decoder.layers):
            x = block(x)
        return x


def plain(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def model(share: str = "shape", filled: bool = True, **options) -> PeftModel:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "k_proj", "fc1", "fc2"])
    wrapped = get_peft_model(plain(), config).double()
    s2_lora.share_pairs(wrapped, share, RANK, **options)
    if filled:
        generator = torch.Generator().manual_seed(5)
        for one in s2_lora.shares(wrapped).values():
            one.v.data.copy_(torch.randn(one.v.shape, generator=generator, dtype=torch.float64))
    return wrapped


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ---------------------------------------------------------------- algebra


@pytest.mark.parametrize("blocks", [(1, 1), (3, 1), (1, 3), (2, 3), (3, 2)])
def test_the_product_the_dense_update_and_the_export_agree(blocks):
    A, B = torch.randn(RANK, 5).double(), torch.randn(4, RANK).double()
    v = torch.randn(*blocks, RANK).double()
    v[0, 0, 1] = 0.0
    dense = torch.zeros(4 * blocks[0], 5 * blocks[1]).double()
    for i in range(blocks[0]):
        for j in range(blocks[1]):
            dense[4 * i : 4 * i + 4, 5 * j : 5 * j + 5] = B @ torch.diag(v[i, j]) @ A
    x = torch.randn(2, 7, 5 * blocks[1]).double()
    torch.testing.assert_close(shared.delta(A, B, v), dense)
    torch.testing.assert_close(shared.product(x, A, B, v), x @ dense.T)
    down, up = shared.as_lora(A, B, v)
    torch.testing.assert_close(up @ down, dense)
    order = torch.randperm(RANK)
    torch.testing.assert_close(shared.product(x, A[order], B[:, order], v[..., order]), x @ dense.T)
    if blocks == (1, 1):
        kept = [0, 2]  # as in the paper's form: sqrt|v| in A, its signed root in B
        torch.testing.assert_close(down, v[0, 0, kept].abs().sqrt()[:, None] * A[kept])
        torch.testing.assert_close(up, B[:, kept] * v[0, 0, kept].sign() * v[0, 0, kept].abs().sqrt())


def test_nothing_is_exported_for_zeros():
    down, up = shared.as_lora(torch.randn(2, 5), torch.randn(4, 2), torch.zeros(1, 1, 2))
    assert down.shape == (0, 5)
    assert up.shape == (4, 0)


def test_the_proximal_step_gives_exact_zeros_and_shrinks_the_rest():
    v = torch.tensor([0.5, -0.05, 0.1, -2.0])
    assert shared.soft_threshold(v, 0.1).tolist() == pytest.approx([0.4, 0.0, 0.0, -1.9])
    assert (shared.soft_threshold(v, 0.1)[1:3] == 0).all()


def test_normalising_the_pair_changes_no_update():
    A, B, vs = torch.randn(RANK, 5).double(), torch.randn(4, RANK).double(), [torch.randn(1, 1, RANK).double()] * 1
    before = shared.delta(A, B, vs[0])
    shared.renormalise(A, B, vs)
    torch.testing.assert_close(shared.delta(A, B, vs[0]), before)
    torch.testing.assert_close(A.norm(dim=1), torch.ones(RANK).double())
    torch.testing.assert_close(B.norm(dim=0), torch.ones(RANK).double())


def test_orthonormal_pairs_have_no_deviation_and_small_random_ones_almost_all():
    generator = torch.Generator().manual_seed(0)
    assert float(shared.deviation(*shared.orthonormal((8, 6), 4, generator))) < 1e-10
    assert float(shared.deviation(*shared.gaussian((8, 6), 4, generator))) == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize(
    ("share", "pairs", "coefficients"),
    [("shape", 12 + 18 + 18, 12), ("type", 12 + 12 + 18 + 18, 12), ("type+stack", 2 * (12 + 12 + 18 + 18), 12),
     ("blocks", 12, 3 * (1 + 1 + 2 + 2))],
)  # fmt: skip
def test_the_trained_numbers_are_those_of_the_formula(share, pairs, coefficients):
    wrapped = model(share)
    learnt = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert learnt == RANK * (pairs + coefficients)
    layers = variant.adapted(wrapped)
    found = shared.groups({name: shared_size(layer) for name, layer in layers.items()}, share)
    assert learnt == shared.parameters(found, RANK)


def shared_size(layer):
    return tuple(layer.get_base_layer().weight.shape)


def test_whisper_counts():
    """Whisper-small by arithmetic, as in the specification: 12 + 12 blocks of width 768."""
    attention = [f"encoder.layers.{n}.self_attn.{p}" for n in range(12) for p in ("q", "k", "v", "o")]
    attention += [f"decoder.layers.{n}.{a}.{p}" for n in range(12) for a in ("self", "cross") for p in "qkvo"]
    sizes = dict.fromkeys(attention, (768, 768))
    for stack in ("encoder", "decoder"):
        sizes |= {f"{stack}.layers.{n}.fc1": (3072, 768) for n in range(12)}
        sizes |= {f"{stack}.layers.{n}.fc2": (768, 3072) for n in range(12)}
    assert shared.parameters(shared.groups(sizes, "blocks"), 32) == 59_904
    assert shared.parameters(shared.groups(sizes, "shape"), 32) == 301_056


# ---------------------------------------------------------------- layers in a model


def test_it_starts_as_the_base_to_the_bit_and_the_first_gradient_reaches_the_coefficients_alone():
    wrapped = model(filled=False)
    assert torch.equal(wrapped(X), plain()(X))
    wrapped(X).square().sum().backward()
    assert all(not pair.A.grad.any() and not pair.B.grad.any() for pair in s2_lora.pairs_of(wrapped).values())
    assert all(one.v.grad.any() for one in s2_lora.shares(wrapped).values())


@pytest.mark.parametrize("share", ["shape", "type", "type+stack", "blocks"])
def test_outputs_and_gradients_are_those_of_dense_weights(share):
    """dL/dv_k = b_k^T G a_k, and a pair's gradient is the sum over its weights of B^T G and G A^T parts."""
    wrapped, reference = model(share), plain()
    members, pairs = s2_lora.shares(wrapped), s2_lora.pairs_of(wrapped)
    for name, one in members.items():
        with torch.no_grad():
            reference.get_submodule(name).weight.add_(shared.delta(*one.factors))
    torch.testing.assert_close(wrapped(X), reference(X))
    wrapped(X).square().sum().backward()
    reference(X).square().sum().backward()
    expected = {pair: torch.zeros_like(pair.A) for pair in pairs.values()}
    for name, one in members.items():
        G, (A, B, v) = reference.get_submodule(name).weight.grad, one.factors
        for i, rows in enumerate(G.split(B.shape[0])):
            for j, block in enumerate(rows.split(A.shape[1], dim=1)):
                torch.testing.assert_close(one.v.grad[i, j], torch.einsum("ok,oi,ki->k", B, block, A))
                expected[one.pair] += (B * v[i, j]).T @ block
    for pair in pairs.values():
        torch.testing.assert_close(pair.A.grad, expected[pair])


def test_a_pair_stays_one_through_copies_moves_and_other_adapters():
    wrapped = model()
    for changed in (wrapped, copy.deepcopy(wrapped), copy.deepcopy(wrapped).to(torch.float32).to("cpu")):
        one, other = (s2_lora.shares(changed)[f"encoder.layers.{n}.q_proj"] for n in (0, 1))
        assert one.pair is other.pair is s2_lora.pairs_of(changed)["6x6"]
        assert one.pair.A.data_ptr() == other.pair.A.data_ptr()
    assert len({id(p) for p in wrapped.parameters()}) == len(list(wrapped.parameters()))
    wrapped.add_adapter("second", LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj"]))
    s2_lora.share_pairs(wrapped, "shape", RANK, adapter="second", seed=9)
    assert s2_lora.pairs_of(wrapped, "second")["6x6"] is not s2_lora.pairs_of(wrapped)["6x6"]


def test_types_with_equal_pairs_equal_shapes():
    by_type, by_shape = model("type"), model("shape")
    pairs, own = s2_lora.pairs_of(by_shape), s2_lora.pairs_of(by_type)
    for kind, group in {"q_proj": "6x6", "k_proj": "6x6", "fc1": "12x6", "fc2": "6x12"}.items():
        own[kind].load_state_dict(pairs[group].state_dict())
    torch.testing.assert_close(by_type(X), by_shape(X))


@pytest.mark.parametrize("share", ["shape", "blocks"])
def test_peft_loads_the_exact_export_with_mixed_ranks_and_an_empty_module(share, tmp_path):
    wrapped = model(share)
    members = s2_lora.shares(wrapped)
    with torch.no_grad():
        members["encoder.layers.0.q_proj"].v.zero_()
        members["encoder.layers.1.k_proj"].v[..., 1:] = 0
        members["decoder.layers.0.fc1"].v[0, 0, 0] = 0
    layers = variant.read_layers(wrapped)
    assert "encoder.layers.0.q_proj" not in layers
    assert layers["encoder.layers.1.k_proj"].rank == 1
    assert all(layer.scale == 1 for layer in layers.values())
    write_directory(tmp_path, layers)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    loaded = PeftModel.from_pretrained(plain(), tmp_path).double()
    torch.testing.assert_close(loaded(X), wrapped(X), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loaded.merge_and_unload()(X), wrapped(X), rtol=1e-5, atol=1e-6)
    expected = wrapped(X)
    torch.testing.assert_close(wrapped.merge_and_unload()(X), expected)


def test_the_native_form_keeps_values_and_sharing(tmp_path):
    from safetensors.torch import save_file

    wrapped = model()
    save_file(s2_lora.native(wrapped), tmp_path / s2_lora.WEIGHTS)
    (tmp_path / s2_lora.CONFIG).write_text(json.dumps({"r": RANK, "share": "shape"}))

    def fresh(base):
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "k_proj", "fc1", "fc2"])
        return get_peft_model(base, config).double()

    loaded = fresh(plain())
    s2_lora.load_native(loaded, tmp_path)
    assert torch.equal(loaded(X), wrapped(X))
    one, other = (s2_lora.shares(loaded)[f"encoder.layers.{n}.fc1"] for n in (0, 1))
    assert one.pair.A.data_ptr() == other.pair.A.data_ptr()
    with pytest.raises(FamilyError, match="trained on other base weights"):
        s2_lora.load_native(fresh(plain(seed=1)), tmp_path)
    (tmp_path / s2_lora.CONFIG).write_text(json.dumps({"r": 2, "share": "shape"}))
    with pytest.raises(FamilyError, match="needs"):
        s2_lora.load_native(fresh(plain()), tmp_path)
    (tmp_path / s2_lora.CONFIG).unlink()
    with pytest.raises(InputError, match="no readable"):
        s2_lora.load_native(fresh(plain()), tmp_path)


def test_transposed_layers_share_by_outputs_and_inputs():
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(5, 6), nn.Linear(5, 6), nn.Linear(6, 5)).double()
    wrapped = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"], fan_in_fan_out=True)).double()
    s2_lora.share_pairs(wrapped, "shape", 2)
    assert list(s2_lora.pairs_of(wrapped)) == ["5x6"]
    for one in s2_lora.shares(wrapped).values():
        nn.init.normal_(one.v)
    expected = wrapped(X)
    torch.testing.assert_close(wrapped.merge_and_unload()(X), expected)


# ---------------------------------------------------------------- what is refused


def test_what_cannot_share_is_refused(caplog):
    with pytest.raises(InputError, match="use 1 to 6"):
        shared.orthonormal((6, 6), 7, torch.Generator())
    with pytest.raises(InputError, match="use 1 to 6"):
        shared.gaussian((12, 6), 0, torch.Generator())
    with pytest.raises(InputError, match="No module shares"):
        shared.groups({}, "shape")
    with pytest.raises(InputError, match="cannot be cut into blocks of 4 x 4"):
        shared.groups({"a": (4, 4), "b": (4, 6)}, "blocks")
    with pytest.raises(InputError, match="several shapes"):
        shared.groups({"a.0.q": (4, 4), "a.1.q": (6, 4)}, "type")
    convolution = nn.Sequential(nn.Conv2d(3, 4, 1))
    wrapped = get_peft_model(convolution, LoraConfig(r=1, target_modules=["0"]))
    with pytest.raises(InputError, match="Conv2d cannot share"):
        s2_lora.share_pairs(wrapped, "shape", 1)
    alone = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=1, target_modules=["0"]))
    s2_lora.share_pairs(alone, "shape", 1)
    assert "a plain LoRA is better" in caplog.text


@pytest.mark.parametrize(
    ("values", "sentence"),
    [({"s2_sparsity": -0.1}, "s2_sparsity"), ({"alpha": 3}, "no scaling factor"), ({"use_dora": True}, "plain"),
     ({"perturb": "mgpo"}, "perturb needs"), ({"method": "mola"}, "pairs of their own"), ({"ema": True}, "no zeros"),
     ({"optimizer": "prodigy"}, "rate of their own"), ({"rank_pattern": {"q": 2}}, "one rank")],
)  # fmt: skip
def test_combinations_that_do_not_work_are_refused(values, sentence):
    with pytest.raises(InputError, match=sentence):
        TrainLanguageConfig.parse({"data": "x.jsonl", "s2_share": "shape", **values})


# ---------------------------------------------------------------- the training loop


def trained(steps: int = 30, stop: int | None = None, state: dict | None = None, **values):
    """A regression of the model's output, with the plugin in the loop; returns model, plugin and optimiser."""
    config = TrainLanguageConfig.parse({"data": "x.jsonl", "s2_share": "shape", "rank": RANK, "steps": steps, **values})
    wrapped = get_peft_model(plain(), LoraConfig(r=RANK, target_modules=["q_proj", "k_proj", "fc1", "fc2"])).double()
    plugin = s2_lora.SharedPlugin()
    plugin.configure(config)
    plugin.initialise(Handles({"model": wrapped}, steps=steps, seed=3))
    learnt = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=0.01, weight_decay=0.1)
    plugin.after_inject(Handles({"model": wrapped}, optimizer, steps=steps, seed=3))
    target = plain(seed=1)(X).detach()
    rates, first = [group["lr"] for group in optimizer.param_groups], 0
    if state is not None:
        wrapped.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        plugin.load_state_dict(state["plugin"])
        first = state["step"]
    zeros = []
    for step in range(first, steps if stop is None else stop):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        plugin.step_begin(step)
        optimizer.zero_grad()
        loss, logs = plugin.loss((wrapped(X) - target).square().mean(), outputs=None)
        loss.backward()
        plugin.grads_ready(step)
        optimizer.step()
        plugin.after_step(step)
        zeros.append(logs["shared_zeros"])
    return wrapped, plugin, optimizer, loss.item(), zeros


def test_the_loop_learns_with_its_own_rate_and_no_decay_for_the_coefficients():
    wrapped, _, optimizer, loss, _ = trained(steps=60, s2_sparsity=0.0)
    assert loss < 0.7 * trained(steps=60, stop=1, s2_sparsity=0.0)[3]
    ours = {id(one.v) for one in s2_lora.shares(wrapped).values()}
    for group in optimizer.param_groups:
        own = {id(p) in ours for p in group["params"]}
        assert len(own) == 1
        assert group["lr"] == pytest.approx((0.1 if own.pop() else 0.01) / 60)
        assert group["weight_decay"] == (0.0 if id(group["params"][0]) in ours else 0.1)
    assert "lora_shared" in "".join(name for name, p in wrapped.named_parameters() if p.requires_grad)


def test_the_penalty_makes_exact_zeros_which_then_stay():
    wrapped, *_, zeros = trained(steps=60, s2_sparsity=0.9, s2_fixed=0.2)
    v = torch.cat([one.v.flatten() for one in s2_lora.shares(wrapped).values()])
    assert 0 < int((v == 0).sum()) < v.numel()
    assert zeros[-1] == zeros[-5]
    normalised, *_ = trained(s2_orthogonality=0.0)
    for pair in s2_lora.pairs_of(normalised).values():
        torch.testing.assert_close(pair.A.norm(dim=1), torch.ones(RANK).double())


def test_a_resumed_loop_equals_one_that_never_stopped():
    values: dict = {"steps": 20, "s2_sparsity": 0.5, "s2_fixed": 0.5}
    whole, *_ = trained(**values)
    half, plugin, optimizer, *_ = trained(**values, stop=12)
    state = {"model": half.state_dict(), "optimizer": optimizer.state_dict(), "plugin": plugin.state_dict(), "step": 12}
    again, *_ = trained(**values, state=copy.deepcopy(state))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_an_adapter_of_zeros_is_not_saved():
    _, plugin, *_ = trained(steps=2)
    with pytest.raises(InputError, match="lower s2_sparsity"):
        Plugins([plugin]).finalize({"model": {}})
