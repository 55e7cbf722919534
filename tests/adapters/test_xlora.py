"""X-LoRA against PEFT's own adapters, PEFT's X-LoRA while in memory, and loops written from the paper's formulas."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, DynamicCache, LlamaConfig, LlamaForCausalLM

from adapters.errors import FamilyError, InputError
from adapters.formats import read, write_peft
from adapters.formats.fit import fit
from adapters.formats.lora import MODEL, LoraFile, LoraLayer
from adapters.formats.peft_xlora import write_xlora
from adapters.layers.experts import xlora
from adapters.layers.experts.classifier import ClassifierOptions, gates_of
from adapters.layers.experts.export import as_lora
from adapters.layers.experts.files import load, write
from adapters.layers.experts.model import expert_layers
from adapters.layers.experts.routing import routing_of, watched

IDS = torch.tensor([[5, 9, 2, 11, 7, 3], [1, 8, 4, 6, 10, 12]])
WIDTH = 16

KINDS = {
    "law": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]},
    "code": {"r": 4, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "med": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "dora": {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
}


def base(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=16, **shape | more | changes))
    return made.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> directory of an adapter that PEFT wrote."""
    root = tmp_path_factory.mktemp("experts")
    for number, (name, options) in enumerate(KINDS.items()):
        model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **options))
        torch.manual_seed(10 + number)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, mean=1.0 if "magnitude" in key else 0.0, std=0.2)
        model.save_pretrained(root / name)
    return {name: root / name for name in KINDS}


@pytest.fixture(scope="module")
def experts(folders):
    model = base()
    return {name: xlora.expert(name, fit(read(place), {MODEL: model})) for name, place in folders.items()}


def made(experts, names=("law", "code", "med"), options=None, seed=3, model=None, **more):
    """An X-LoRA whose classifier has random weights."""
    torch.manual_seed(seed)
    found = xlora.add(model or base(), [experts[name] for name in names], options, task_type="CAUSAL_LM", **more)
    for parameter in xlora.classifier(found).parameters():
        nn.init.normal_(parameter, std=0.5)
    return found.eval()


def logits(model, ids=IDS, **more):
    with torch.no_grad():
        return model(ids, **more).logits


# ------------------------------------------------------------------------------------------------ what is computed


def test_one_expert_alone_is_that_adapter(experts, folders):
    names = list(KINDS)
    model = made(experts, names)
    for number, name in enumerate(names):
        one_hot = [float(i == number) for i in range(len(names))]
        with xlora.constant_gates(model, one_hot):
            found = logits(model)
        wanted = logits(PeftModel.from_pretrained(base(), folders[name]))
        assert torch.allclose(found, wanted, atol=1e-6), name
        assert not torch.allclose(found, logits(base()), atol=1e-3)


def test_gates_of_zero_are_the_base(experts):
    model = made(experts, list(KINDS))
    with xlora.constant_gates(model, [0.0] * 4):
        assert torch.equal(logits(model), logits(base()))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
    assert torch.equal(model.unload()(IDS).logits, logits(base()))


def test_constant_gates_are_one_ordinary_lora(experts, tmp_path):
    options = ClassifierOptions(layerwise=True, weight=0.7)
    model = made(experts, options=options)
    layers = len(expert_layers(model))
    for number, gates in enumerate((torch.tensor([0.2, 0.5, -0.3]), torch.rand(layers, 3))):
        with xlora.constant_gates(model, gates):
            wanted = logits(model)
        file = LoraFile({MODEL: xlora.as_lora(model, gates)})
        assert file.ranks() == (4, 8, 10, 14)  # up_proj, v_proj, down_proj, q_proj
        write_peft(file, tmp_path / str(number))
        found = logits(PeftModel.from_pretrained(base(), tmp_path / str(number)))
        assert torch.allclose(found, wanted, atol=1e-6)
    with pytest.raises(InputError, match="is DoRA, whose mixture"):
        xlora.as_lora(made(experts, list(KINDS)), [0.25] * 4)
    given = as_lora(model, gates=[0.2, 0.5, -0.3])
    assert torch.equal(given[path := next(iter(given))].B, xlora.as_lora(model, [0.2, 0.5, -0.3])[path].B)


def test_a_layer_is_the_sum_over_experts_token_by_token(experts):
    names = list(KINDS)
    model = made(experts, names, ClassifierOptions(weight=1.3))
    layer = expert_layers(model)["model.layers.1.self_attn.q_proj"]
    routing, x, gates = routing_of(model), torch.randn(2, 5, WIDTH), torch.rand(2, 5, 4)
    routing.external_gates = gates
    with torch.no_grad():
        found, W0 = layer(x), layer.get_base_layer().weight
    for row in range(2):
        for t in range(5):
            wanted = W0 @ x[row, t]
            for n, name in enumerate(names):
                one = experts[name].layers["model.layers.1.self_attn.q_proj"]
                delta = one.scale * one.B @ one.A
                if one.magnitude is not None:
                    V = W0 + delta
                    delta = (one.magnitude / V.norm(dim=1))[:, None] * V - W0
                wanted = wanted + 1.3 * gates[row, t, n] * (delta @ x[row, t])
            assert torch.allclose(found[row, t], wanted, atol=1e-5)


def test_both_passes_are_those_of_peft(experts, folders):
    """PEFT's X-LoRA is right while it is in memory; the order of its modules is the model's."""
    options = ClassifierOptions(depth=3, size=5, dropout=0.0, layerwise=True, top_k=2, temperature=0.7, weight=1.2)
    ours = made(experts, options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=WIDTH, xlora_depth=3, xlora_size=5, xlora_dropout_p=0.0,
            layerwise_scalings=True, top_k_lora=2, softmax_temperature=0.7, global_scaling_weight=1.2,
            adapters={str(i): str(folders[name]) for i, name in enumerate(("law", "code", "med"))},
        )  # fmt: skip
        theirs = get_peft_model(base(use_cache=False), config)
    linear = [m for m in theirs.base_model.internal_xlora_classifier.layers if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for layer, (weight, bias) in zip(linear, xlora.classifier(ours).linear_layers(), strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])  # left padding
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    found, wanted = logits(ours, attention_mask=mask), logits(theirs, attention_mask=mask)
    assert torch.allclose(found[mask.bool()], wanted[mask.bool()], atol=1e-5)


def test_the_value_of_the_first_pass(experts):
    plain, shifted = made(experts), made(experts, options=ClassifierOptions(pass_value=0.3))
    with torch.no_grad():
        hidden = base().model(IDS).last_hidden_state
        assert torch.equal(hidden, base()(IDS, output_hidden_states=True).hidden_states[-1])
        wanted = xlora.classifier(plain)(hidden)
    logits(plain)
    assert torch.equal(xlora.last_gates(plain), wanted)
    with xlora.constant_gates(shifted, [0.3] * 3), torch.no_grad():
        hidden = shifted(IDS, output_hidden_states=True).hidden_states[-1]
    logits(shifted)
    assert torch.allclose(xlora.last_gates(shifted), xlora.classifier(shifted)(hidden), atol=1e-6)
    assert not torch.allclose(xlora.last_gates(shifted), wanted, atol=1e-3)


def test_gates_from_logits():
    given = torch.tensor([[[0.0, 2.0, -1.0, 0.0], [-3.0, -2.0, -1.0, 0.0]]])
    softmax = gates_of(given, ClassifierOptions(temperature=2.0))
    assert torch.allclose(softmax.sum(-1), torch.ones(1, 2))
    assert torch.allclose(softmax, (given / 2).softmax(-1))
    kept = gates_of(given, ClassifierOptions(top_k=2))
    assert (kept != 0).sum(-1).tolist() == [[2, 2]]
    assert torch.equal(kept.max(-1).values, given.softmax(-1).max(-1).values)  # not renormalised
    raw = gates_of(given, ClassifierOptions(softmax=False, top_k=3))
    assert raw[0, 1].tolist() == [0.0, -2.0, -1.0, 0.0]  # a logit of 0 is chosen as any other
    of_kept = gates_of(given, ClassifierOptions(softmax=False, softmax_of_top_k=True, top_k=3))
    assert torch.allclose(of_kept.sum(-1), torch.ones(1, 2))
    assert torch.allclose(of_kept[0, 1, 1:], given[0, 1, 1:].softmax(-1))


def test_shared_gates_are_tied_layerwise_gates(experts):
    shared = made(experts, options=ClassifierOptions(depth=2, size=6))
    layerwise = made(experts, options=ClassifierOptions(depth=2, size=6, layerwise=True))
    count = len(expert_layers(layerwise))
    with torch.no_grad():
        pairs = zip(xlora.classifier(shared).linear_layers(), xlora.classifier(layerwise).linear_layers(), strict=True)
        for number, (one, many) in enumerate(pairs):
            for tensor, target in zip(one, many, strict=True):
                target.copy_(tensor.repeat(count, *[1] * (tensor.ndim - 1)) if number else tensor)
    assert torch.allclose(logits(shared), logits(layerwise), atol=1e-6)


def test_the_order_of_the_experts_is_only_a_name(experts):
    first, order = made(experts), [2, 0, 1]
    names = xlora.names(first)
    second = made(experts, [names[i] for i in order])
    with torch.no_grad():
        for mine, theirs in zip(*(m.parameters() for m in map(xlora.classifier, (second, first))), strict=True):
            mine.copy_(theirs[order])
    assert xlora.names(second) == ["med", "law", "code"]
    assert torch.allclose(logits(first), logits(second), atol=1e-6)


# ------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("layerwise", [False, True])
def test_two_caches_give_what_no_cache_gives(experts, layerwise):
    model = made(experts, options=ClassifierOptions(layerwise=layerwise))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    more = {"output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(input_ids=IDS, use_cache=True, **options, **more)
    whole = model.generate(input_ids=IDS, use_cache=False, **options, **more)
    assert torch.equal(cached.sequences, whole.sequences)
    assert torch.allclose(torch.stack(cached.logits), torch.stack(whole.logits), atol=1e-5)
    assert cached.past_key_values.first.get_seq_length() == cached.past_key_values.get_seq_length() == 13
    changed = base().generate(input_ids=IDS, use_cache=True, **options)
    assert not torch.equal(changed, cached.sequences)


def test_beams_reorder_both_caches(experts):
    model = made(experts)
    options = {"max_new_tokens": 7, "num_beams": 4, "do_sample": False, "eos_token_id": None}
    cached = model.generate(input_ids=IDS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **options))


def test_a_cache_from_step_to_step(experts):
    model, cache = made(experts), DynamicCache()
    whole = logits(model)
    parts = [logits(model, IDS[:, i : i + 2], past_key_values=cache, use_cache=True) for i in (0, 2, 4)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    cache.crop(-2)
    again = logits(model, IDS[:, 4:], past_key_values=cache, use_cache=True)
    assert torch.allclose(again, whole[:, 4:], atol=1e-5)
    filled = base()(IDS, use_cache=True).past_key_values
    with pytest.raises(InputError, match="begin with an empty cache"):
        model(IDS, past_key_values=filled)
    with pytest.raises(InputError, match="leave cache_implementation empty"):
        model.generate(input_ids=IDS, max_new_tokens=2, cache_implementation="static")


# ------------------------------------------------------------------------------------------------ training


def gradients(model, **checkpointing):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    model.zero_grad()
    torch.manual_seed(0)
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_only_the_classifier_learns_and_checkpointing_changes_nothing(experts):
    options = ClassifierOptions(depth=2, size=6, dropout=0.0, layerwise=True)
    model = made(experts, list(KINDS), options)
    plain = gradients(model)
    assert set(plain) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("moeadapter_router" in name for name in plain)
    assert len(plain) == 4
    assert all(bool(grad.any()) for grad in plain.values())
    again = gradients(made(experts, list(KINDS), options), use_reentrant=False)
    assert all(torch.equal(again[name], grad) for name, grad in plain.items())
    with pytest.raises(InputError, match="use_reentrant"):
        gradients(made(experts, list(KINDS), options), use_reentrant=True)


def test_the_first_pass_is_without_dropout_and_modes_come_back(experts):
    model = made(experts, model=base(attention_dropout=0.5))
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    model(IDS)
    first = xlora.last_gates(model)
    model(IDS)
    assert torch.equal(first, xlora.last_gates(model))
    assert modes == {name: module.training for name, module in model.named_modules()}


def test_experts_can_learn_too(experts):
    model = made(experts, trained="both")
    found = gradients(model)
    assert any("moeadapter_A" in name for name in found)
    with pytest.raises(InputError, match="DoRA experts stay frozen"):
        made(experts, list(KINDS), trained="both")


def test_the_classifier_is_fp32_over_a_bf16_base(experts):
    model = made(experts, list(KINDS), model=base().to(torch.bfloat16))
    assert all(p.dtype == torch.float32 for p in xlora.classifier(model).parameters())
    found = logits(model)
    assert found.dtype == torch.bfloat16
    assert xlora.last_gates(model).dtype == torch.float32
    assert torch.allclose(found.float(), logits(made(experts, list(KINDS))), atol=0.15)
    loaded = get_peft_model(base().to(torch.bfloat16), model.peft_config["default"], autocast_adapter_dtype=False)
    assert all(p.dtype == torch.float32 for p in xlora.classifier(loaded).parameters())


def test_embeddings_as_inputs_and_encoders(experts):
    model = made(experts)
    with torch.no_grad():
        given = base().get_input_embeddings()(IDS)
        assert torch.allclose(model(inputs_embeds=given).logits, logits(model), atol=1e-6)
    torch.manual_seed(0)
    encoder = BertModel(
        BertConfig(vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    layer = experts["law"].layers["model.layers.0.self_attn.q_proj"]
    one = [xlora.Expert(name, {"encoder.layer.0.attention.output.dense": layer}) for name in ("a", "b")]
    given = torch.randn(2, 4, 16)
    with torch.no_grad():
        plain = encoder(inputs_embeds=given).last_hidden_state
        wrapped = xlora.add(encoder, one)
        with xlora.constant_gates(wrapped, [0.0, 0.0]):
            assert torch.equal(wrapped(inputs_embeds=given).last_hidden_state, plain)
        assert not torch.allclose(wrapped(inputs_embeds=given).last_hidden_state, plain, atol=1e-3)
        assert torch.allclose(xlora.last_gates(wrapped), xlora.classifier(wrapped)(plain))


def test_means_leave_padding_out(experts):
    model = made(experts, options=ClassifierOptions(layerwise=True))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    found = xlora.mean_gates(model, [{"input_ids": IDS, "attention_mask": mask}])
    gates = xlora.last_gates(model)
    wanted = (gates[0, :3].sum(0) + gates[1].sum(0)) / 9
    assert torch.allclose(found, wanted, atol=1e-6)
    with watched(model) as routing:
        logits(model)
        assert len(routing.records["default"]) == len(expert_layers(model))


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_saved_and_loaded_is_the_same_to_the_bit(experts, tmp_path, depth):
    every = [*KINDS, "again"]
    known = experts | {"again": xlora.Expert("again", experts["med"].layers)}
    for count in range(1, 6):
        options = ClassifierOptions(depth=depth, size=5, layerwise=count % 2 == 0)
        model = made(known, every[:count], options)
        model.save_pretrained(tmp_path / str(count))
        again = PeftModel.from_pretrained(base(), tmp_path / str(count), adapter_name="other")
        assert torch.equal(logits(model), logits(again))
        assert xlora.names(again, "other") == every[:count]
        pairs = zip(xlora.classifier(model).parameters(), xlora.classifier(again, "other").parameters(), strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_the_directory_names_its_experts(experts, folders, tmp_path):
    from adapters.formats.tensors import sha256

    model = made(experts, ["med", "law"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert [one["name"] for one in config["experts"]] == ["med", "law"]
    assert [one["sha256"] for one in config["experts"]] == [sha256(folders[name]) for name in ("med", "law")]
    assert [one["path"] for one in config["experts"]] == [str(folders[name]) for name in ("med", "law")]
    bare = base()
    bare.load_adapter(str(tmp_path))
    assert torch.equal(logits(bare), logits(model))
    config["frozen"][0], config["frozen"][1] = config["frozen"][1], config["frozen"][0]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="another order"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_many_modules_are_written_and_read(tmp_path):
    """From 20 target modules on, PEFT replaces their list by a set of shorter names."""
    torch.manual_seed(4)
    names = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(6) for name in "qo"]
    names += [f"model.layers.{i}.mlp.gate_proj" for i in range(6)] + [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    layers = {
        name: LoraLayer(torch.randn(2, WIDTH), torch.randn(16 if "self_attn" in name else 24, 2) / 4, 2.0)
        for name in names
    }
    model = xlora.add(base(num_hidden_layers=6), [xlora.Expert(name, layers) for name in ("a", "b")]).eval()
    write(model, tmp_path / "x", torch.float32, "", {})
    again = base(num_hidden_layers=6)
    load(again, tmp_path / "x")
    assert torch.equal(logits(again), logits(model))
    assert list(expert_layers(again)) == list(expert_layers(model))


def test_merging_is_refused_before_anything_changes(experts):
    model = made(experts)
    before = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(InputError, match="cannot be merged"):
            merge()
    assert torch.equal(logits(model), before)


def test_two_xloras_on_one_model(experts):
    model = made(experts, ["law", "code"])
    alone = logits(model)
    config = xlora.config_for(base(), [experts["med"]], task_type="CAUSAL_LM")
    model.add_adapter("second", config)
    xlora.fill(model, [experts["med"]], "second")
    assert torch.equal(logits(model), alone)
    model.set_adapter("second")
    assert torch.allclose(logits(model), logits(made(experts, ["med"])), atol=1e-6)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(InputError, match="activate one"):
        logits(model)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "from 1 to the 3 experts"),
        ({"top_k": 4}, "from 1 to the 3 experts"),
        ({"softmax_of_top_k": True, "top_k": 2}, "softmax of a softmax"),
        ({"softmax_of_top_k": True, "softmax": False}, "set top_k"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"width": 4096}, "hidden states have 16"),
    ],
)
def test_options_that_do_not_work(experts, options, message):
    with pytest.raises(InputError, match=message):
        made(experts, options=ClassifierOptions(**options))


def test_experts_that_do_not_work(experts, folders, caplog):
    with pytest.raises(InputError, match="name at least one"):
        xlora.add(base(), [])
    with pytest.raises(InputError, match="Two experts are called 'law'"):
        made(experts, ["law", "law"])
    law = experts["law"].layers["model.layers.0.self_attn.q_proj"]
    for layers, message in (
        ({"model.layers.7.self_attn.q_proj": law}, "which this base lacks"),
        ({"model.layers.0.mlp.up_proj": law}, r"a matrix \(16, 16\) in 'model.layers.0.mlp.up_proj', .* \(24, 16\)"),
    ):
        with pytest.raises(FamilyError, match=message):
            xlora.add(base(), [xlora.Expert("odd", layers)])
    with pytest.raises(InputError, match="beside linear layers only"):
        xlora.add(base(), [xlora.Expert("odd", {"model.embed_tokens": law})])
    with pytest.raises(InputError, match="give \\(3,\\) or"), xlora.constant_gates(made(experts), [1.0]):
        pass
    others = [xlora.Expert(name, experts[name].layers, base=f"someone/{name}") for name in ("law", "code")]
    xlora.add(base(), others)
    assert "name different bases" in caplog.text


def test_a_base_without_hidden_states(experts):
    class Odd(LlamaForCausalLM):
        base_model_prefix = "body"

        def __init__(self, config):
            super().__init__(config)
            self.body = nn.Linear(2, 2)

        def forward(self, input_ids=None, **options):
            return self.model(input_ids=input_ids)

    class Body(nn.Linear):
        def forward(self, input_ids=None, **options):
            return {}

    model = Odd(base().config).eval()
    model.body = Body(2, 2)
    wrapped = xlora.add(model, [experts["law"]])
    with pytest.raises(InputError, match="gives none"):
        wrapped(input_ids=IDS)


# ------------------------------------------------------------------------------------------------ other programs' files


def test_an_xlora_of_peft_is_read(experts, folders, tmp_path):
    from adapters.formats.format import recognise
    from adapters.formats.reading import header_of

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=WIDTH, xlora_depth=2, xlora_size=5, layerwise_scalings=True,
            adapters={str(i): str(folders[name]) for i, name in enumerate(("law", "code", "med"))},
        )  # fmt: skip
        theirs = get_peft_model(base(use_cache=False), config)
        theirs.save_pretrained(tmp_path / "x")
    head = header_of(tmp_path / "x")
    file = recognise(head).mixture(head)
    model = base()
    found = [xlora.expert(one.name, fit(read(one.path), {MODEL: model})) for one in file.experts]
    ours = xlora.from_file(model, file, found).eval()
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    with pytest.raises(InputError, match="the classifier has 24 outputs, but 2 experts for each of 6"):
        xlora.from_file(base(), file, found[:2])


def test_an_xlora_written_for_peft_is_whole(experts, tmp_path):
    options = ClassifierOptions(depth=2, size=5, layerwise=True, top_k=2, temperature=0.7, weight=1.2)
    model = made(experts, options=options)
    write_xlora(xlora.to_file(model), xlora.experts_of(model), tmp_path / "x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(base(use_cache=False), tmp_path / "x")
    assert torch.allclose(logits(theirs), logits(model), atol=1e-5)
    with pytest.raises(InputError, match="'dora' is DoRA"):
        xlora.experts_of(made(experts, list(KINDS)))
