"""LTX-2 against diffusers and PEFT: picture and sound of every method, files in the authors' names."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LTX2ImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.errors import InputError
from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.call import Output
from pipelines.diffusion.families import FAMILIES
from pipelines.diffusion.families.ltx2 import diffusers_name
from pipelines.diffusion.regions import Region
from tests import tiny
from tests.pipelines.conftest import PROMPT
from tests.pipelines.test_composition import Watcher

STEPS = 4
SIZE: dict[str, Any] = {"width": 64, "height": 64, "frame_rate": 24.0, "spatio_temporal_guidance_blocks": [1]}
CALL: dict[str, Any] = {"steps": STEPS, "seed": 3, "output_type": "latent", "guidance_scale": 4.0, "frames": 9, **SIZE}


@pytest.fixture(scope="module")
def base() -> Any:
    """One pipeline for all tests, which leave it as it was."""
    return FAMILIES["ltx2"].tiny()


@pytest.fixture(scope="module")
def files(base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ltx2")
    targets = {"a": ("to_q", "to_k", "to_v", "to_out.0"), "b": ("to_q", "ff.net.2", "audio_ff.net.2")}
    return {
        name: tiny.lora_file(base, folder / name, seed=k, rank=k + 1, alpha=3.0, targets=chosen, text_targets=())
        for k, (name, chosen) in enumerate(targets.items(), 1)
    }


def composer(base: Any, files: dict[str, Path], *names: str, **weights: float) -> MultiLoRAPipeline:
    made = MultiLoRAPipeline(base)
    for name in names:
        made.load_lora(files[name], name, weight=weights.get(name, 1.0))
    return made


def ours(made: MultiLoRAPipeline, method: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Latents of picture and sound."""
    how = {key: options.pop(key) for key in list(options) if key in ("tau", "adapter_batch", "fold", "regions")}
    kept: list[Any] = []
    own = type(made.pipe).__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append(own(self, *args, **kwargs))
        return kept[-1]

    call.__signature__ = __import__("inspect").signature(own)  # type: ignore[attr-defined]
    type(made.pipe).__call__ = call
    try:
        found: Output = made.compose(method, **how)(PROMPT, **(CALL | options))
    finally:
        type(made.pipe).__call__ = own
    return found.images, kept[-1].audio


def theirs(pipe: Any, **options: Any) -> tuple[Tensor, Tensor]:
    call = {"guidance_scale": 4.0, "generator": [torch.Generator().manual_seed(3)], "num_frames": 9, **SIZE}
    out = pipe(prompt=PROMPT, num_inference_steps=STEPS, output_type="latent", **(call | options))
    return out.frames, out.audio


def stock(files: dict[str, Path], *names: str) -> Any:
    pipe = FAMILIES["ltx2"].tiny()
    for name in names:
        pipe.load_lora_weights(files[name], adapter_name=name)
    return pipe


def close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max() / other.abs().max().clamp(min=1)) <= 1e-4


def test_merge_and_schedules(base: Any, files: dict[str, Path]) -> None:
    pipe = stock(files, "a", "b")
    pipe.transformer.set_adapters(["a", "b"], [0.8, 0.5])
    wanted = theirs(pipe)
    made = composer(base, files, "a", "b", a=0.8, b=0.5)
    close(ours(made, "merge"), wanted)
    close(ours(made, "merge", fold=False), wanted)
    assert not torch.allclose(wanted[1], theirs(base)[1], atol=1e-2)

    def fading(pipe: Any, index: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.transformer.set_adapters(["a", "b"], [1 - (index + 1) / STEPS, 1.0])
        return {}

    pipe.transformer.set_adapters(["a", "b"], [1.0, 1.0])
    wanted = theirs(pipe, callback_on_step_end=fading)
    made = MultiLoRAPipeline(base)
    made.load_lora(files["a"], "a", schedule=[(0, 1), (1, 0)])
    made.load_lora(files["b"], "b")
    close(ours(made, "merge"), wanted)


@torch.no_grad()
def test_composite_and_switch(base: Any, files: dict[str, Path]) -> None:
    pipe = stock(files, "a", "b")

    def turning(pipe: Any, index: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.transformer.set_adapters(["ab"[(index + 1) % 2]], [1.0])
        return {}

    pipe.transformer.set_adapters(["a"], [1.0])
    made = composer(base, files, "a", "b")
    close(ours(made, "switch"), theirs(pipe, callback_on_step_end=turning))
    model, own = pipe.transformer, pipe.transformer.forward

    def averaged(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        passes = []
        for name in ("a", "b"):
            model.set_adapters([name], [1.0])
            passes.append(own(*args, **kwargs))
        return tuple(torch.stack(both).mean(0) for both in zip(*passes, strict=True))

    model.forward = averaged
    wanted = theirs(pipe)
    close(ours(made, "composite"), wanted)
    close(ours(made, "composite", adapter_batch=1, fold=False), wanted)


def test_everything_is_restored(base: Any, files: dict[str, Path]) -> None:
    from adapters.errors import Cancelled

    plain = theirs(base)
    for method in ("merge", "composite", "cmlora"):
        made = composer(base, files, "a", "b")
        ours(made, method, steps=5)
        with pytest.raises(Cancelled):
            ours(made, method, monitor=Watcher(stop_after=2))
    modules = list(base.transformer.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in modules)
    close(theirs(base), plain)


def test_one_adapter_is_plain_lora_with_cached_predictions(base: Any, files: dict[str, Path]) -> None:
    made = composer(base, files, "a")
    close(ours(made, "cmlora"), ours(made, "merge"))


def test_frames_and_sound(base: Any, files: dict[str, Path]) -> None:
    watcher = Watcher()
    made = composer(base, files, "a")
    out = made(PROMPT, **(CALL | {"output_type": "pil", "steps": 2}), monitor=watcher, preview_every=1)
    assert (len(out.images[0]), out.images[0][0].size) == (9, (64, 64))
    assert watcher.reports[0].preview.size == (64, 64)
    assert out.sound[0].rate == 16000
    assert out.sound[0].samples.shape[0] == 2
    with pytest.raises(InputError, match="multiple of 8 plus 1 for this model, got 12: take 9 or 17"):
        made(PROMPT, **(CALL | {"frames": 12}))
    with pytest.raises(InputError, match="LTX-2 has no regions"):
        made.compose("output", regions=[Region(("a",), box=(0, 0, 0.5, 1))])


def test_the_first_frame_is_a_given_picture(base: Any, files: dict[str, Path]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    made = composer(base, files, "a", "b", a=0.7).for_task("image")
    found = ours(made, "merge", image=picture, image_crf=0)
    pipe = LTX2ImageToVideoPipeline(**base.components)
    for name in "ab":
        pipe.load_lora_weights(files[name], adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.7, 1.0])
    try:
        close(found, theirs(pipe, image=picture, image_crf=0))
    finally:
        pipe.unload_lora_weights()


@pytest.mark.skipif(find_spec("av") is not None, reason="PyAV is installed")
def test_a_start_picture_needs_the_package_that_compresses_it(base: Any, files: dict[str, Path]) -> None:
    made = composer(base, files, "a").for_task("image")
    with pytest.raises(InputError, match="lacks a package: PyAV is required"):
        made(PROMPT, image=Image.new("RGB", (64, 64)), **CALL)


def test_foreign_files_are_diffusers_deltas(base: Any, tmp_path: Path) -> None:
    """The authors' names: every layer, and the same update as diffusers' own converter makes of the file."""
    targets = ("to_q", "ff.net.2", "proj_in", "audio_proj_in", "linear")
    whole = load_file(tiny.lora_file(base, tmp_path, targets=targets, text_targets=()))
    renames = {
        "audio_proj_in": "audio_patchify_proj", "proj_in": "patchify_proj",
        "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
        "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
        "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
        "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
        "audio_time_embed": "audio_adaln_single", "time_embed": "adaln_single",
    }  # fmt: skip
    tensors = {}
    for key, tensor in whole.items():
        name = key.removeprefix("transformer.")
        old = next((old for old in renames if name.startswith(old)), None)
        written = name if old is None else renames[old] + name.removeprefix(old)
        assert diffusers_name(written) == name
        tensors[f"diffusion_model.{written}"] = tensor
    save_file(tensors, tmp_path / "foreign.safetensors")
    made = MultiLoRAPipeline(base)
    made.load_lora(tmp_path / "foreign.safetensors", "x")
    found = made.rack.loaded["x"].file.parts["transformer"]
    converted = type(base).lora_state_dict(str(tmp_path / "foreign.safetensors"))
    wanted = {key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in converted if "lora_A" in key}
    assert set(found) == wanted
    for name, layer in found.items():
        product = converted[f"transformer.{name}.lora_B.weight"] @ converted[f"transformer.{name}.lora_A.weight"]
        torch.testing.assert_close(layer.delta(), product.float())
    from studio.library import facts

    assert facts.adapter(tmp_path / "foreign.safetensors")["family"] == "ltx2"


def test_connectors_and_training_are_refused(base: Any, files: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(files["a"])
    tensors |= {f"connectors.text_proj_in.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="also changes LTX-2's text connectors"):
        MultiLoRAPipeline(base).load_lora(tmp_path / "x.safetensors")
    from studio.training.families import family_of

    with pytest.raises(InputError, match="not trained here"):
        family_of(base)
