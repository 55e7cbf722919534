"""Adapters on tables of embeddings mean what PEFT means by them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from adapters.errors import FamilyError, InputError
from adapters.formats import LoraFile, read, write_diffusers, write_kohya, write_peft
from adapters.formats.fit import fit
from adapters.formats.lora import MODEL
from adapters.inspection.forgetting import added
from adapters.inspection.intruders import between, inspect, soften, weights_of
from adapters.layers.variant import read_layers
from adapters.merging.concatenate import concatenate
from adapters.merging.lego import lego
from adapters.merging.linear import svd
from adapters.merging.ties import ties
from pipelines.language.adapters import AdaptedModel
from tests.language import tiny

TABLE = {"llama": "model.embed_tokens", "gpt2": "transformer.wte"}


def make(folder: Path, architecture: str = "llama") -> Path:
    return tiny.llama(folder / "base") if architecture == "llama" else tiny.gpt2(folder / "base")


def opened(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def adapter(base: Path, folder: Path, seed: int = 0, **options: Any) -> Any:
    """A PEFT adapter with random A and B, saved in ``folder``."""
    last = "wte" if "GPT2" in json.loads((base / "config.json").read_text())["architectures"][0] else "embed_tokens"
    torch.manual_seed(seed)
    targets = [last, "c_attn" if last == "wte" else "q_proj"]
    model = get_peft_model(opened(base), LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": targets} | options)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.1)
            elif "magnitude" in name:
                parameter.mul_(1.3)
    model.save_pretrained(folder)
    return model


def merged(model: Any, table: str) -> Tensor:
    return model.merge_and_unload().get_submodule(table).weight.detach()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_table_changes_as_peft_changes_it(architecture: str, tmp_path: Path) -> None:
    base, table = make(tmp_path, architecture), TABLE[architecture]
    wanted = merged(adapter(base, tmp_path / "a"), table)
    model = opened(base)
    file = fit(read(tmp_path / "a"), {MODEL: model})
    layer = file.parts[MODEL][table]
    assert layer.embedding
    assert not torch.equal(wanted, model.get_submodule(table).weight)
    torch.testing.assert_close(model.get_submodule(table).weight.detach() + layer.delta().T, wanted)
    with added({MODEL: model}, file):
        torch.testing.assert_close(model.get_submodule(table).weight.detach(), wanted)


def test_dora_rescales_the_table_as_peft_does(tmp_path: Path) -> None:
    base, table = make(tmp_path), TABLE["llama"]
    wanted = merged(adapter(base, tmp_path / "a", use_dora=True), table)
    layer = read(tmp_path / "a").parts[MODEL][table]
    total = opened(base).get_submodule(table).weight.detach().T + layer.delta()
    assert layer.magnitude is not None
    tuned = total * (layer.magnitude / torch.linalg.vector_norm(total, dim=1))[:, None]
    torch.testing.assert_close(tuned.T, wanted)


@pytest.mark.parametrize("rslora", [False, True])
def test_round_trip_through_our_writer_loads_in_peft(rslora: bool, tmp_path: Path) -> None:
    base = make(tmp_path)
    first = adapter(base, tmp_path / "a", use_rslora=rslora, alpha_pattern={"embed_tokens": 2})
    write_peft(read(tmp_path / "a"), tmp_path / "b")
    again = PeftModel.from_pretrained(opened(base), str(tmp_path / "b")).eval()
    tokens = torch.tensor([[5, 9, 70, 2]])
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, first.eval()(tokens).logits)


def test_a_model_in_memory_gives_the_adapter(tmp_path: Path) -> None:
    base = make(tmp_path)
    model = adapter(base, tmp_path / "a")
    held = {name.removeprefix("base_model.model."): layer for name, layer in read_layers(model).items()}
    for name, layer in read(tmp_path / "a").parts[MODEL].items():
        torch.testing.assert_close(held[name].delta(), layer.delta())
        assert held[name].embedding is layer.embedding


@pytest.mark.parametrize("merge", [concatenate, svd, ties, lego])
def test_merges_keep_the_table_a_table(merge: Any, tmp_path: Path) -> None:
    base = make(tmp_path)
    files = []
    for seed in (0, 1):
        adapter(base, tmp_path / str(seed), seed)
        files.append(read(tmp_path / str(seed)))
    made = merge(files, [0.5, 1.0]).file
    assert made.tables() == (f"{MODEL}.{TABLE['llama']}",)
    write_peft(made, tmp_path / "merged")
    model = PeftModel.from_pretrained(opened(base), str(tmp_path / "merged"))
    change = merged(model, TABLE["llama"]) - opened(base).get_submodule(TABLE["llama"]).weight.detach()
    torch.testing.assert_close(change.T, made.parts[MODEL][TABLE["llama"]].delta(), atol=1e-5, rtol=1e-4)
    if merge is concatenate:
        exact = sum(w * f.parts[MODEL][TABLE["llama"]].delta() for w, f in zip([0.5, 1.0], files, strict=True))
        torch.testing.assert_close(change.T, exact, atol=1e-5, rtol=1e-4)


def test_intruders_of_the_adapter_are_those_of_the_merged_model(tmp_path: Path) -> None:
    base = make(tmp_path)
    tuned = adapter(base, tmp_path / "a", r=1, lora_alpha=60).merge_and_unload()
    models = {MODEL: opened(base)}
    file = fit(read(tmp_path / "a"), models)
    report, found = inspect(file, weights_of(models), k=5)
    other = between(models, {MODEL: tuned})
    wanted = inspect(other, weights_of(models), k=5)[0]
    name = f"{MODEL}.{TABLE['llama']}"
    ours, theirs = ({layer.name: layer for layer in one.layers}[name] for one in (report, wanted))
    assert ours.shape == (32, models[MODEL].get_submodule(TABLE["llama"]).num_embeddings)
    assert ours.intruders == theirs.intruders > 0
    assert other.parts[MODEL][TABLE["llama"]].embedding
    softened = soften(file, found, 0.0)[0]
    assert inspect(softened, weights_of(models), k=5)[0].total < report.total
    assert softened.tables() == file.tables()


def test_a_language_model_speaks_with_it(tmp_path: Path) -> None:
    base = make(tmp_path)
    wanted = adapter(base, tmp_path / "a").eval()
    adapted = AdaptedModel(opened(base))
    adapted.add("a", tmp_path / "a")
    tokens = torch.tensor([[5, 9, 70, 2]])
    with torch.no_grad(), adapted.active({"a": 1.0}) as model:
        torch.testing.assert_close(model(tokens).logits, wanted(tokens).logits)


def test_another_table_beside_the_adapter_is_refused(tmp_path: Path) -> None:
    base = make(tmp_path)
    adapter(base, tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(weights)
    copies = [key for key in tensors if key.endswith(".base_layer.weight")]
    assert copies, "PEFT writes the table beside its adapter"
    tensors[copies[0]][3, 4] += 0.01
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(FamilyError, match=r"'model.embed_tokens', which is not that of this base model"):
        fit(read(tmp_path / "a"), {MODEL: opened(base)})
    with pytest.raises(FamilyError, match="which is not that of this base model"):
        AdaptedModel(opened(base)).add("a", tmp_path / "a")


def test_linear_names_on_a_table_are_read_as_a_table(tmp_path: Path) -> None:
    base = make(tmp_path)
    adapter(base, tmp_path / "a")
    file = read(tmp_path / "a")
    plain = {MODEL: {name: replace(layer, embedding=False) for name, layer in file.parts[MODEL].items()}}
    write_peft(LoraFile(plain), tmp_path / "b")
    assert "lora_A.weight" in " ".join(load_file(tmp_path / "b" / "adapter_model.safetensors"))
    fitted = fit(read(tmp_path / "b"), {MODEL: opened(base)})
    assert fitted.tables() == file.tables()
    torch.testing.assert_close(fitted.parts[MODEL][TABLE["llama"]].delta(), file.parts[MODEL][TABLE["llama"]].delta())
    answers = []
    for name in ("a", "b"):  # PEFT itself would leave the second out without a word
        adapted = AdaptedModel(opened(base))
        adapted.add(name, tmp_path / name)
        with torch.no_grad(), adapted.active({name: 1.0}) as model:
            answers.append(model(torch.tensor([[5, 9, 70, 2]])).logits)
    assert torch.equal(*answers)


class Text(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.token_embedding = table


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (nn.Embedding(7, 5), {"tables": False}, "only adapters on linear layers and convolutions can be used here"),
        (nn.Linear(7, 5), {}, "in this base model that is a Linear"),
        (nn.Embedding(5, 7), {}, r"updates a weight of shape \(5, 7\), the model's is \(7, 5\)"),
    ],
)
def test_where_a_table_cannot_be_used(table: nn.Module, options: Any, message: str, tmp_path: Path) -> None:
    name = "text_encoder.token_embedding.lora_embedding_"
    save_file({f"{name}A": torch.ones(2, 7), f"{name}B": torch.ones(5, 2)}, tmp_path / "f.safetensors")
    file = read(tmp_path / "f.safetensors")
    with pytest.raises(InputError, match=message):
        fit(file, {"text_encoder": Text(table)}, **options)
    for write in (write_kohya, write_diffusers):
        with pytest.raises(InputError, match=r"embeddings 'text_encoder.token_embedding'.*use the peft format"):
            write(file, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_half_a_table_is_refused(tmp_path: Path) -> None:
    name = "text_encoder.token_embedding.lora_embedding_"
    save_file({f"{name}A": torch.ones(2, 7)}, tmp_path / "f.safetensors")
    with pytest.raises(InputError, match="has no table_B"):
        read(tmp_path / "f.safetensors")
    save_file({f"{name}A": torch.ones(2, 7), f"{name}B": torch.ones(5, 3)}, tmp_path / "f.safetensors")
    with pytest.raises(InputError, match="do not fit together"):
        read(tmp_path / "f.safetensors")
