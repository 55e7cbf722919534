"""The measured accuracy of written files, against dense matrices in fp64."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters import formats
from adapters.errors import InputError
from adapters.formats.lora import LoraFile, LoraLayer
from adapters.merging.accuracy import ENTRY, measure, sums_of, write_checked
from adapters.merging.concatenate import concatenate, summands

NAMES = ("down_blocks.0.attentions.0.to_q", "down_blocks.0.attentions.0.to_k")


def adapter(seed: int, rank: int = 3, dtype: torch.dtype = torch.float32, **other: Any) -> LoraFile:
    torch.manual_seed(seed)
    layers = {
        name: LoraLayer(torch.randn(rank, 24).to(dtype), torch.randn(16, rank).to(dtype), alpha=1.5, **other)
        for name in NAMES
    }
    return LoraFile(
        {"unet": layers, "text_encoder": {"text_model.encoder.layers.0.self_attn.q_proj": layers[NAMES[0]]}}
    )


def dense_error(path: Path, files: list[LoraFile], weights: list[float]) -> float:
    """The same number from whole matrices."""
    written, worst = formats.read(path), 0.0
    for component, module, layer in written.layers():
        parts = [file.parts[component][module] for file in files]
        exact = sum(w * p.scale * (p.B.double() @ p.A.double()) for w, p in zip(weights, parts, strict=True))
        found = layer.scale * (layer.B.double() @ layer.A.double())
        worst = max(worst, float((found - exact).norm() / exact.norm()))
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 4])
def test_error_of_a_merge_is_that_of_whole_matrices(tmp_path: Path, dtype: torch.dtype, rank: int | None) -> None:
    files, weights = [adapter(1), adapter(2, rank=5)], [0.8, -0.3]
    merged = concatenate(files, weights, rank=rank).file
    parts = {
        c: {m: replace(x, A=x.A.to(dtype), B=x.B.to(dtype)) for m, x in y.items()} for c, y in merged.parts.items()
    }
    path, found = write_checked(
        replace(merged, parts=parts), tmp_path / "m.safetensors", "diffusers", summands(files, weights), rank is None
    )
    wanted = dense_error(path, files, weights)
    assert found.error == pytest.approx(wanted, rel=1e-6, abs=1e-13)
    assert found.layers == 3
    assert found.at.startswith(("unet.", "text_encoder."))
    assert found.error < {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype] or rank
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()[ENTRY]) == {"error": found.error, "at": found.at, "layers": 3}


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("other", [{}, {"rslora": True}, {"magnitude": torch.rand(16) + 1}])
def test_conversions_are_exact_up_to_rounding(tmp_path: Path, format: str, other: dict[str, Any]) -> None:
    file = adapter(1, **other)
    _, found = write_checked(file, tmp_path / ("a" if format == "peft" else "a.safetensors"), format, sums_of(file))
    assert found.layers == 3
    assert found.error < 1e-6


def test_convolutions_and_tables_are_compared(tmp_path: Path) -> None:
    conv = LoraLayer(torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1), alpha=1.0)
    file = LoraFile({"unet": {"conv_in": conv}})
    assert write_checked(file, tmp_path / "a.safetensors", "kohya", sums_of(file))[1].error < 1e-6
    table = LoraFile({"model": {"embed": LoraLayer(torch.randn(2, 9), torch.randn(6, 2), 1.0, embedding=True)}})
    assert write_checked(table, tmp_path / "b", "peft", sums_of(table))[1].error < 1e-6


def test_what_does_not_hold_the_adapters_is_refused_and_not_kept(tmp_path: Path) -> None:
    files = [adapter(1), adapter(2)]
    sums = summands(files, [1.0, 1.0])
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(InputError, match=r"does not contain the adapters: in 'text_encoder.* it differs by 0\.7"):
        write_checked(files[0], path, "diffusers", sums)
    with pytest.raises(InputError, match="1 of their 3 layers are missing from it, such as 'text_encoder"):
        write_checked(LoraFile({"unet": concatenate(files, [1, 1]).file.parts["unet"]}), path, "diffusers", sums)
    assert path.read_bytes() == b"before"


def test_a_file_damaged_on_its_way_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter that scales one layer wrongly, as real ones did."""
    file = adapter(1)
    write = formats.write

    def wrong(file: LoraFile, path: Path, format: str, metadata: Any = None) -> Path:
        made = write(file, path, format, metadata)
        tensors = load_file(made)
        name = next(name for name in tensors if "to_k.lora_B" in name)
        save_file({**tensors, name: tensors[name] * 1.5}, made)
        return made

    monkeypatch.setattr(formats, "write", wrong)
    with pytest.raises(InputError, match=r"in 'unet\.down_blocks\.0\.attentions\.0\.to_k' it differs by 0\.5 "):
        write_checked(file, tmp_path / "a.safetensors", "diffusers", sums_of(file))


def test_adapters_that_cancel_each_other(tmp_path: Path) -> None:
    """Their sum is smaller than what rounding leaves: reported, not refused."""
    first = adapter(1)
    tiny = {n: replace(x, B=x.B + 1e-6 * torch.randn_like(x.B)) for n, x in first.parts["unet"].items()}
    files = [LoraFile({"unet": first.parts["unet"]}), LoraFile({"unet": tiny})]
    merged = concatenate(files, [1.0, -1.0])
    path, found = write_checked(merged.file, tmp_path / "a.safetensors", "diffusers", summands(files, [1.0, -1.0]))
    assert found.error == pytest.approx(dense_error(path, files, [1.0, -1.0]), rel=1e-3, abs=1e-9)


def test_measure_of_no_change() -> None:
    zero = LoraFile({"unet": {n: replace(x, B=torch.zeros_like(x.B)) for n, x in adapter(1).parts["unet"].items()}})
    assert measure(zero, sums_of(zero)).error == 0
