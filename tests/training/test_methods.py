"""Training methods in the smallest loop: they combine, resume, and end as an ordinary LoRA of the untouched base."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from adapters.errors import InputError
from adapters.formats import LoraFile, write_peft
from adapters.layers.variant import StudioVariant, adapted, read_layers
from benchmarks import dialects
from benchmarks.plain_loop import Recipe, go_on, prepare, reference, train
from studio.training.methods import plugins_for

RECIPES = {
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "eva": {"init": "eva", "init_batches": 2},
    "corda": {"init": "corda", "init_batches": 2},
    "lora_ga": {"init": "lora_ga", "init_batches": 2, "use_rslora": True, "alpha": 8},
    "lora_sb": {"init": "lora_sb", "init_batches": 2, "learning_rate": 5e-3},
    "ffa": {"freeze_a": True},
    "allora": {"grad_rule": "allora", "optimizer": "sgd", "learning_rate": 0.1},
    "allora-lr": {"grad_rule": "allora", "allora_mode": "lr"},
    "ggpo": {"perturb": "ggpo", "perturb_sigma": 0.1, "perturb_beta": 1.0},
    "flat-cosine": {"perturb": "flat", "perturb_sigma": 0.1, "perturb_schedule": "cosine"},
    "mgpo": {"perturb": "mgpo"},
    "mgpo-every": {"perturb": "mgpo", "perturb_every": 2},
    "ba": {"reg": "ba", "ba_schedule": "constant"},
    "ffa-eva": {"freeze_a": True, "init": "eva", "init_batches": 2},
    "sb-ggpo": {"init": "lora_sb", "init_batches": 2, "perturb": "ggpo", "perturb_beta": 1.0},
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def data(number: int) -> torch.Tensor:
    return dialects.batch(dialects.NEW, 8, 0, number)


def recipe(**values) -> Recipe:
    return Recipe(**{"steps": 4, "rank": 4, **values})


def outcome(run) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": tensor for name, layer in read_layers(run.model).items()
            for key, tensor in (("A", layer.A), ("B", layer.B))}  # fmt: skip


def same(first, second) -> bool:
    a, b = outcome(first), outcome(second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def logits(model, ids=None):
    model.eval()
    with torch.no_grad():
        return model(input_ids=data(99) if ids is None else ids).logits


@pytest.fixture(scope="module")
def plain_losses():
    """PEFT alone, with a loop that knows nothing of plugins."""
    base = dialects.model()
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=dialects.TARGETS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, weight_decay=0.0)
    losses = []
    for step in range(20):
        ids = data(step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_all_off_is_plain_peft_to_the_bit(plain_losses):
    run = train(dialects.model(), recipe(steps=20), data, dialects.TARGETS)
    assert run.losses == plain_losses
    assert not any(layer.lora_variant for layer in adapted(run.model).values())


@pytest.mark.parametrize("values", RECIPES.values(), ids=RECIPES)
def test_base_untouched_and_export_ordinary(values, tmp_path):
    base, untouched = dialects.model(), dialects.model()
    before = logits(untouched)
    run = train(base, recipe(**values), data, dialects.TARGETS)
    assert all(map(torch.isfinite, map(torch.tensor, run.losses)))
    assert torch.equal(reference(run.model, data(99)), before)  # the adapter off is the pre-trained model, bit for bit
    trained = logits(run.model)
    assert not torch.allclose(trained, before, atol=1e-4)
    write_peft(LoraFile({"model": read_layers(run.model)}), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(untouched, tmp_path / "adapter")
    assert not any(isinstance(v, StudioVariant) for m in adapted(loaded).values() for v in m.lora_variant.values())
    # 1e-5 absolute alone is the edge of fp32 where a large start and its offset nearly cancel (lora_ga)
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", RECIPES.values(), ids=RECIPES)
def test_resumed_is_uninterrupted_to_the_bit(values):
    whole = train(dialects.model(), recipe(**values), data, dialects.TARGETS)
    first = prepare(dialects.model(), recipe(**values), data, dialects.TARGETS)
    go_on(first, recipe(**values), data, 0, 2)
    kept = {
        "parameters": {n: p.detach().clone() for n, p in first.model.named_parameters() if p.requires_grad},
        "optimizer": copy.deepcopy(first.optimizer.state_dict()),
        "plugins": copy.deepcopy(first.plugins.state_dict()),
    }
    second = prepare(dialects.model(), recipe(**values), data, dialects.TARGETS, resuming=True)
    with torch.no_grad():
        for name, parameter in second.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(kept["parameters"].pop(name))
    assert not kept["parameters"]
    second.optimizer.load_state_dict(kept["optimizer"])
    second.plugins.load_state_dict(kept["plugins"])
    go_on(second, recipe(**values), data, 2)
    assert same(whole, second)


@pytest.mark.parametrize("name", ["pissa", "lora_sb", "allora", "ggpo", "mgpo"])
def test_accumulation_and_checkpointing_change_nothing(name):
    values = {**RECIPES[name], "steps": 3}
    whole = train(dialects.model(), recipe(**values), data, dialects.TARGETS)
    again = train(dialects.model(), recipe(**values, checkpointing=True), data, dialects.TARGETS)
    parts = train(dialects.model(), recipe(**values, accumulation=4), data, dialects.TARGETS)
    torch.testing.assert_close(again.losses, whole.losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-4, atol=1e-4)


def test_consistency_accumulates_exactly():
    values = {"reg": "ba", "ba_schedule": "constant", "ba_l2": 0, "ba_l3": 0, "ba_l1": 0.5}
    whole = train(dialects.model(), recipe(**values), data, dialects.TARGETS)
    parts = train(dialects.model(), recipe(**values, accumulation=4), data, dialects.TARGETS)
    torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-5, atol=1e-5)


def test_weightless_terms_cost_nothing(monkeypatch):
    def never(*_):
        raise AssertionError("the reference pass ran")

    monkeypatch.setattr("benchmarks.plain_loop.reference", never)
    plain = train(dialects.model(), recipe(init="pissa"), data, dialects.TARGETS)
    off = {"reg": "ba", "ba_l1": 0, "ba_l2": 0, "ba_l3": 0}
    assert same(plain, train(dialects.model(), recipe(init="pissa", **off), data, dialects.TARGETS))


def test_padding_has_no_influence_on_the_terms():
    from adapters.plugin import Answers

    (plugin,) = plugins_for(recipe(reg="ba", ba_schedule="constant"))
    plugin.configure(recipe(reg="ba", ba_schedule="constant"))
    ours, theirs = torch.randn(2, 5, 9), torch.randn(2, 5, 9)
    labels = torch.tensor([[-100, 1, 2, -100, -100], [-100, -100, 3, 4, 5]])
    first = plugin.loss(torch.zeros(()), Answers(ours, labels, lambda: theirs))[0]
    changed = ours.clone()
    changed[0, 2:] += 5  # logits that predict no valid label
    changed[1, 0] -= 3
    changed[:, 4] += 1
    assert torch.equal(plugin.loss(torch.zeros(()), Answers(changed, labels, lambda: theirs))[0], first)
    with pytest.warns(UserWarning, match="no valid tokens"):
        empty = plugin.loss(torch.ones(()), Answers(ours, torch.full((2, 5), -100), lambda: theirs))
    assert float(empty[0]) == 1


def test_classification_uses_the_other_terms():
    from adapters.plugin import Answers

    (plugin,) = plugins_for(recipe(reg="ba", ba_schedule="constant"))
    plugin.configure(recipe(reg="ba", ba_schedule="constant"))
    logs = plugin.loss(torch.zeros(()), Answers(torch.randn(8, 4), torch.zeros(8), lambda: torch.randn(8, 4)))[1]
    assert logs["ba_consistency_weighted"] == pytest.approx(0.15 * logs["ba_consistency"])
    assert logs["ba_spectral"] < 0
    with pytest.warns(UserWarning, match="no covariance"):
        plugin.loss(torch.zeros(()), Answers(torch.randn(1, 4), torch.zeros(1), lambda: torch.randn(1, 4)))


MATRIX = list(
    itertools.product(("default", "pissa", "lora_ga"), ("plain", "allora"), ("none", "ggpo", "mgpo"), ("none", "ba"))
)


@pytest.mark.parametrize(("init", "rule", "perturb", "reg"), MATRIX)
def test_every_combination_learns_and_exports(init, rule, perturb, reg):
    values = {"init": init, "grad_rule": rule, "perturb": perturb, "reg": reg, "init_batches": 1}
    run = train(dialects.model(), recipe(steps=5, ba_schedule="constant", **values), data, dialects.TARGETS)
    assert all(loss == loss and abs(loss) < 100 for loss in run.losses)
    fresh = get_peft_model(
        dialects.model(),
        LoraConfig(r=4 if init == "default" else 8, lora_alpha=4 if init == "default" else 8,
                   target_modules=dialects.TARGETS),
    )  # fmt: skip
    layers = read_layers(run.model)
    with torch.no_grad():
        for name, layer in adapted(fresh).items():
            layer.lora_A["default"].weight.copy_(layers[name].A)
            layer.lora_B["default"].weight.copy_(layers[name].B)
    torch.testing.assert_close(logits(fresh), logits(run.model), rtol=0, atol=1e-5)


def test_a_checkpoint_of_another_method_is_refused():
    run = prepare(dialects.model(), recipe(perturb="mgpo"), data, dialects.TARGETS)
    with pytest.raises(InputError, match="made with perturb 'ggpo'"):
        run.plugins.load_state_dict({"perturbation": {"kind": "ggpo", "layers": {}}})
    run = prepare(dialects.model(), recipe(init="lora_ga"), data, dialects.TARGETS, resuming=True)
    with pytest.raises(InputError, match="no frozen matrices for the layer"):
        run.plugins.load_state_dict({"start": {"init": "lora_ga", "frozen": {}}})
    with pytest.raises(InputError, match="not initialised with 'lora_ga'"):
        run.plugins.load_state_dict({"start": {}})


def test_scale_is_checked_in_the_layers_too():
    with pytest.raises(InputError, match="forward factor is 1"):
        plugins_for(recipe(grad_rule="allora", alpha=16))


def test_intruders_are_counted_while_training():
    from adapters.inspection.intruders import inspect, weights_of

    run = train(dialects.model(), recipe(steps=4, intruders_every=2, learning_rate=0.05), data, dialects.TARGETS)
    assert [("intruders" in logs) for logs in run.logs] == [False, False, True, True]
    file = LoraFile({"model": read_layers(run.model)})
    assert run.plugins.plugins[0].logs["intruders"] == inspect(file, weights_of({"model": dialects.model()}))[0].total


def test_pictures_have_no_logits():
    from adapters.plugin import Outputs

    (plugin,) = plugins_for(recipe(reg="ba"))
    plugin.configure(recipe(reg="ba"))
    empty = torch.zeros(1)
    with pytest.raises(InputError, match="prior_preservation instead"):
        plugin.loss(torch.zeros(()), Outputs(empty, empty, empty, empty, 1))
