"""Mixtures of experts in the layouts of other programs: read from files built here, tensor by tensor."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from adapters.errors import InputError
from adapters.formats import read
from adapters.formats.format import recognise
from adapters.formats.moe_peft import write_mixlora
from adapters.formats.reading import header_of
from adapters.layers.experts import importing
from adapters.layers.experts.presets import preset
from studio.library import facts

WIDTH, INNER, RANK, ALPHA = 8, 12, 2, 6.0
SIZES = {"q_proj": (WIDTH, WIDTH), "gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}


def pair(name, seed):
    """A and B of one expert."""
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = SIZES[name]
    return torch.randn(RANK, inputs, generator=generator), torch.randn(outputs, RANK, generator=generator)


def folder_with(place, tensors, config=None, name="adapter_model.bin"):
    place.mkdir()
    if name.endswith(".safetensors"):
        save_file(tensors, place / name)
    else:
        torch.save(tensors, place / name)
    if config is not None:
        (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def mixture(place):
    head = header_of(place)
    format = recognise(head)
    return format.name, format.mixture(head)


def experts_of(tensors, name, count=3, template="layers.0.mlp.{name}.experts.{e}.lora_{side}.weight", start="mixlora."):
    pairs = [pair(name, 10 * len(name) + e) for e in range(count)]
    for e, (A, B) in enumerate(pairs):
        tensors[start + template.format(name=name, e=e, side="A")] = A
        tensors[start + template.format(name=name, e=e, side="B")] = B
    return pairs


MIXLORA = {
    "peft_type": "MIXLORA", "routing_strategy": "mixlora", "num_experts": 3, "top_k": 2, "r": RANK, "lora_alpha": ALPHA,
    "lora_dropout": 0.05, "target_modules": {"q_proj": True, "gate_proj": True, "up_proj": False, "down_proj": True},
    "base_model_name_or_path": "someone/base", "task_type": "CAUSAL_LM", "router_aux_loss_coef": 0.01,
}  # fmt: skip


def mixlora_files(place, **changes):
    """(folder in today's layout, folder in the old one, pairs by module)."""
    new, pairs = {"mixlora.layers.0.mlp.moe_gate.weight": torch.arange(3 * WIDTH).view(3, WIDTH) / 10}, {}
    for name in ("gate_proj", "down_proj"):
        pairs[name] = experts_of(new, name)
    A, B = pair("q_proj", 5)
    new |= {f"mixlora.layers.0.self_attn.q_proj.lora_{side}.weight": t for side, t in (("A", A), ("B", B))}
    old_names = {"gate_proj": "w1_proj", "down_proj": "w2_proj"}
    old = {"mixlora.layers.0.gate.weight": new["mixlora.layers.0.mlp.moe_gate.weight"]}
    for key, tensor in new.items():
        parts = key.split(".")
        if "experts" in parts:
            old[".".join([*parts[:3], "experts", parts[6], old_names[parts[4]], *parts[7:]])] = tensor
        elif "self_attn" in parts:
            old[key] = tensor
    config = MIXLORA | changes
    folder_with(place / "new", new, config)
    folder_with(place / "old", old, config | {"routing_strategy": "mixtral"})
    return place / "new", place / "old", pairs


def test_mixlora_in_both_layouts(tmp_path):
    new, old, pairs = mixlora_files(tmp_path)
    name, found = mixture(new)
    assert (name, found.method, found.top_k, found.experts(), found.base) == (
        "moe-peft", "mixlora", 2, (3,), "someone/base"
    )  # fmt: skip
    for module, given in pairs.items():
        layer = found.layers[f"layers.0.mlp.{module}"]
        for e, (A, B) in enumerate(given):
            assert torch.equal(layer.A[e], A)
            assert torch.equal(layer.B[e], B)
        assert layer.scale == ALPHA / RANK
    plain = found.layers["layers.0.self_attn.q_proj"]
    assert (plain.experts, found.router_of("layers.0.self_attn.q_proj")) == (1, "")
    assert found.router_of("layers.0.mlp.gate_proj") == "layers.0.mlp"
    again = mixture(old)[1]
    assert again.layers.keys() == found.layers.keys()
    assert all(torch.equal(again.layers[m].A, found.layers[m].A) for m in found.layers)
    assert torch.equal(again.routers["layers.0.mlp"].weight, found.routers["layers.0.mlp"].weight)


def test_mixlora_written_and_read_again(tmp_path):
    found = mixture(mixlora_files(tmp_path, expert_lora={"r": RANK, "lora_alpha": 2 * ALPHA, "lora_dropout": 0.05})[0])[
        1
    ]
    assert found.layers["layers.0.mlp.gate_proj"].scale == 2 * ALPHA / RANK
    again = mixture(write_mixlora(found, tmp_path / "written"))[1]
    for module, layer in found.layers.items():
        assert torch.equal(again.layers[module].A, layer.A)
        assert torch.equal(again.layers[module].B, layer.B)
        assert again.layers[module].scale == layer.scale
    assert (again.top_k, again.base) == (2, "someone/base")


def test_rslora_and_lost_dora(tmp_path):
    found = mixture(mixlora_files(tmp_path, use_rslora=True, use_dora=True)[0])[1]
    assert found.layers["layers.0.mlp.gate_proj"].scale == pytest.approx(ALPHA / RANK**0.5)
    assert "never stores the magnitudes" in found.notes[0]


def plugged(place, start, template, router, config, experts=(3, 3)):
    """A folder with experts and a router in each linear layer, as many as ``experts`` says layer by layer."""
    tensors, pairs = {}, {}
    for layer, count in enumerate(experts):
        module = f"layers.{layer}.mlp.up_proj"
        pairs[module] = experts_of(tensors, "up_proj", count, f"layers.{layer}.mlp.{template}", start)
        tensors[f"{start}{module}.{router}"] = torch.randn(count, WIDTH)
    return folder_with(place, tensors, config), pairs


LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": ALPHA, "target_modules": ["up_proj"]}
LAYOUTS = {
    "moe-peft mola": (
        "mola.", "{name}.experts.{e}.lora_{side}.weight", "moe_gate.weight",
        MIXLORA | {"peft_type": "MOLA", "routing_strategy": "mola"}, "mola", False,
    ),
    "moe-peft loramoe": (
        "loramoe.", "{name}.experts.{e}.lora_{side}.weight", "moe_gate.weight",
        MIXLORA | {"peft_type": "LORAMOE", "routing_strategy": "loramoe"}, "loramoe", True,
    ),
    "mola": (
        "base_model.model.model.", "{name}.lora_{side}_{e}.weight", "router.router.weight",
        LORA | {"r": [8, 8]}, "mola", False,
    ),
    "loramoe": (
        "base_model.model.model.", "{name}.lora_{side}{e}.weight", "lora_route.weight",
        LORA | {"r": RANK, "lora_nums": 3, "blc_alpha": 0.1}, "loramoe", True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_in_every_linear_layer(tmp_path, layout):
    start, template, router, config, method, dense = LAYOUTS[layout]
    experts = (2, 3) if layout == "mola" else (3, 3)
    place, pairs = plugged(tmp_path / "a", start, template, router, config, experts)
    name, found = mixture(place)
    assert (name, found.method, found.dense) == (layout.split()[0], method, dense)
    assert found.experts() == tuple(sorted(set(experts)))
    for module, given in pairs.items():
        key = next(key for key in found.layers if key.endswith(module))
        assert found.router_of(key) == key
        for e, (A, B) in enumerate(given):
            assert torch.equal(found.layers[key].A[e], A)
            assert torch.equal(found.layers[key].B[e], B)
        assert found.layers[key].scale == ALPHA / RANK
    shown = facts.adapter(place)
    assert (shown["format"], shown["family"]) == (name, "language")
    assert shown["notes"]["experts"] == ", ".join(map(str, sorted(set(experts))))
    with pytest.raises(InputError, match="mixture of experts, whose effect differs from token to token"):
        read(place)


def llava_mole(place):
    start = "llm_model.base_model.model.model.layers.0."
    tensors = {
        f"{start}mlp.router.weight": torch.randn(2, WIDTH), f"{start}mlp.router.bias": torch.randn(2),
        f"{start}mlp.original_module.gate_proj.weight": torch.randn(INNER, WIDTH),
        "in_adaptor.projector.0.weight": torch.randn(3, 3),
        "llm_model.base_model.model.lm_head.weight": torch.randn(4, 4),
    }  # fmt: skip
    for role in ("gate", "up", "down"):
        experts_of(tensors, f"{role}_proj", 2, f"mlp.moe_{role}.{{e}}.lora_{{side}}", start)
    A, B = pair("q_proj", 5)
    tensors |= {f"{start}self_attn.q_proj.lora_{s}.default.weight": t for s, t in (("A", A), ("B", B))}
    torch.save({"state_dict": tensors, "epoch": 3}, place)
    return tensors, start


def test_llava_mole(tmp_path):
    tensors, start = llava_mole(tmp_path / "model.pt")
    name, found = mixture(tmp_path / "model.pt")
    assert (name, found.top_k, found.experts()) == ("llava-mole", 1, (2,))
    layer = found.layers["model.layers.0.mlp.down_proj"]
    assert torch.equal(layer.A[1], tensors[f"{start}mlp.moe_down.1.lora_A"])
    assert (layer.scale, found.router_of("model.layers.0.mlp.down_proj")) == (2.0, "model.layers.0.mlp")
    assert torch.equal(found.routers["model.layers.0.mlp"].bias, tensors[f"{start}mlp.router.bias"])
    assert found.layers["model.layers.0.self_attn.q_proj"].experts == 1
    assert "projector" in found.notes[1]
    assert facts.adapter(tmp_path / "model.pt")["notes"]["algorithm"] == "LLaVA-MoLE"


# ------------------------------------------------------------------------------------------------ damaged files


def changed_mixlora(place, change):
    new, _, _ = mixlora_files(place)
    tensors = torch.load(new / "adapter_model.bin", weights_only=True)
    change(tensors)
    torch.save(tensors, new / "adapter_model.bin")
    return new


EXPERT = "mixlora.layers.0.mlp.gate_proj.experts.1.lora_A.weight"
DAMAGE = {
    "an expert is missing": (
        lambda t: [t.pop(EXPERT.replace("_A", s)) for s in ("_A", "_B")], "A of expert 1 is missing",
    ),
    "half an expert": (lambda t: t.pop(EXPERT), "A of expert 1 is missing"),
    "another rank": (
        lambda t: t.update({EXPERT: torch.zeros(5, WIDTH), EXPERT.replace("_A", "_B"): torch.zeros(INNER, 5)}),
        r"expert 1 of 'layers.0.mlp.gate_proj' has the shapes \(5, 8\) and \(12, 5\)",
    ),
    "not a product": (lambda t: t.update({EXPERT: torch.zeros(5, WIDTH)}), "do not multiply"),
    "no router": (lambda t: t.pop("mixlora.layers.0.mlp.moe_gate.weight"), "no router"),
    "a router for others": (
        lambda t: t.update({"mixlora.layers.0.mlp.moe_gate.weight": torch.zeros(5, WIDTH)}), "is for 5 experts, but",
    ),
    "an odd key": (lambda t: t.update({"mixlora.surprise": torch.zeros(1)}), "not understood"),
    "nan": (lambda t: t.update({EXPERT: torch.full((RANK, WIDTH), torch.nan)}), "NaN"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_tensors_are_one_sentence(tmp_path, what):
    change, message = DAMAGE[what]
    with pytest.raises(InputError, match=message):
        mixture(changed_mixlora(tmp_path, change))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 4}, "says 4 experts, but its tensors have 3"),
        ({"r": 7}, "says 7 for the rank, but its tensors have 2"),
        ({"lora_alpha": "many"}, "lora_alpha of its configuration, 'many'"),
        ({"routing_strategy": "mixlora-switch"}, "routes by 'mixlora-switch'"),
    ],
)
def test_odd_configurations_are_one_sentence(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        mixture(mixlora_files(tmp_path, **changes)[0])


class Surprise:
    def __reduce__(self):
        return (print, ("run",))


def test_pickles_run_nothing_and_broken_files_are_one_sentence(tmp_path, capsys):
    new, _, _ = mixlora_files(tmp_path)
    file = new / "adapter_model.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        mixture(new)
    torch.save({"mixlora.layers.0.mlp.moe_gate.weight": Surprise()}, file)
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        mixture(new)
    assert facts.adapter(new)["format"] == "moe-peft"
    assert capsys.readouterr().out == ""
    file.unlink()
    with pytest.raises(InputError, match="no weights"):
        mixture(new)


# ------------------------------------------------------------------------------------------------ X-LoRA


def upstream(place, experts=("law", "code"), depth=3, relu=True, **changes):
    """A directory as EricLBuehler/xlora writes it."""
    place.mkdir()
    step, sizes = (3 if relu else 1), [WIDTH, *[5] * (depth - 1), len(experts)]
    names = [*(f"inner.{step * i}" for i in range(depth - 1)), "last"]
    tensors = {}
    for name, inputs, outputs in zip(names, sizes[:-1], sizes[1:], strict=True):
        tensors |= {f"{name}.weight": torch.randn(outputs, inputs), f"{name}.bias": torch.randn(outputs)}
    save_file(tensors, place / "xlora_classifier.safetensors")
    settings = {
        "hidden_size": WIDTH, "xlora_depth": depth, "xlora_size": 5, "enable_relu_and_dropout": relu, "top_k_lora": 1,
        "softmax_temperature": 2.0, "adapters": {name: f"somewhere/{name}" for name in experts},
    }  # fmt: skip
    (place / "xlora_config.json").write_text(json.dumps(settings | changes))
    return place, tensors


@pytest.mark.parametrize(("depth", "relu"), [(1, True), (2, False), (3, True)])
def test_upstream_xlora(tmp_path, depth, relu):
    place, tensors = upstream(tmp_path / "x", depth=depth, relu=relu)
    (place / "adapters" / "code").mkdir(parents=True)
    name, found = mixture(place)
    assert name == "xlora"
    assert [one.name for one in found.experts] == ["law", "code"]
    assert [one.path for one in found.experts] == [None, place / "adapters" / "code"]
    assert len(found.classifier) == depth
    assert torch.equal(found.classifier[-1][0], tensors["last.weight"])
    if depth > 1:
        assert torch.equal(found.classifier[0][1], tensors["inner.0.bias"])
        assert found.relu == relu
    assert (found.top_k, found.temperature, found.softmax, found.layerwise) == (1, 2.0, True, False)
    assert facts.adapter(place)["notes"] == {"algorithm": "X-LoRA", "experts": "2"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_mean_pool": True}, "one gate per sequence"),
        ({"xlora_depth": 2}, "xlora_depth 2, but the classifier has 3"),
        ({"top_k_lora": 0}, "not a positive whole number"),
        ({"softmax_temperature": 0}, "not a positive number"),
    ],
)
def test_odd_upstream_xlora_is_one_sentence(tmp_path, changes, message):
    place, _ = upstream(tmp_path / "x", **changes)
    with pytest.raises(InputError, match=message):
        mixture(place)


@pytest.fixture(scope="module")
def peft_xlora(tmp_path_factory):
    """(folder, PEFT's own model) by depth: three experts, saved by PEFT."""
    from peft import LoraConfig, XLoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("peft")
    shape = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 2}

    def base():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=2, use_cache=False, **shape))

    for number in range(3):
        lora = LoraConfig(r=2 + number, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(base(), lora).save_pretrained(root / f"e{number}")
    made = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for depth in (1, 3):
            places = {str(number): str(root / f"e{number}") for number in range(3)}
            config = XLoraConfig(
                task_type="CAUSAL_LM", hidden_size=WIDTH, xlora_depth=depth, xlora_size=4, adapters=places
            )
            model = get_peft_model(base(), config)
            model.save_pretrained(root / f"x{depth}")
            made[depth] = root / f"x{depth}", model
    return made


@pytest.mark.parametrize("depth", [1, 3])
def test_layers_that_peft_lost_are_found_again(peft_xlora, depth):
    place, model = peft_xlora[depth]
    saved = load_file(place / "adapter_model.safetensors")
    assert not any("layers.0." in name for name in saved)  # PEFT's defect is there
    name, found = mixture(place)
    wanted = [m for m in model.base_model.internal_xlora_classifier.layers if isinstance(m, torch.nn.Linear)]
    assert name == "peft-xlora"
    assert len(found.classifier) == depth
    for (weight, bias), layer in zip(found.classifier, wanted, strict=True):
        assert torch.equal(weight, layer.weight)
        assert torch.equal(bias, layer.bias)
    assert "PEFT lost layer 0" in found.notes[0]
    assert [one.path.name for one in found.experts] == ["e0", "e1", "e2"]  # not the folders beside it, which are broken
    assert facts.adapter(place)["notes"]["experts"] == "3"


def test_what_peft_lost_for_good_is_said(peft_xlora, tmp_path):
    import shutil

    place = tmp_path / "x"
    shutil.copytree(peft_xlora[1][0], place)
    shutil.rmtree(place / "0")
    with pytest.raises(InputError, match="broken X-LoRA of PEFT: layer 0 of its classifier was lost"):
        mixture(place)


def test_the_mixlora_package_computes_what_we_wrote(tmp_path):
    """Its own loader and layers (PyPI) give our model's logits; its dropout is never off, so there is nearly none."""
    theirs = pytest.importorskip("mixlora", reason="mixlora is not installed (pip install --no-deps mixlora)")
    from tests.adapters.test_experts import IDS, filled, llama

    llama().save_pretrained(tmp_path / "base")
    config = preset("mixlora", {"experts": "4"}.get, r=2, lora_alpha=4, lora_dropout=1e-9, task_type="CAUSAL_LM")
    ours = filled(get_peft_model(llama(), config)).eval()
    written = write_mixlora(importing.mixture_of(ours), tmp_path / "written", base=str(tmp_path / "base"))
    model, _ = theirs.MixLoraModelForCausalLM.from_pretrained(str(written))
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, model.eval()(IDS).logits, atol=1e-5, rtol=0)
