"""Adapters beside quantised layers, against diffusers and PEFT on the same quantised base.

Reference and pipeline add the same products in another order, in fp32: TOLERANCE is relative to the largest value of
the latents after four steps.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapters.compression import backends
from adapters.compression.storage import plain_weight, storage
from adapters.errors import InputError, MissingDependencyError
from adapters.layers import folded
from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.families import FAMILIES
from tests import tiny
from tests.pipelines.conftest import close, latents, peft_latents

TOLERANCE = 1e-4
ROUNDED = 1e-2
"""LLM.int8 also rounds the inputs of a layer to 8 bits, where another order of sums may round another way."""

STORED = {"8bit": "int8", "4bit": "nf4", "int8": "torchao int8", "int4": "torchao int4"}
GGUF = ("Q8_0", "Q4_0")
WIDE = {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
"""A tiny Flux whose layers have a multiple of 32 inputs."""


def installed(package: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package} (extra 'quantized')")


EACH = [pytest.param(name, marks=installed(backends.PACKAGES[name])) for name in STORED]
EACH_FILE = [pytest.param(f"gguf {kind}", marks=installed("gguf")) for kind in GGUF]


def wide(family: str) -> Any:
    return FAMILIES[family].tiny(**(WIDE if family == "flux" else {}))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """Three adapters for the denoiser of a family."""
    made: dict[str, dict[str, Path]] = {}

    def adapters(family: str) -> dict[str, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = {
                name: tiny.lora_file(wide(family), folder / name, seed=seed, rank=rank, alpha=alpha, text_targets=())
                for name, seed, rank, alpha in (("a", 1, 2, 4.0), ("b", 2, 3, 1.5), ("c", 3, 2, 2.0))
            }
        return made[family]

    return adapters


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(the base's directory, its denoiser as a GGUF file) by type of the weights."""
    folder = tmp_path_factory.mktemp("gguf")
    made: dict[str, Path] = {}

    def written(kind: str) -> tuple[Path, Path]:
        if not made:
            made["base"] = folder / "base"
            wide("flux").save_pretrained(made["base"])
        if kind not in made:
            made[kind] = write_gguf(wide("flux").transformer, folder / f"{kind}.gguf", kind)
        return made["base"], made[kind]

    return written


def write_gguf(model: nn.Module, path: Path, kind: str) -> Path:
    """The weights of ``model`` in a GGUF file, those of its linear layers in a type of few bits."""
    import gguf

    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.in_features % 32 == 0
    }
    writer = gguf.GGUFWriter(path, "flux")
    for name, value in model.state_dict().items():
        numbers, stored = value.float().numpy(), gguf.GGMLQuantizationType.F32
        if name in linear:
            stored = gguf.GGMLQuantizationType[kind]
            numbers = gguf.quantize(numbers, stored)
        writer.add_tensor(name, numbers, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def base(gguf_files: Callable[[str], tuple[Path, Path]]) -> Callable[[str, str], Any]:
    """A diffusers pipeline with a quantised denoiser, always with the same weights."""

    def made(family: str, name: str) -> Any:
        if not name.startswith("gguf"):
            pipe = wide(family)
            getattr(pipe, tiny.denoiser_name(pipe)).eval()
            backends.quantize(getattr(pipe, tiny.denoiser_name(pipe)), name, torch.float32)
            return pipe
        import diffusers

        place, path = gguf_files(name.split()[1])
        transformer = diffusers.FluxTransformer2DModel.from_single_file(
            path, config=str(place), subfolder="transformer", dtype=torch.float32,
            quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        )  # fmt: skip
        pipe = diffusers.FluxPipeline.from_pretrained(place, transformer=transformer)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return made


def tolerance(name: str) -> float:
    return ROUNDED if name == "8bit" else TOLERANCE


CASES = [
    *(pytest.param(family, *case.values, marks=case.marks) for family in ("sd", "flux") for case in EACH),
    *(pytest.param("flux", *case.values, marks=case.marks) for case in EACH_FILE),
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_merge_equals_set_adapters(family: str, name: str, base: Any, files: Any) -> None:
    pipe, weights = base(family, name), {"a": 0.8, "b": 0.5, "c": -0.4}
    for adapter in weights:
        pipe.load_lora_weights(files(family)[adapter], adapter_name=adapter)
    pipe.set_adapters(list(weights), list(weights.values()))
    composer = MultiLoRAPipeline(base(family, name))
    for adapter, weight in weights.items():
        composer.load_lora(files(family)[adapter], adapter, weight=weight)
    close(latents(composer, "merge"), peft_latents(pipe), tolerance(name))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_switch_and_composite_equal_separate_runs(family: str, name: str, base: Any, files: Any) -> None:
    """The reference asks diffusers' denoiser with one adapter after another; prompts are the same for all."""
    composer = MultiLoRAPipeline(base(family, name))
    pipe = base(family, name)
    for adapter in "abc":
        composer.load_lora(files(family)[adapter], adapter)
        pipe.load_lora_weights(files(family)[adapter], adapter_name=adapter)
    denoiser = getattr(pipe, tiny.denoiser_name(pipe))
    plain, calls = type(denoiser).forward, []

    def switched(*args: Any, **kwargs: Any) -> Any:
        pipe.set_adapters(["abc"[len(calls) % 3]])
        calls.append(1)
        return plain(denoiser, *args, **kwargs)

    def averaged(*args: Any, **kwargs: Any) -> Any:
        found = []
        for adapter in "abc":
            pipe.set_adapters([adapter])
            found.append(plain(denoiser, *args, **kwargs | {"return_dict": False})[0])
        return (torch.stack(found).mean(0),)

    for method, forward in (("switch", switched), ("composite", averaged)):
        denoiser.forward = forward
        close(latents(composer, method), peft_latents(pipe), tolerance(name))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_weights_stay_as_they_are_and_nothing_is_folded(family: str, name: str, base: Any, files: Any) -> None:
    composer = MultiLoRAPipeline(base(family, name))
    composer.load_lora(files(family)["a"], "a")
    denoiser = composer.rack.denoiser
    before = {path: module for path, module in denoiser.named_modules() if storage(module)}
    assert {storage(module) for module in before.values()} == {STORED.get(name, name.lower())}
    numbers = {path: plain_weight(module).clone() for path, module in before.items()}
    joined = composer.rack.joined(None).denoiser
    assert not any(folded.foldable(layer.module) for layer in joined.layers if layer.name in before)
    if family == "flux":
        assert joined.foldable_bytes() == 0
        assert composer.compose("merge").plan(25).folds.memory == 0
    latents(composer, "merge")
    after = {path: module for path, module in denoiser.named_modules() if storage(module)}
    assert after == before
    assert all(torch.equal(plain_weight(module), numbers[path]) for path, module in after.items())


@pytest.mark.parametrize("name", [*EACH, *EACH_FILE])
def test_plain_weight_is_what_the_layer_multiplies_with(name: str, base: Any) -> None:
    denoiser = base("flux", name).transformer
    module = denoiser.transformer_blocks[0].attn.to_q
    x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0))
    close(module(x) - module.bias, x @ plain_weight(module).T, tolerance(name) / 10 if name != "8bit" else ROUNDED)


@pytest.mark.parametrize("name", [*EACH, *EACH_FILE])
def test_dora_on_quantised_layers_equals_peft(name: str, base: Any, tmp_path: Path) -> None:
    path = tiny.lora_file(wide("flux"), tmp_path, text_targets=(), use_dora=True)
    pipe = base("flux", name)
    if name.startswith("gguf") or name == "8bit":
        wanted = None  # PEFT has no DoRA there: it reads codes as weights
    else:
        pipe.load_lora_weights(path, adapter_name="a")
        wanted = peft_latents(pipe)
    composer = MultiLoRAPipeline(base("flux", name))
    composer.load_lora(path, "a")
    if wanted is None:
        pipe = wide("flux")
        for place, module in base("flux", name).transformer.named_modules():
            if storage(module):
                pipe.transformer.get_submodule(place).weight.data = plain_weight(module)
        pipe.load_lora_weights(path, adapter_name="a")
        wanted = peft_latents(pipe)
    close(latents(composer, "merge"), wanted, tolerance(name))


@pytest.mark.parametrize("name", EACH)
def test_opened_quantised(name: str, tmp_path: Path) -> None:
    wide("flux").save_pretrained(tmp_path / "base")
    composer = MultiLoRAPipeline.from_pretrained(tmp_path / "base", device="cpu", quantization=name)
    assert storage(composer.rack.denoiser.transformer_blocks[0].attn.to_q) == STORED[name]
    assert f"quantization {name}" in str(composer.settings)
    same = wide("flux")
    backends.quantize(same.transformer, name, torch.float32)
    close(latents(composer, "merge"), latents(MultiLoRAPipeline(same), "merge"), 1e-6)


@installed("bitsandbytes")
def test_plain_weight_of_a_layer_that_bitsandbytes_packed_for_the_cpu() -> None:
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    backends.quantize(model, "4bit", torch.float32)
    layer: Any = model[0]
    before = plain_weight(layer)
    layer.support_avx512bf16_for_cpu = layer.support_avx512bf16_for_cpu or _has_kernel()
    with torch.no_grad():
        model(torch.randn(2, 64))
    assert (plain_weight(layer) - before).abs().max() <= 2**-8 * before.abs().max()  # scales are kept in bf16


def _has_kernel() -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


@installed("torchao")
def test_torchao_layers_are_those_of_diffusers(tmp_path: Path) -> None:
    import diffusers
    from torchao.quantization import Int8WeightOnlyConfig

    wide("flux").transformer.save_pretrained(tmp_path)
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=diffusers.TorchAoConfig(Int8WeightOnlyConfig(version=2))
    )
    ours = wide("flux").transformer
    backends.quantize(ours, "int8", torch.float32)
    for path, module in theirs.named_modules():
        if storage(module):
            assert torch.equal(plain_weight(module), plain_weight(ours.get_submodule(path)))
    assert sum(map(bool, map(storage, ours.modules()))) == sum(map(bool, map(storage, theirs.modules())))


@installed("gguf")
def test_denoiser_from_a_gguf_file(gguf_files: Any, base: Any, files: Any) -> None:
    place, path = gguf_files("Q8_0")
    composer = MultiLoRAPipeline.from_pretrained(place, device="cpu", denoiser=path)
    assert storage(composer.rack.denoiser.transformer_blocks[0].attn.to_q) == "gguf q8_0"
    composer.load_lora(files("flux")["a"], "a")
    pipe = base("flux", "gguf Q8_0")
    pipe.load_lora_weights(files("flux")["a"], adapter_name="a")
    close(latents(composer, "merge"), peft_latents(pipe), TOLERANCE)
    with pytest.raises(InputError, match="quantised already"):
        MultiLoRAPipeline.from_pretrained(place, denoiser=path, quantization="int8")
    with pytest.raises(InputError, match="memory preset 'low'"):
        MultiLoRAPipeline.from_pretrained(place, denoiser=path, memory="low")


@installed("gguf")
def test_denoiser_of_another_model_is_refused(gguf_files: Any, tmp_path: Path) -> None:
    tiny.flux().save_pretrained(tmp_path / "narrow")
    with pytest.raises(InputError, match=r"Q8_0\.gguf"):
        MultiLoRAPipeline.from_pretrained(tmp_path / "narrow", device="cpu", denoiser=gguf_files("Q8_0")[1])


def test_choices_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.flux().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="Unknown quantization '2bit': use one of none, 8bit"):
        MultiLoRAPipeline.from_pretrained(tmp_path, quantization="2bit")
    with pytest.raises(InputError, match="There is no denoiser 'nowhere"):
        MultiLoRAPipeline.from_pretrained(tmp_path, device="cpu", denoiser="nowhere.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"bitsandbytes.*adapter-studio\[quantized\]"):
        MultiLoRAPipeline.from_pretrained(tmp_path, quantization="4bit")
    with pytest.raises(MissingDependencyError, match="torchao"):
        MultiLoRAPipeline.from_pretrained(tmp_path, quantization="int8")
