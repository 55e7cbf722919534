"""Every option of PEFT that changes what is saved: the studio gives stock PEFT's answers, or refuses it by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adapters.errors import InputError
from adapters.formats import read, write_peft
from adapters.formats.fit import fit
from adapters.formats.lora import MODEL
from adapters.formats.peft_options import REFUSED, USED, WITHOUT_EFFECT, check_options
from pipelines.language.adapters import AdaptedModel
from studio.cli.app import run as command

TOKENS = torch.arange(10, 30)[None]
HALF = ["q_proj", "v_proj", "down_proj"]

SAME: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\..*q_proj": 3}},
    "rslora_pattern": {"use_rslora": True, "rank_pattern": {"v_proj": 2}},
    "random": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "one_layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["v_proj"]},
    "output_layer": {"target_modules": ["q_proj", "lm_head"]},
    "table": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora_table": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "dropout": {"lora_dropout": 0.5},
}
"""Options with which a saved adapter is read, and means what stock PEFT makes of it."""

NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "bias_all": ({"bias": "all"}, "trains biases"),
    "bias_lora": ({"bias": "lora_only"}, "trains biases"),
    "lora_bias": ({"lora_bias": True}, "trains biases"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "replaces whole modules"),
    "tokens": ({"trainable_token_indices": [12, 15]}, "embeddings of single tokens"),
    "pissa": ({"init_lora_weights": "pissa"}, "initialised by pissa"),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_4"}, "initialised by pissa_niter_4"),
    "olora": ({"init_lora_weights": "olora"}, "initialised by olora"),
    "alora": ({"alora_invocation_tokens": [7, 8, 9]}, "activated LoRA"),
    "replication": ({"layer_replication": [(0, 2), (1, 2)]}, "repeated layers"),
    "parameters": ({"target_parameters": ["gate_proj.weight"]}, "single parameters"),
}
"""Options that make an adapter something else: refused, and how the sentence names it."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linear layers with transposed weights, and an output layer tied to the embeddings."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def opened(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


def trained(base: Path, folder: Path, seed: int = 1, kind: Callable[..., Any] = LoraConfig, **options: Any) -> Path:
    """What PEFT saves after random steps on all that it trains."""
    torch.manual_seed(seed)
    sizes = {"lora_alpha": 8} if kind is LoraConfig else {"alpha": 8}
    given = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": HALF, **sizes, **options}
    model = get_peft_model(opened(base), kind(**given))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.eval().save_pretrained(folder)
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def stock(base: Path, folder: Path, strength: float = 1.0) -> Any:
    """The adapter in PEFT itself, its scale multiplied."""
    model = PeftModel.from_pretrained(opened(base), folder).eval()
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: value * strength for name, value in module.scaling.items()}
    return model


def changes(base: Path, folder: Path, strength: float) -> dict[str, Tensor]:
    """Parameter name -> what PEFT's merge adds to it."""
    bare = dict(opened(base).named_parameters())
    merged = dict(stock(base, folder, strength).merge_and_unload().named_parameters())
    return {name: merged[name].detach() - bare[name].detach() for name in bare}


def by_studio(base: Path, weights: dict[Path, float]) -> Tensor:
    adapted = AdaptedModel(opened(base))
    for path in weights:
        adapted.add(str(path), path)
    with adapted.active({str(path): weight for path, weight in weights.items()}) as model:
        return logits(model)


def check(base: Path, folder: Path, other: Path) -> None:
    """Alone at 1, 0.5 and 0, beside another, untouched afterwards, and written anew."""
    bare = logits(opened(base))
    assert not torch.allclose(logits(stock(base, folder)), bare, atol=1e-3)
    for strength in (1.0, 0.5):
        torch.testing.assert_close(by_studio(base, {folder: strength}), logits(stock(base, folder, strength)),
                                   atol=2e-5, rtol=1e-4)  # fmt: skip
    assert torch.equal(by_studio(base, {folder: 0.0}), bare)
    both = opened(base)
    with torch.no_grad():
        for path, strength in ((folder, 0.5), (other, 1.0)):
            for name, change in changes(base, path, strength).items():
                both.get_parameter(name).add_(change)
    torch.testing.assert_close(by_studio(base, {folder: 0.5, other: 1.0}), logits(both), atol=5e-5, rtol=1e-3)
    adapted = AdaptedModel(opened(base))
    adapted.add("a", folder)
    adapted.add("b", other)
    with adapted.active({"a": 1.0, "b": 1.0}):
        pass
    with adapted.active({"b": 1.0}) as model:
        torch.testing.assert_close(logits(model), logits(stock(base, other)), atol=2e-5, rtol=1e-4)
    with adapted.active({}) as model:
        assert torch.equal(logits(model), bare)
    again = write_peft(fit(read(folder), {MODEL: opened(base)}), folder.with_name(folder.name + "-again"))
    torch.testing.assert_close(logits(stock(base, again)), logits(stock(base, folder)), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SAME)
def test_read_adapters_answer_as_in_peft(llama: Path, tmp_path: Path, name: str) -> None:
    check(llama, trained(llama, tmp_path / "a", **SAME[name]), trained(llama, tmp_path / "other", 2))


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
def test_other_methods_of_peft_answer_as_in_peft(llama: Path, tmp_path: Path, kind: Any) -> None:
    check(llama, trained(llama, tmp_path / "a", kind=kind), trained(llama, tmp_path / "other", 2, use_dora=True))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ["c_attn", "wte"]}])
def test_transposed_and_tied_weights_answer_as_in_peft(gpt2: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    given = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    check_tied = "wte" in options.get("target_modules", ())
    folder = trained(gpt2, tmp_path / "a", **{**given, **options})
    if not check_tied:
        check(gpt2, folder, trained(gpt2, tmp_path / "other", 2, **given))
        return
    for strength in (1.0, 0.5):  # PEFT's merge would change the output layer too
        torch.testing.assert_close(by_studio(gpt2, {folder: strength}), logits(stock(gpt2, folder, strength)),
                                   atol=2e-5, rtol=1e-4)  # fmt: skip
    assert torch.equal(by_studio(gpt2, {folder: 0.0}), logits(opened(gpt2)))


@pytest.mark.parametrize("name", NAMED)
def test_what_is_no_sum_is_refused_by_name(llama: Path, tmp_path: Path, capsys: Any, name: str) -> None:
    options, reason = NAMED[name]
    folder = trained(llama, tmp_path / "a", **options)
    plain = trained(llama, tmp_path / "plain")
    for door in (lambda: read(folder), lambda: AdaptedModel(opened(llama)).add("a", folder)):
        with pytest.raises(InputError, match=reason):
            door()
    out = str(tmp_path / "out.safetensors")
    for arguments in (
        ["lora", "inspect", str(folder)],
        ["lora", "convert", str(folder), "--out", out],
        ["lora", "merge", str(folder), str(plain), "--out", out],
    ):
        assert command(arguments) == 2, arguments
        assert reason in " ".join(capsys.readouterr().err.split()), arguments
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("option", "value"), [("alora_invocation_tokens", [1]), ("init_lora_weights", "loftq"), ("brand_new_switch", True)]
)
def test_the_same_options_in_a_diffusers_file_are_refused(tmp_path: Path, option: str, value: Any) -> None:
    from safetensors.torch import save_file

    config = json.dumps({"unet.r": 2, "unet.lora_alpha": 2, f"unet.{option}": value})
    name = "unet.mid_block.attentions.0.to_q.lora_"
    save_file({f"{name}A.weight": torch.ones(2, 4), f"{name}B.weight": torch.ones(4, 2)}, tmp_path / "f.safetensors",
              {"lora_adapter_metadata": config})  # fmt: skip
    with pytest.raises(InputError, match=f"{option}|initialised by {value}"):
        read(tmp_path / "f.safetensors")


def test_every_option_of_this_peft_is_known() -> None:
    """A new version of PEFT with an option that is not in the lists fails here, not in somebody's answers."""
    known = USED | WITHOUT_EFFECT | set(REFUSED)
    for kind in (LoraConfig, LoHaConfig, LoKrConfig):
        assert {item.name for item in fields(kind)} <= known


def test_options_that_do_nothing_are_no_reason(llama: Path, tmp_path: Path) -> None:
    folder = trained(llama, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    check_options({**config, "some_size": 16, "some_name": "x", "other": None, "more": [], "off": False}, "it")


def test_magnitudes_that_are_missing_are_said(llama: Path, tmp_path: Path) -> None:
    folder = trained(llama, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(InputError, match="has no magnitude"):
        read(folder)


def test_one_adapter_twice_acts_with_the_sum(llama: Path, tmp_path: Path) -> None:
    from studio.conversation import variants_of

    (variant,) = variants_of([("tone", 0.5), ("tone", 0.25), ("calm", 1.0)], compare=False)
    assert dict(variant.adapters) == {"tone": 0.75, "calm": 1.0}
    assert variant.name == "tone + calm"


def test_scaled_embeddings_as_in_peft() -> None:
    """Gemma multiplies its embeddings; PEFT multiplies the adapter's part too."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    from adapters.formats.lora import LoraLayer
    from adapters.layers.gated import Adapter, GatedAdapters

    torch.manual_seed(0)
    table = Gemma3TextScaledWordEmbedding(20, 8, 0, embed_scale=3.0)
    holder = nn.Sequential(table)
    model = get_peft_model(nn.Sequential(table), LoraConfig(r=2, lora_alpha=4, target_modules=["0"],
                                                            init_lora_weights=False))  # fmt: skip
    layer: Any = model.base_model.model[0]
    A, B = layer.lora_embedding_A["default"].detach(), layer.lora_embedding_B["default"].detach()
    tokens = torch.tensor([[3, 5, 7]])
    wanted = model(tokens)
    with torch.no_grad(), GatedAdapters(
        holder, [Adapter({"0": LoraLayer(A, B, 4.0, embedding=True)})], torch.device("cpu"), torch.float32
    ).attached() as gates:  # fmt: skip
        gates.joint([1.0])
        torch.testing.assert_close(holder(tokens), wanted)
