"""``studio lora extract`` and what ``inspect`` says of files it cannot read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.formats import read
from studio.cli.app import run
from tests import tiny
from tests.pipelines.test_ed_lora import checkpoint


def ask(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run([str(word) for word in arguments])
    return code, *capsys.readouterr()


def test_extract_finds_what_was_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.saved("sd", tmp_path / "base")
    tuned = tiny.saved("sd", tmp_path / "tuned")
    weights = tuned / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in sorted(tensors) if name.endswith("attn1.to_q.weight"))
    change = torch.randn(tensors[name].shape[0], 1) @ torch.randn(1, tensors[name].shape[1])
    tensors[name] = tensors[name] + change
    save_file(tensors, weights, metadata={"format": "pt"})
    out = tmp_path / "made.safetensors"
    code, text, _ = ask(capsys, "lora", "extract", base, tuned, "--energy", 0.999, "--out", out, "--json")
    assert code == 0
    result = json.loads(text)
    module = name.removesuffix(".weight")
    assert list(result["errors"]) == [f"unet.{module}"]
    assert result["errors"][f"unet.{module}"] < 1e-3
    torch.testing.assert_close(read(out).parts["unet"][module].delta(), change, rtol=1e-3, atol=1e-4)

    assert "nothing to extract" in ask(capsys, "lora", "extract", base, base, "--rank", 2, "--out", out)[2]
    assert "how much to keep" in ask(capsys, "lora", "extract", base, tuned, "--out", out)[2]


def test_an_ed_lora_to_diffusers_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = checkpoint(tmp_path / "hina.pth")
    assert ask(capsys, "lora", "convert", first, "--to", "diffusers", "-o", tmp_path / "hina.safetensors")[0] == 0
    assert (
        ask(capsys, "lora", "convert", tmp_path / "hina.safetensors", "--to", "ed-lora", "-o", tmp_path / "b.pth")[0]
        == 0
    )
    made, wanted = read(tmp_path / "b.pth"), read(first)
    assert torch.equal(made.embeddings["<hina>"], wanted.embeddings["<hina>"])
    for (_, name, layer), (_, other, same) in zip(made.layers(), wanted.layers(), strict=True):
        assert name == other
        torch.testing.assert_close(layer.delta(), same.delta())
    code, _, error = ask(capsys, "lora", "convert", first, "--to", "ed-lora", "-o", tmp_path / "c.safetensors")
    assert (code, "must end in .pth" in error) == (2, True)


def test_inspect_of_a_file_without_an_ending(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter").write_bytes(b"something")
    code, _, error = ask(capsys, "lora", "inspect", tmp_path / "adapter")
    assert code == 2
    assert "has no ending" in error
