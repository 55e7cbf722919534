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


def test_inspect_of_a_file_without_an_ending(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter").write_bytes(b"something")
    code, _, error = ask(capsys, "lora", "inspect", tmp_path / "adapter")
    assert code == 2
    assert "has no ending" in error
