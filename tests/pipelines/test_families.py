"""Every family against diffusers and PEFT: merge, switch, composite, and guidance as each family does it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.errors import FamilyError, InputError
from adapters.formats import read
from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.families import FAMILIES, detect, family_of, family_of_adapter, of_adapter, of_checkpoint
from pipelines.diffusion.loading import open_pipeline
from tests import tiny
from tests.pipelines.conftest import PROMPT, Bed, close, latents, peft_latents

OTHERS = tuple(name for name in tiny.PICTURES if name != "sd")
"""Stable Diffusion is compared in test_composition.py."""


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_family_is_recognised(family: str, tmp_path: Any) -> None:
    path = tiny.saved(family, tmp_path)
    assert detect(path).name == family
    assert family_of(tiny.FAMILIES[family]()).name == family
    assert FAMILIES[family].denoiser in ("unet", "transformer")


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("method", ["merge", "switch", "composite"])
def test_one_adapter_is_plain_lora(beds: Callable[[str], Bed], family: str, method: str) -> None:
    bed = beds(family)
    pipe = bed.pipe()
    pipe.load_lora_weights(bed.files["a"], adapter_name="a")
    close(latents(bed.composer("a"), method), peft_latents(pipe))


@pytest.mark.parametrize("family", OTHERS)
def test_merge_equals_set_adapters(beds: Callable[[str], Bed], family: str) -> None:
    bed = beds(family)
    pipe = bed.pipe()
    for name in "abc":
        pipe.load_lora_weights(bed.files[name], adapter_name=name)
    pipe.set_adapters(["a", "b", "c"], [0.8, 0.5, 1.2])
    close(latents(bed.composer("a", "b", "c", a=0.8, b=0.5, c=1.2), "merge"), peft_latents(pipe))


class Averaged:
    """The reference for composite: a denoiser that is asked once per adapter, with that adapter's own prompt.

    It stands in for the pipeline's denoiser, so that the pipeline itself does everything else.
    """

    def __init__(
        self, pipe: Any, name: str, names: list[str], texts: list[dict[str, Tensor]], given: dict[str, Tensor]
    ):
        self.pipe, self.model, self.names, self.texts, self.given = pipe, getattr(pipe, name), names, texts, given

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        outputs = []
        for name, text in zip(self.names, self.texts, strict=True):
            self.pipe.set_adapters([name])
            outputs.append(self.model(*args, **self._with_text(kwargs, text))[0])
        if isinstance(outputs[0], list):
            return ([torch.stack(sample).mean(0) for sample in zip(*outputs, strict=True)],)
        return (torch.stack(outputs).mean(0),)

    def _with_text(self, kwargs: dict[str, Any], text: dict[str, Tensor]) -> dict[str, Any]:
        """Every tensor equal to one of the first adapter's embeddings, replaced by this adapter's."""

        def swapped(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: swapped(item) for key, item in value.items()}
            for key, tensor in self.given.items():
                if isinstance(value, Tensor) and value.shape == tensor.shape and torch.equal(value, tensor):
                    return text[key]
            return value

        return {key: swapped(value) for key, value in kwargs.items()}


def roles(encoding: Any) -> dict[str, Tensor]:
    """Everything a pipeline may hand to its denoiser: positive, negative and both halves of each embedding."""
    if any(isinstance(part, list) for part in encoding.positive.values()):
        return {}  # no text encoder of these families takes adapters, so all encodings are the same
    found = {f"positive {kind}": tensor for kind, tensor in encoding.positive.items()}
    for kind, tensor in (encoding.negative or {}).items():
        found[f"negative {kind}"] = tensor
        if tensor.shape == encoding.positive[kind].shape:  # else the pipeline passes them one after the other
            found[f"both {kind}"] = torch.cat([tensor, encoding.positive[kind]])
    return found


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sdxl", {}),
        ("sdxl", {"guidance_scale": 1.0}),
        ("sd3", {}),
        ("sd3", {"guidance_scale": 1.0}),
        ("flux", {}),
        ("flux", {"true_cfg_scale": 3.0, "negative_prompt": "dull"}),
        ("lumina2", {"negative_prompt": "dull and long"}),
        ("auraflow", {}),
        ("cogview4", {"negative_prompt": "dull and long enough for more than 16 tokens"}),
        ("ernie-image", {"negative_prompt": "dull and long"}),
        ("sana", {}),
        ("z-image", {}),
        ("z-image", {"guidance_scale": 0.0}),
        ("z-image", {"negative_prompt": "dull and long"}),
        ("krea2", {"negative_prompt": "dull"}),
        ("krea2", {"guidance_scale": 0.0}),
        ("hidream", {"negative_prompt": "dull"}),
        ("hidream", {"guidance_scale": 1.0}),
        ("qwen", {"negative_prompt": "dull"}),
        ("qwen", {"guidance_scale": 1.0}),
        ("flux2", {}),
        ("chroma", {"negative_prompt": "dull"}),
        ("chroma", {"guidance_scale": 1.0}),
        ("flux2-klein", {}),
        ("flux2-klein", {"guidance_scale": 3.0, "negative_prompt": "dull"}),
    ],
)
@pytest.mark.parametrize("adapter_batch", [None, 1])
@torch.no_grad()
def test_composite_equals_separate_passes(
    beds: Callable[[str], Bed], family: str, options: dict[str, Any], adapter_batch: int | None
) -> None:
    bed = beds(family)
    asked = 1.0 if FAMILIES[family].guidance_input else options.get("guidance_scale", FAMILIES[family].usual_guidance)
    guided = options.get("true_cfg_scale", asked) > FAMILIES[family].no_guidance
    negative = options.get("negative_prompt")
    pipe = bed.pipe()
    texts = []
    for name in "ab":
        pipe.load_lora_weights(bed.files[name], adapter_name=name)
    for name in "ab":
        pipe.set_adapters([name])
        texts.append(FAMILIES[family].encode(pipe, PROMPT, negative, 1, guided))
    denoiser = tiny.denoiser_name(pipe)
    stand_in = Averaged(pipe, denoiser, ["a", "b"], [roles(text) for text in texts], roles(texts[0]))
    original = getattr(pipe, denoiser).forward
    model = getattr(pipe, denoiser)

    def once(*args: Any, **kwargs: Any) -> Any:
        model.forward = original
        try:
            return stand_in(*args, **kwargs)
        finally:
            model.forward = once

    model.forward = once
    extra = {"true_cfg_scale": options["true_cfg_scale"]} if "true_cfg_scale" in options else {}
    extra |= {FAMILIES[family].guidance_argument: options.get("guidance_scale", FAMILIES[family].usual_guidance)}
    wanted = pipe(
        num_inference_steps=4,
        width=32,
        height=32,
        generator=[torch.Generator().manual_seed(3)],
        output_type="latent",
        **texts[0].call_arguments(),
        **extra,
        **FAMILIES[family].always,
    ).images
    close(latents(bed.composer("a", "b"), "composite", adapter_batch=adapter_batch, **options), wanted)


@pytest.mark.parametrize("family", OTHERS)
def test_identical_adapters_and_zero_weights(beds: Callable[[str], Bed], family: str) -> None:
    bed = beds(family)
    composer = bed.composer("a")
    composer.load_lora(bed.files["a"], "again")
    close(latents(composer, "composite"), latents(bed.composer("a"), "merge"))
    assert torch.equal(latents(bed.composer("a", a=0.0), "composite"), peft_latents(bed.pipe()))


@pytest.mark.parametrize("family", OTHERS)
def test_switch_and_many_pictures(beds: Callable[[str], Bed], family: str) -> None:
    bed = beds(family)
    composer = bed.composer("a", "b")
    assert torch.equal(latents(composer, "switch", tau=4), latents(bed.composer("a"), "merge"))
    many = latents(composer, "composite", images=2, seed=7)
    close(many[1:], latents(composer, "composite", images=1, seed=8))


@pytest.mark.parametrize("family", OTHERS)
def test_previews_and_pictures(beds: Callable[[str], Bed], family: str) -> None:
    from tests.pipelines.test_composition import Watcher

    watcher = Watcher()
    composer: MultiLoRAPipeline = beds(family).composer("a")
    side = max(16, composer.family.pixel_step(composer.pipe))
    picture = composer(PROMPT, steps=2, width=2 * side, height=side, monitor=watcher, preview_every=1).images[0]
    size = composer.family.drawn_size(composer.pipe, side, 2 * side)[::-1]
    assert size == ((44, 20) if family == "hidream" else (2 * side, side))  # it keeps the area of the base's pictures
    assert picture.size == watcher.reports[0].preview.size == size


def test_flux_without_guidance_embedding() -> None:
    composer = MultiLoRAPipeline(tiny.flux(guidance_embeds=False))
    assert torch.isfinite(latents(composer)).all()


@pytest.mark.parametrize(("theirs", "ours"), [("flux", "sd"), ("sd", "flux")])
def test_family_of_a_foreign_adapter_is_named(beds: Callable[[str], Bed], theirs: str, ours: str) -> None:
    composer = beds(ours).composer()
    with pytest.raises(FamilyError) as found:
        composer.load_lora(beds(theirs).files["a"], "a")
    said = f"is an adapter for {FAMILIES[theirs].title}, but this base is {FAMILIES[ours].title}: use it with"
    assert said in str(found.value)
    assert not composer.adapters


def test_text_encoder_that_the_base_lacks_is_named(sd: Bed) -> None:
    pipe = sd.pipe()
    pipe.text_encoder = None
    composer = MultiLoRAPipeline(pipe)
    with pytest.raises(InputError, match="changes the text_encoder, without which this base was opened"):
        composer.load_lora(sd.files["a"], "a")
    composer.load_lora(sd.files["c"], "c")


def test_flow_models_have_flow_samplers(beds: Callable[[str], Bed]) -> None:
    composer = beds("sd3").composer("a")
    assert torch.equal(latents(composer, scheduler="euler"), latents(composer))
    with pytest.raises(InputError, match="flow-matching"):
        latents(composer, scheduler="ddim")


def test_adapter_of_another_family_is_refused(beds: Callable[[str], Bed]) -> None:
    from adapters.errors import FamilyError

    with pytest.raises(FamilyError, match="'transformer'"):
        beds("sd").composer().load_lora(beds("flux").files["a"])
    with pytest.raises(FamilyError, match=r"(?s)sdxl|no module|shape"):
        beds("sd").composer().load_lora(beds("sdxl").files["a"])
    with pytest.raises(FamilyError, match="'unet'"):
        beds("sd3").composer().load_lora(beds("sd").files["a"])


def test_kohya_file_in_sdxls_original_names(beds: Callable[[str], Bed], tmp_path: Any) -> None:
    """input_blocks / middle_block / output_blocks, as kohya's SDXL trainer writes them, load into the same modules."""
    from safetensors.torch import save_file

    bed = beds("sdxl")
    composer = bed.composer("b")
    layers = composer.rack.loaded["b"].file.parts["unet"]
    tensors: dict[str, Tensor] = {}
    for module, layer in layers.items():
        name = f"lora_unet_{sgm_name(module).replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = layer.A.clone(), layer.B.clone()
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
    save_file(tensors, tmp_path / "sgm.safetensors")
    again = MultiLoRAPipeline(bed.pipe())
    again.load_lora(tmp_path / "sgm.safetensors")
    only_unet = MultiLoRAPipeline(bed.pipe())
    only_unet.load_lora(bed.files["b"], te_weight=0.0)
    assert torch.equal(latents(again), latents(only_unet))


@pytest.mark.parametrize("written", ["ComfyUI", "difference"])
def test_other_files_in_sdxls_original_names(written: str, beds: Callable[[str], Bed], tmp_path: Any) -> None:
    """The same blocks with ComfyUI's dots, and with LyCORIS' whole differences."""
    from safetensors.torch import save_file

    bed = beds("sdxl")
    layers = bed.composer("b").rack.loaded["b"].file.parts["unet"]
    tensors: dict[str, Tensor] = {}
    for module, layer in layers.items():
        if written == "ComfyUI":
            name = f"diffusion_model.{sgm_name(module)}"
            tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = layer.A.clone(), layer.B.clone()
            tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
        else:
            tensors[f"lora_unet_{sgm_name(module).replace('.', '_')}.diff"] = layer.delta()
    save_file(tensors, tmp_path / "sgm.safetensors")
    again = MultiLoRAPipeline(bed.pipe())
    assert again.load_lora(tmp_path / "sgm.safetensors").layers == {"unet": len(layers)}
    found = again.rack.loaded["sgm"].file.parts["unet"]
    for module, layer in layers.items():
        torch.testing.assert_close(found[module].delta(), layer.delta())


def sgm_name(module: str) -> str:
    """diffusers' name of an attention layer of the tiny SDXL -> the name in the original code."""
    places = {
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
    }
    for ours, theirs in places.items():
        if module.startswith(f"{ours}."):
            return module.replace(ours, theirs, 1)
    raise AssertionError(module)


def test_repeat_and_list_inputs() -> None:
    """A batch in front is repeated as a whole; lists with one entry per sample too; other arguments stay."""

    class Listed(type(FAMILIES["sd"])):  # type: ignore[misc]
        batch_arguments = ("x", "nested")
        list_arguments = ("captions",)

    family = Listed()
    x = torch.arange(4.0).view(2, 2)
    assert torch.equal(family.repeat("x", x, 2, 2), torch.cat([x, x]))
    assert torch.equal(family.repeat("nested", {"a": [x]}, 2, 2)["a"][0], torch.cat([x, x]))
    assert [row.tolist() for row in family.repeat("captions", [x[0], x[1]], 2, 2)] == [[0, 1], [2, 3]] * 2
    assert family.repeat("scale", 3.0, 2, 2) == 3.0


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_descriptions_are_whole(family: Any) -> None:
    pipe = family.tiny()
    assert all((family.title, family.short, family.licence))
    assert all(getattr(pipe, name) is not None for name in (*family.components, family.denoiser))
    assert set(family.text_encoders) <= set(family.components)
    assert set(family.targets) == {"attention", "attention-mlp", "linear", "all"}
    encoding = family.encode(pipe, "a", "b c", 3, True)
    halves = [half for half in (encoding.positive, encoding.negative) if half is not None]
    assert all(set(half) == set(encoding.positive) <= set(family.call_names) for half in halves)
    assert all(len(part) == 3 for half in halves for part in half.values())
    assert all(len(tensor) == 2 for tensor in family.condition(pipe, ["a", "b c"]).values())


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_adapters_are_recognised_as_those_of_their_family(beds: Callable[[str], Bed], family: str) -> None:
    found = family_of_adapter(read(beds(family).files["a"]))
    assert found is not None
    assert found.name == family


def test_adapter_without_marks_is_of_no_known_family(beds: Callable[[str], Bed]) -> None:
    assert family_of_adapter(read(beds("sd3").files["a"])) is None  # its text encoders are also SD's


VARIANTS = {
    "sd3.5 medium": ("sd3", {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}),
    "sd3.5 large": ("sd3", {"qk_norm": "rms_norm", "num_layers": 3}),
    "flux schnell": ("flux", {"guidance_embeds": False}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_a_family(name: str, tmp_path: Any) -> None:
    family, changes = VARIANTS[name]
    make = partial(tiny.FAMILIES[family], **changes)
    targets = ("to_q", "to_out.0", "attn2.to_k") if "dual_attention_layers" in changes else ("to_q", "to_out.0")
    files = {one: tiny.lora_file(make(), tmp_path / one, seed=seed, targets=targets, text_targets=())
             for seed, one in enumerate("ab", 1)}  # fmt: skip
    pipe, composer = make(), MultiLoRAPipeline(make())
    for one, file in files.items():
        pipe.load_lora_weights(file, adapter_name=one)
        composer.load_lora(file, one)
    pipe.set_adapters(["a", "b"], [1.0, 1.0])
    wanted = peft_latents(pipe)
    close(latents(composer, "merge"), wanted)
    whole = {"adapters": ["a", "b"], "box": (0, 0, 1, 1)}
    composer.compose("activation", regions=[whole])
    close(latents(composer), wanted)


@pytest.mark.parametrize(
    ("family", "name", "wanted"),
    [
        ("sdxl", "stabilityai/sdxl-turbo", (4, 1.0)),
        ("sdxl", "/models/sdxl_lightning_8step.safetensors", (8, 1.0)),
        ("sdxl", "DreamShaperXL_Turbo_v2.safetensors", (4, 1.0)),
        ("sdxl", "/hyper/turbocharged-xl", (25, 5.0)),
        ("sd3", "stabilityai/stable-diffusion-3.5-large-turbo", (4, 1.0)),
        ("flux", "black-forest-labs/FLUX.1-schnell", (4, 5.0)),
    ],
)
def test_few_step_derivatives_have_their_own_defaults(family: str, name: str, wanted: tuple[int, float]) -> None:
    assert FAMILIES[family].usual_of(name, {}) == wanted
    pipe = tiny.FAMILIES[family]()
    pipe.register_to_config(_name_or_path=name)
    composer = MultiLoRAPipeline(pipe)
    assert len(composer.plan().steps) == wanted[0]
    made = composer(PROMPT, width=32, height=32, steps=2, output_type="latent")
    if family != "flux":
        assert made.plan.guided == (wanted[1] > 1)


def test_distilled_klein_is_not_guided() -> None:
    pipe = tiny.FAMILIES["flux2-klein"]()
    pipe.register_to_config(is_distilled=True)
    composer = MultiLoRAPipeline(pipe)
    made = composer(PROMPT, width=32, height=32, output_type="latent")
    assert len(made.plan.steps) == 4
    assert not made.plan.guided
    with pytest.raises(InputError, match="takes no guidance"):
        composer(PROMPT, guidance_scale=3.0)


def test_adapters_of_flux_are_told_apart() -> None:
    single = "single_transformer_blocks.0.attn"
    names = {
        "flux": f"transformer.{single}.to_q.lora_A.weight",
        "flux2": f"transformer.{single}.to_qkv_mlp_proj.lora_A.weight",
        "chroma": "lora_unet_distilled_guidance_layer_in_proj.lora_down.weight",
    }
    for family, name in names.items():
        assert of_adapter([name]) == FAMILIES[family]
    assert of_adapter([names["flux2"]], inner=3072) == FAMILIES["flux2-klein"]
    assert of_adapter([names["flux2"]], inner=6144) == FAMILIES["flux2"]
    assert of_adapter(["lora_unet_double_blocks_0_img_attn_qkv.alpha"], hints="chroma") == FAMILIES["chroma"]
    shared = ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"]
    marks = ["double_stream_modulation_img.lin.weight", "guidance_in.in_layer.weight"]
    assert of_checkpoint(shared) == FAMILIES["flux"]
    assert of_checkpoint([*shared, "distilled_guidance_layer.in_proj.bias"]) == FAMILIES["chroma"]
    assert of_checkpoint([*shared, *marks]) == FAMILIES["flux2"]
    assert of_checkpoint([*shared, marks[0]]) == FAMILIES["flux2-klein"]


@pytest.mark.parametrize("names", [("v_pred", "ztsnr"), ("v_pred",), ()])
def test_single_files_that_predict_v(names: tuple[str, ...], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty tensors in the file say so, or its name."""
    import diffusers
    from safetensors.torch import save_file

    file = tmp_path / ("one.safetensors" if names else "noob-vpred.safetensors")
    weight = {"conditioner.embedders.1.model.ln_final.weight": torch.zeros(1)}
    save_file({**weight, **{name: torch.tensor([]) for name in names}}, file)
    pipe = tiny.sdxl()
    pipe.scheduler = diffusers.EulerDiscreteScheduler()
    monkeypatch.setattr(diffusers.StableDiffusionXLPipeline, "from_single_file", lambda *_, **__: pipe)
    opened, family, settings = open_pipeline(file)
    config = opened.scheduler.config
    assert (family.name, config.prediction_type) == ("sdxl", "v_prediction")
    assert bool(config.rescale_betas_zero_snr) == ("ztsnr" in names)
    assert "predicts v" in str(settings)
    assert opened.name_or_path == str(file)
