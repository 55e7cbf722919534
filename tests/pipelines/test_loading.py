"""Opening base models: directories, single files, settings, memory presets, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adapters.errors import InputError, MissingDependencyError
from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.families import FAMILIES, detect
from pipelines.diffusion.loading import choose_attention, choose_device, choose_dtype
from pipelines.diffusion.memory import apply_preset
from tests import tiny
from tests.pipelines.conftest import PROMPT, Bed, latents
from tests.pipelines.single_file import save_single_file


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("sd", tmp_path_factory.mktemp("base"))


def test_settings_are_chosen_and_shown(folder: Path) -> None:
    settings = MultiLoRAPipeline.from_pretrained(folder, device="cpu").settings
    assert (settings.family, settings.dtype, settings.device, settings.attention) == ("sd", "fp32", "cpu", "sdpa")
    assert str(folder) in str(settings)


def test_half_precision(folder: Path, sd: Bed) -> None:
    composer = MultiLoRAPipeline.from_pretrained(folder, dtype="bf16", device="cpu")
    composer.load_lora(sd.files["a"], "a")
    composer.load_lora(sd.files["b"], "b")
    found = latents(composer, "composite")
    assert found.dtype == torch.bfloat16
    assert torch.isfinite(found).all()


def test_directories_with_one_or_two_precisions(folder: Path, tmp_path: Path) -> None:
    """Files may be there in fp16 only, in the common precision only, or in both."""
    pipe = tiny.sd()
    pipe.unet.conv_in.bias.data += 1  # to tell the files apart
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    pipe.save_pretrained(tmp_path / "both", variant="fp16")
    tiny.sd().save_pretrained(tmp_path / "both")
    opened = {
        (name, dtype): MultiLoRAPipeline.from_pretrained(path, dtype=dtype, device="cpu").pipe.unet.conv_in.bias.float()
        for name, path in (("half", tmp_path / "half"), ("both", tmp_path / "both"), ("plain", folder))
        for dtype in ("fp32", "bf16")
    }
    plain, changed = tiny.sd().unet.conv_in.bias, pipe.unet.conv_in.bias
    for key, bias in opened.items():
        wanted = changed if key[0] == "half" or key == ("both", "bf16") else plain
        torch.testing.assert_close(bias, wanted.float(), atol=1e-2, rtol=1e-2)


def test_auto_dtype_by_device_and_family() -> None:
    gpu = torch.device("cuda")
    assert choose_dtype("auto", torch.device("cpu"), FAMILIES["flux"]) == "fp32"
    assert choose_dtype("auto", gpu, FAMILIES["sdxl"]) == "fp16"
    assert choose_dtype("auto", gpu, FAMILIES["sd3"]) == "bf16"


@pytest.mark.parametrize("family", tiny.DRAWN_SMALL)
def test_memory_presets(family: str, beds: Callable[[str], Bed], tmp_path: Path) -> None:
    """A preset that keeps the precision keeps the latents, bit for bit; the other one says that it does not.

    Pictures may differ by one level of 255: decoded one by one, they are rounded otherwise on some processors.
    """
    path = tiny.saved(family, tmp_path)
    pictures: dict[str, Any] = {}
    latents: dict[str, torch.Tensor] = {}
    for memory in ("none", "balanced", "low"):
        composer = MultiLoRAPipeline.from_pretrained(path, memory=memory, device="cpu")
        composer.load_lora(beds(family).files["a"], "a")
        call: dict[str, Any] = {"steps": 2, "width": 32, "height": 32, "images": 2, "seed": 3}
        pictures[memory] = composer.compose("composite")(PROMPT, **call).images
        latents[memory] = composer(PROMPT, **call, output_type="latent").images
        changed = any("changes pictures" in note for note in composer.settings.notes)
        assert changed == (memory == "low")
    for plain, balanced in zip(pictures["none"], pictures["balanced"], strict=True):
        apart = np.asarray(plain, dtype=int) - np.asarray(balanced, dtype=int)
        assert np.abs(apart).max() <= 1
    assert torch.equal(latents["none"], latents["balanced"])
    assert [picture.size for picture in pictures["low"]] == [(32, 32)] * 2


class Recorder:
    """Stands in for a pipeline on an accelerator: records what a preset asks for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name in ("vae", "unet"):
            return self
        return lambda *args, **kwargs: self.asked.append(name)


def test_presets_on_an_accelerator_offload() -> None:
    for preset, call in (("none", "to"), ("balanced", "enable_model_cpu_offload"), ("low", "enable_group_offload")):
        recorder = Recorder()
        apply_preset(recorder, preset, ["unet"], torch.device("cuda"), torch.float16)
        assert call in recorder.asked
        assert ("enable_vae_tiling" in recorder.asked or "enable_tiling" in recorder.asked) == (preset == "low")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("memory", ["none", "balanced", "low"])
def test_offloading_on_a_gpu(folder: Path, sd: Bed, memory: str) -> None:
    composer = MultiLoRAPipeline.from_pretrained(folder, dtype="fp32", device="cuda", memory=memory)
    plain = MultiLoRAPipeline.from_pretrained(folder, dtype="fp32", device="cuda")
    for one in (composer, plain):
        one.load_lora(sd.files["a"], "a")
        one.load_lora(sd.files["b"], "b")
    found = latents(composer, "composite").cpu()
    if memory == "low":
        assert torch.isfinite(found).all()
    else:
        assert torch.equal(found, latents(plain, "composite").cpu())


def test_single_file_gives_the_same_pictures(folder: Path, sd: Bed, tmp_path: Path) -> None:
    path = save_single_file(tiny.sd(), tmp_path / "tiny.safetensors")
    assert detect(path).name == "sd"
    pictures = []
    for composer in (
        MultiLoRAPipeline.from_pretrained(path, config=str(folder), local_files_only=True, device="cpu"),
        MultiLoRAPipeline.from_pretrained(folder, device="cpu"),
    ):
        composer.load_lora(sd.files["a"], "a")
        pictures.append(composer(PROMPT, steps=2).images[0].tobytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("cond_stage_model.model.ln_final.weight", "sd"),
        ("conditioner.embedders.1.model.ln_final.weight", "sdxl"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "sd3"),
        ("double_blocks.0.img_attn.qkv.weight", "flux"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "flux"),
        ("model.diffusion_model.cap_embedder.0.weight", "lumina2"),
        ("time_condition_embed.condition_embedder.linear_1.weight", "cogview4"),
        ("layers.0.self_attention.to_q.weight", "ernie-image"),
        ("blocks.0.cross_attn.q_linear.weight", "sana"),
        ("model.double_layers.0.attn.w1q.weight", "auraflow"),
        ("model.diffusion_model.layers.0.adaLN_modulation.0.weight", "z-image"),
    ],
)
def test_single_files_are_told_apart_by_their_keys(key: str, family: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(1), "model.diffusion_model.x": torch.zeros(1)}, tmp_path / "m.safetensors")
    assert detect(tmp_path / "m.safetensors").name == family


def test_bases_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="neither a directory, a file nor a hub id"):
        detect(tmp_path / "nowhere")
    with pytest.raises(InputError, match="neither a directory, a file nor a hub id"):
        detect("tinymojy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no model_index"):
        detect(tmp_path / "empty")
    (tmp_path / "empty/model_index.json").write_text(json.dumps({"_class_name": "PixArtAlphaPipeline"}))
    with pytest.raises(InputError, match="'PixArtAlphaPipeline'; composition works with StableDiffusionPipeline"):
        detect(tmp_path / "empty")
    (tmp_path / "empty/model_index.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        detect(tmp_path / "empty")
    save_file({"layer.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="no known family"):
        detect(tmp_path / "other.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(InputError, match=r"\.safetensors only"):
        detect(tmp_path / "model.ckpt")

    def offline(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(InputError, match="could not be fetched from the hub: no route"):
        detect("someone/some-model")


def test_choices_that_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="Unknown memory preset"):
        MultiLoRAPipeline.from_pretrained(folder, memory="tiny")
    with pytest.raises(InputError, match="Unknown model family"):
        MultiLoRAPipeline.from_pretrained(folder, family="sd15")
    with pytest.raises(InputError, match="Unknown dtype"):
        choose_dtype("fp8", torch.device("cpu"), FAMILIES["sd"])
    with pytest.raises(InputError, match="cannot be used here"):
        choose_device("nonsense")
    with pytest.raises(InputError, match="attention backend"):
        choose_attention("flash9")
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(MissingDependencyError, match=r"adapter-studio\[xformers\]"):
        choose_attention("xformers")


def test_a_directory_with_missing_parts_is_a_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    with pytest.raises(InputError, match="could not be opened as Stable Diffusion"):
        MultiLoRAPipeline.from_pretrained(tmp_path)


def test_listing_methods_loads_no_model_code() -> None:
    """``studio methods`` imports these modules; diffusers takes seconds and must wait until it is needed."""
    modules = "pipelines.diffusion.methods.composite, pipelines.diffusion.pipeline, adapters.merging.concatenate"
    code = f"import sys, {modules}; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
