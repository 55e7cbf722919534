"""Every pipeline of a family with adapters, against diffusers doing the same; diffusers' own argument names."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from adapters.errors import InputError
from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.families import FAMILIES, family_of
from tests import tiny
from tests.pipelines.conftest import CALL, PROMPT, Bed, close, latents

SHORT: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent"}
IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
MASK = torch.zeros(1, 1, 32, 32)
MASK[..., 8:24, 4:20] = 1
PICTURE = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(IMAGE))[0].resize((64, 64))


@pytest.fixture(scope="module")
def quiet_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """Two adapters without text encoder layers, by family."""
    kept: dict[str, dict[str, Path]] = {}

    def files(family: str) -> dict[str, Path]:
        if family not in kept:
            pipe, place = tiny.FAMILIES[family](), tmp_path_factory.mktemp(family)
            kept[family] = {
                name: tiny.lora_file(pipe, place / name, seed=seed, text_targets=(), strength=1.0)
                for name, seed in (("a", 1), ("b", 2))
            }
        return kept[family]

    return files


@pytest.fixture(autouse=True)
def _small_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines that edit pictures draw a million pixels; here they draw 32 x 32."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (32, 32, None))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda area, ratio: (32, 32))


@cache
def controlnet(family: str) -> Any:
    """A random ControlNet for a family's tiny pipeline."""
    import diffusers

    pipe = tiny.FAMILIES[family]()
    torch.manual_seed(9)
    if hasattr(pipe, "unet"):
        made = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8))
    elif type(pipe).__name__.startswith("Qwen"):
        made = diffusers.QwenImageControlNetModel.from_transformer(
            pipe.transformer, num_layers=1, attention_head_dim=16, num_attention_heads=2
        )
    elif type(pipe).__name__.startswith("Flux"):
        made = diffusers.FluxControlNetModel.from_transformer(
            pipe.transformer, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2
        )
    else:
        made = diffusers.SD3ControlNetModel.from_transformer(
            pipe.transformer, num_layers=1, num_extra_conditioning_channels=0
        )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def t2i_adapter() -> Any:
    """A random T2I-Adapter for a tiny Stable Diffusion."""
    import diffusers

    torch.manual_seed(9)
    return diffusers.T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2).eval()


WIDE = ("sd3", "inpaint")
"""diffusers' pipeline takes latents of 16 channels only."""


def task(family: str, name: str) -> tuple[MultiLoRAPipeline, dict[str, Any]]:
    """A pipeline of another kind, and its further arguments."""
    if family == "qwen" and name.startswith("edit"):
        return editing(name)
    pipe = tiny.FAMILIES[family](**({"in_channels": 16, "out_channels": 16} if (family, name) == WIDE else {}))
    if (family, name) == WIDE:
        pipe.register_modules(vae=tiny.vae(16, shift_factor=0.1))
    composer = MultiLoRAPipeline(pipe)
    if name == "image":
        return composer.for_task(name), {"image": IMAGE, "strength": 0.5}
    if name == "edit":
        more = {"_auto_resize": False} if family == "flux" else {}  # its pipeline enlarges small pictures
        return composer.for_task(name), {"image": PICTURE, **more}
    if name == "inpaint":
        return composer.for_task(name), {"image": IMAGE, "mask_image": MASK, "strength": 0.75}
    if name == "t2i-adapter":
        return composer.for_task(name, adapter=t2i_adapter()), {"image": IMAGE}
    made = composer.for_task(name, controlnet=controlnet(family))
    if name == "controlnet image":
        return made, {"image": IMAGE, "control_image": 1 - IMAGE, "strength": 0.5}
    if name == "controlnet inpaint":
        return made, {"image": IMAGE, "mask_image": MASK, "control_image": 1 - IMAGE, "strength": 0.75}
    return made, {"image" if hasattr(pipe, "unet") else "control_image": IMAGE}


def editing(name: str) -> tuple[MultiLoRAPipeline, dict[str, Any]]:
    """A base of Qwen-Image that edits a picture, or two; the newest one takes references at noise level 0."""
    from diffusers.image_processor import VaeImageProcessor

    family: Any = FAMILIES["qwen"]
    pictures = VaeImageProcessor.numpy_to_pil(torch.cat([IMAGE, 1 - IMAGE]).permute(0, 2, 3, 1).numpy())
    if name == "edit":
        return MultiLoRAPipeline(family.tiny_edit("QwenImageEditPipeline")), {"image": pictures[0]}
    pipe = family.tiny_edit("QwenImageEditPlusPipeline", zero_cond_t=name == "edit 2511")
    return MultiLoRAPipeline(pipe), {"image": pictures}


def theirs(pipe: Any, files: dict[str, Path], method: str, seed: int, **call: Any) -> torch.Tensor:
    """The same by diffusers alone: adapters set before every pass of the denoiser, predictions averaged."""
    loader = pipe if hasattr(pipe, "load_lora_weights") else tiny.sd()
    if loader is not pipe:
        loader.register_modules(unet=pipe.unet)
    for name, path in files.items():
        loader.load_lora_weights(path, adapter_name=name)
    if files:
        loader.set_adapters(list(files), [1.0] * len(files))
    denoiser, family = getattr(pipe, tiny.denoiser_name(pipe)), family_of(pipe)
    twice = ("qwen", "flux2-klein", "chroma")  # one call per half of the guidance
    own, done, passes = denoiser.forward, [0], 2 if family.name in twice else 1
    short = {key: value for key, value in SHORT.items() if key != "guidance_scale"}
    short |= family.guidance_arguments(SHORT["guidance_scale"])

    def forward(*args: Any, **kwargs: Any) -> Any:
        def once() -> Any:
            fresh = {name: list(value) if isinstance(value, list) else value for name, value in kwargs.items()}
            return own(*args, **fresh)[0]

        if method == "switch":
            loader.set_adapters([list(files)[done[0] // passes % len(files)]], [1.0])
            done[0] += 1
            return (once(),)
        outputs = []
        for name in files:
            loader.set_adapters([name], [1.0])
            outputs.append(once())
        if isinstance(outputs[0], list):
            return ([torch.stack(sample).mean(0) for sample in zip(*outputs, strict=True)],)
        return (torch.stack(outputs).mean(0),)

    if method in ("switch", "composite"):
        denoiser.forward = forward
    try:
        generator = torch.Generator().manual_seed(seed)
        result: torch.Tensor = pipe(prompt=PROMPT, generator=generator, **{**short, **call}).images
    finally:
        denoiser.__dict__.pop("forward", None)
        loader.unload_lora_weights()
    return result


CASES = [
    *((family, kind) for family in ("sd", "sdxl", "sd3", "flux") for kind in ("image", "inpaint", "controlnet")),
    *(("flux", kind) for kind in ("controlnet image", "controlnet inpaint")),
    *((family, "controlnet inpaint") for family in ("sd", "sdxl")),
    ("sd", "t2i-adapter"),
    *(("z-image", kind) for kind in ("image", "inpaint")),
    *(("qwen", kind) for kind in ("image", "inpaint", "controlnet", "edit", "edit plus", "edit 2511")),
    *((family, "edit") for family in ("flux", "flux2")),
    ("chroma", "image"),
    *(("flux2-klein", kind) for kind in ("edit", "inpaint")),
]


def own_size(family: str, kind: str) -> dict[str, int]:
    """Of families whose pipelines have a size of their own; ours is the image's."""
    if family not in ("flux", "chroma", "qwen"):
        return {}
    if (family, kind) == ("flux", "edit"):
        return {"width": 64, "height": 64, "max_area": 64 * 64}
    return {"width": 32, "height": 32}


SEEING = (("flux2", "edit"), ("flux2-klein", "edit"), ("flux2-klein", "inpaint"), ("flux", "edit"))
"""Pipelines whose transformer also sees tokens of another picture."""


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_methods_equal_separate_runs(family: str, kind: str, quiet_files: Callable[[str], dict[str, Path]]) -> None:
    composer, more = task(family, kind)
    files = quiet_files(family)
    for name, path in files.items():
        composer.load_lora(path, name)
    # inside the network, tokens of a reference picture belong to the background
    inside = "activation" if family != "z-image" and not kind.startswith("edit") else "output"
    for method in ("merge", "switch", "composite", inside):
        options: dict[str, Any] = {"fold": False}  # as diffusers does it here; fused it differs by 1e-4 from itself
        if method == inside:
            options["regions"] = [{"adapters": ["a", "b"], "box": (0, 0, 1, 1)}]
        composer.compose(method, **options)
        found = composer(PROMPT, seed=4, **SHORT, **more).images
        other, again = task(family, kind)
        again |= own_size(family, kind)
        torch.manual_seed(4)  # SD3's ControlNet pipeline draws the control image's latents from torch's own generator
        wanted = theirs(other.pipe, files, method, 4, **again)
        difference = float((found - wanted).abs().max() / wanted.abs().max())
        if method == "activation" and (family, kind) in SEEING:
            assert difference > 1e-4  # adapters of a region leave the reference pictures alone
        else:
            assert difference <= 1e-4, (method, difference)
    bare, again = task(family, kind)
    again |= own_size(family, kind)
    assert not torch.allclose(found, theirs(bare.pipe, {}, "", 4, **again), atol=1e-3)


def test_texts_of_an_edit_base_are_always_read_with_the_picture(
    quiet_files: Callable[[str], dict[str, Path]],
) -> None:
    """Also where a method compares texts."""
    composer, more = task("qwen", "edit plus")
    for name, path in quiet_files("qwen").items():
        composer.load_lora(path, name, triggers=("apple",))
    found = composer.compose("w-composite")(PROMPT, seed=4, **SHORT, **more).images
    assert torch.isfinite(found).all()
    assert composer.plan(4, prompt=PROMPT, **more).encodings == 1


def test_several_pictures_are_those_of_single_calls(quiet_files: Callable[[str], dict[str, Path]]) -> None:
    composer, more = task("sd", "image")
    composer.load_lora(quiet_files("sd")["a"], "a")
    several = composer(PROMPT, seed=4, num_images_per_prompt=2, **SHORT, **more).images
    close(several[1:], composer(PROMPT, seed=5, **SHORT, **more).images)


def test_chunked_predictions_keep_the_residuals(quiet_files: Callable[[str], dict[str, Path]]) -> None:
    for kind in ("t2i-adapter", "controlnet"):
        composer, more = task("sd", kind)
        for name, path in quiet_files("sd").items():
            composer.load_lora(path, name)
        whole = composer.compose("composite")(PROMPT, **SHORT, **more).images
        close(composer.compose("composite", adapter_batch=1)(PROMPT, **SHORT, **more).images, whole)


def with_ip_adapter(family: str) -> Any:
    """A tiny pipeline with a random IP-Adapter (arXiv 2308.06721): four tokens of a picture's embedding (16)."""
    pipe = tiny.FAMILIES[family]()
    dice = torch.Generator().manual_seed(3)

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=dice) * 0.1

    text = pipe.unet.config.cross_attention_dim
    projection = {"proj.weight": weights(4 * text, 16), "proj.bias": weights(4 * text), "norm.weight": weights(text),
                  "norm.bias": weights(text)}  # fmt: skip
    crossing = [name for name in pipe.unet.attn_processors if "attn2" in name]
    layers = {
        f"{2 * place + 1}.to_{part}_ip.weight": weights(
            pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features, text
        )
        for place, name in enumerate(crossing)
        for part in "kv"
    }
    pipe.load_ip_adapter({"image_proj": projection, "ip_adapter": layers}, subfolder="", weight_name="",
                         image_encoder_folder=None)  # fmt: skip
    return pipe


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_ip_adapter(family: str, quiet_files: Callable[[str], dict[str, Path]]) -> None:
    seen = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(6))  # without guidance, with
    more = {"ip_adapter_image_embeds": [seen]}
    composer, files = MultiLoRAPipeline(with_ip_adapter(family)), quiet_files(family)
    for name, path in files.items():
        composer.load_lora(path, name)
    for method, names in (("merge", "a"), ("composite", "ab")):
        used = {name: files[name] for name in names}
        found = composer.compose(method, adapters=list(used))(PROMPT, seed=4, **SHORT, **more).images
        close(found, theirs(with_ip_adapter(family), used, method, 4, **more))
    close(composer.compose("composite", adapter_batch=1)(PROMPT, seed=4, **SHORT, **more).images, found)
    two = composer(PROMPT, seed=3, images=2, **SHORT, **more).images
    close(two[1:], found)
    assert not torch.allclose(found, theirs(tiny.FAMILIES[family](), files, "composite", 4), atol=1e-2)


def test_refiner(quiet_files: Callable[[str], dict[str, Path]]) -> None:
    """SDXL's second encoder alone, and the last part of the steps."""
    import diffusers

    base = tiny.sdxl(cross_attention_dim=24)
    parts = {name: part for name, part in base.components.items() if name not in ("text_encoder", "tokenizer")}
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(text_encoder=None, tokenizer=None, **parts,
                                                      add_watermarker=False)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    call = {"image": start, "denoising_start": 0.5}
    wanted = pipe(PROMPT, generator=torch.Generator().manual_seed(4), **SHORT, **call).images
    out = MultiLoRAPipeline(pipe)(PROMPT, seed=4, **SHORT, **call)
    close(out.images, wanted)
    assert len(out.plan.steps) == 2


def test_diffusers_own_names(sd: Bed) -> None:
    composer = sd.composer("a")
    ours = latents(composer, images=2)
    short = {name: value for name, value in CALL.items() if name not in ("steps", "seed")}
    seen: list[tuple[int, tuple[str, ...]]] = []

    def look(pipe: Any, index: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((index, tuple(tensors)))
        return tensors

    generators = [torch.Generator().manual_seed(3 + k) for k in range(2)]
    theirs = composer(
        PROMPT, num_inference_steps=4, num_images_per_prompt=2, generator=generators, eta=0.0,
        callback_on_step_end=look, callback_on_step_end_tensor_inputs=["prompt_embeds"], **short,
    )  # fmt: skip
    assert torch.equal(theirs.images, ours)
    assert seen == [(k, ("latents", "prompt_embeds")) for k in range(4)]
    start = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(8))
    given = composer(PROMPT, latents=start, steps=4, images=2, **short).images
    alone = composer(PROMPT, latents=start[1:], steps=4, **short).images
    close(given[1:], alone)
    assert not torch.equal(given, ours)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"cross_attention_kwargs": {"scale": 0.5}}, "apply to all adapters alike"),
        ({"prompt_embeds": torch.zeros(1)}, "use prompt"),
        ({"clip_skip": 1}, "encoded as the base"),
        ({"num_inference_steps": 3, "steps": 4}, "mean the same"),
        ({"strength": 0.5}, "has no argument strength"),
        ({"etta": 0.5}, "did you mean 'eta'"),
        ({"generator": [torch.Generator()] * 3}, "3 generators"),
        ({"latents": torch.zeros(2, 4, 16, 16)}, "2 latents"),
    ],
)
def test_what_cannot_be_honoured_is_refused(sd: Bed, call: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        sd.composer("a")(PROMPT, **call)


def test_no_step_left(sd: Bed) -> None:
    with pytest.raises(InputError, match="none is left"):
        sd.composer("a").for_task("image")(PROMPT, image=IMAGE, strength=0.1, **SHORT)


def test_no_such_task(sd: Bed) -> None:
    with pytest.raises(InputError, match="no pipeline for 'video'"):
        sd.composer().for_task("video")


def test_lora_composer_needs_noise(sd: Bed) -> None:
    composer = sd.composer("a").for_task("image")
    region = {"adapters": ["a"], "box": (0, 0, 1, 1), "words": ["apple"]}
    with pytest.raises(InputError, match="switch both off"):
        composer.compose("lora-composer", regions=[region])(PROMPT, image=IMAGE, **SHORT)
