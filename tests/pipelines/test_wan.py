"""Wan against diffusers and PEFT: one and two denoisers, files for one of them, pairs, start pictures, regions."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.compression.storage import storage
from adapters.errors import FamilyError, InputError
from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.families import FAMILIES
from pipelines.diffusion.families.wan import ORIGINAL
from pipelines.diffusion.regions import Region
from tests import tiny
from tests.pipelines import test_activation_reference as reference
from tests.pipelines.conftest import PROMPT
from tests.pipelines.test_composition import Watcher
from tests.pipelines.test_quantized import write_gguf

STEPS = 4
CALL: dict[str, Any] = {"steps": STEPS, "seed": 3, "output_type": "latent", "width": 32, "height": 32, "frames": 5}
BASES: dict[str, dict[str, Any]] = {"2.1": {}, "A14B": {"boundary_ratio": 0.8}, "5B": {"expand_timesteps": True}}
"""Kinds of bases; at four steps the A14B's denoisers have two each."""

ALL_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "time_proj", "proj_out", "linear_1")


def base(kind: str, seed: int = 0) -> Any:
    return FAMILIES["wan"].tiny(seed, **BASES[kind])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters; all miniatures have transformers of the same shapes."""
    folder = tmp_path_factory.mktemp("wan")
    targets = {"a": ("to_q", "to_k", "to_v", "to_out.0"), "b": ("to_q", "to_v", "ffn.net.2"), "c": ("ffn.net.0.proj",)}
    return {
        name: tiny.lora_file(base("2.1"), folder / name, seed=k, rank=k + 1, alpha=3.0, targets=chosen, text_targets=())
        for k, (name, chosen) in enumerate(targets.items(), 1)
    }


def composer(kind: str, files: dict[str, Path], *names: str, **weights: float) -> MultiLoRAPipeline:
    made = MultiLoRAPipeline(base(kind))
    for name in names:
        made.load_lora(files[name], name, weight=weights.get(name, 1.0))
    return made


def ours(made: MultiLoRAPipeline, method: str, **options: Any) -> Tensor:
    how = {
        key: options.pop(key)
        for key in list(options)
        if key in ("tau", "adapter_batch", "fold", "regions", "self_mask")
    }
    found: Tensor = made.compose(method, **how)(PROMPT, **(CALL | options)).images
    return found


def stock(kind: str, files: dict[str, Path], *names: str) -> Any:
    """diffusers' pipeline with the adapters in every denoiser."""
    pipe = base(kind)
    for name in names:
        pipe.load_lora_weights(files[name], adapter_name=name)
        if pipe.transformer_2 is not None:
            pipe.load_lora_weights(files[name], adapter_name=name, load_into_transformer_2=True)
    return pipe


def use(pipe: Any, **weights: float) -> None:
    for model in models(pipe):
        model.set_adapters(list(weights), list(weights.values()))


def models(pipe: Any) -> list[Any]:
    return [model for model in (pipe.transformer, pipe.transformer_2) if model is not None]


def theirs(pipe: Any, **options: Any) -> Tensor:
    call = {"prompt": PROMPT, "guidance_scale": 5.0, "generator": [torch.Generator().manual_seed(3)]}
    size = {"height": 32, "width": 32, "num_frames": 5, "output_type": "latent"}
    found: Tensor = pipe(num_inference_steps=STEPS, **(size | call | options)).frames
    return found


def close(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1)) <= 1e-4


# Methods


@pytest.mark.parametrize("kind", BASES)
def test_merge_is_set_adapters(kind: str, files: dict[str, Path]) -> None:
    pipe = stock(kind, files, "a", "b", "c")
    plain = theirs(base(kind))
    use(pipe, a=0.8, b=0.5, c=1.2)
    wanted = theirs(pipe)
    made = composer(kind, files, "a", "b", "c", a=0.8, b=0.5, c=1.2)
    close(ours(made, "merge"), wanted)
    close(ours(made, "merge", fold=False), wanted)
    assert not torch.allclose(wanted, plain, atol=1e-2)
    close(ours(MultiLoRAPipeline(base(kind)), "merge"), plain)


@pytest.mark.parametrize("kind", BASES)
@torch.no_grad()
def test_composite_is_one_pass_per_adapter(kind: str, files: dict[str, Path]) -> None:
    pipe = stock(kind, files, "a", "b")

    def averaged(model: Any) -> None:
        own = model.forward

        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor]:
            passes = []
            for name in ("a", "b"):
                model.set_adapters([name], [1.0])
                passes.append(own(*args, **kwargs)[0])
            return (torch.stack(passes).mean(0),)

        model.forward = forward

    for model in models(pipe):
        averaged(model)
    wanted = theirs(pipe)
    made = composer(kind, files, "a", "b")
    close(ours(made, "composite"), wanted)
    close(ours(made, "composite", adapter_batch=1, fold=False), wanted)


@pytest.mark.parametrize("kind", BASES)
def test_switch_and_schedules(kind: str, files: dict[str, Path]) -> None:
    pipe = stock(kind, files, "a", "b")

    def turning(pipe: Any, index: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        use(pipe, **{"ab"[(index + 1) % 2]: 1.0})
        return {}

    use(pipe, a=1.0)
    close(ours(composer(kind, files, "a", "b"), "switch"), theirs(pipe, callback_on_step_end=turning))

    def fading(pipe: Any, index: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        use(pipe, a=1 - (index + 1) / STEPS, b=1.0)
        return {}

    use(pipe, a=1.0, b=1.0)
    wanted = theirs(pipe, callback_on_step_end=fading)
    made = MultiLoRAPipeline(base(kind))
    made.load_lora(files["a"], "a", schedule=[(0, 1), (1, 0)])
    made.load_lora(files["b"], "b")
    close(ours(made, "merge"), wanted)


@pytest.mark.parametrize("method", ["merge", "composite", "switch", "k-lora", "cmlora"])
def test_everything_is_restored(method: str, files: dict[str, Path]) -> None:
    from adapters.errors import Cancelled

    made = composer("A14B", files, "a", "b") if method != "k-lora" else composer("A14B", files, "a")
    if method == "k-lora":
        made.load_lora(files["a"], "b", weight=0.5)
    own = [tensor.clone() for model in models(made.pipe) for tensor in model.state_dict().values()]
    first = ours(made, method, steps=8)
    with pytest.raises(Cancelled):
        ours(made, method, steps=8, monitor=Watcher(stop_after=5))
    for part in models(made.pipe):
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in part.modules())
    found = [tensor for model in models(made.pipe) for tensor in model.state_dict().values()]
    assert all(torch.equal(one, two) for one, two in zip(own, found, strict=True))
    assert torch.equal(ours(made, method, steps=8), first)
    made.unload_lora("b")
    made.unload_lora("a")
    assert torch.equal(ours(made, "merge"), ours(MultiLoRAPipeline(base("A14B")), "merge"))


@pytest.mark.parametrize("kind", BASES)
def test_what_is_folded_changes_nothing(kind: str, files: dict[str, Path]) -> None:
    for method in ("merge", "composite"):
        made = composer(kind, files, "a", "c", c=0.4)
        whole = ours(made, method, steps=8)
        assert made.plan(8).folds.memory > 0
        close(whole, ours(made, method, steps=8, fold=False))


# Which denoiser


def half(file: Path, place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(file.read_bytes())
    return place


@pytest.mark.parametrize("names", [
    ("x_high_noise.safetensors", "x_low_noise.safetensors"),
    ("Wan2.2-HighNoise_x.safetensors", "Wan2.2-LowNoise_x.safetensors"),
    ("x-HIGH-v1.safetensors", "x-LOW-v1.safetensors"),
    ("high.safetensors", "low.safetensors"),
])  # fmt: skip
def test_both_halves_are_one_adapter(names: tuple[str, str], files: dict[str, Path], tmp_path: Path) -> None:
    pipe = base("A14B")
    pipe.load_lora_weights(files["a"], adapter_name="x")
    pipe.load_lora_weights(files["b"], adapter_name="x", load_into_transformer_2=True)
    use(pipe, x=0.7)
    wanted = theirs(pipe)
    places = [half(files[key], tmp_path / name) for key, name in zip("ab", names, strict=True)]
    for path in (*places, tmp_path):  # either file, or the folder
        made = MultiLoRAPipeline(base("A14B"))
        report = made.load_lora(path, "x", weight=0.7)
        assert set(report.layers) == {"transformer", "transformer_2"}
        close(ours(made, "merge"), wanted)


def test_a_missing_half_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    place = half(files["a"], tmp_path / "x_low_noise.safetensors")
    made = MultiLoRAPipeline(base("A14B"))
    with pytest.raises(InputError, match=r"half for low noise .* high noise is missing: 'x_high_noise\.safetensors'"):
        made.load_lora(place)
    assert not made.adapters
    made.load_lora(place, "x", denoiser="transformer_2")
    pipe = base("A14B")
    pipe.load_lora_weights(files["a"], adapter_name="x", load_into_transformer_2=True)
    close(ours(made, "merge"), theirs(pipe))
    with pytest.raises(InputError, match="no denoiser 'transformer_3'"):
        made.load_lora(place, "y", denoiser="transformer_3")
    assert MultiLoRAPipeline(base("2.1")).load_lora(place).layers == {"transformer": 16}  # nothing to choose


def test_metadata_tells_the_half_and_words_in_a_name_do_not(files: dict[str, Path], tmp_path: Path) -> None:
    told = tmp_path / "one.safetensors"
    save_file(load_file(files["a"]), told, metadata={"ss_output_name": "thing_high_noise"})
    with pytest.raises(InputError, match="half for high noise"):
        MultiLoRAPipeline(base("A14B")).load_lora(told)
    plain = half(files["a"], tmp_path / "high_quality_highlights.safetensors")
    assert len(MultiLoRAPipeline(base("A14B")).load_lora(plain).layers) == 2


def test_a_file_with_both(files: dict[str, Path], tmp_path: Path) -> None:
    high, low = load_file(files["a"]), load_file(files["b"])
    both = high | {key.replace("transformer.", "transformer_2.", 1): tensor for key, tensor in low.items()}
    configs = {}
    for name, file in (("transformer", files["a"]), ("transformer_2", files["b"])):
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            own = json.loads(opened.metadata()["lora_adapter_metadata"])
        configs |= {f"{name}.{key.partition('.')[2]}": value for key, value in own.items()}
    save_file(both, tmp_path / "both.safetensors", metadata={"lora_adapter_metadata": json.dumps(configs)})
    made = MultiLoRAPipeline(base("A14B"))
    made.load_lora(tmp_path / "both.safetensors", "x")
    pipe = base("A14B")
    pipe.load_lora_weights(files["a"], adapter_name="x")
    pipe.load_lora_weights(files["b"], adapter_name="x", load_into_transformer_2=True)
    close(ours(made, "merge"), theirs(pipe))
    with pytest.raises(FamilyError, match="'transformer_2', which the base model"):
        MultiLoRAPipeline(base("2.1")).load_lora(tmp_path / "both.safetensors")
    made.export(tmp_path / "merged.safetensors")
    again = MultiLoRAPipeline(base("A14B"))
    again.load_lora(tmp_path / "merged.safetensors", "x")
    close(ours(again, "merge"), ours(made, "merge"))


# Other programs' files


def foreign(file: Path, place: Path, flat: bool, up: str = "lora_B", alpha: float | None = None) -> Path:
    """``file`` in the authors' names, as ComfyUI ("diffusion_model.") or musubi-tuner ("lora_unet_") write it."""
    from adapters.formats import read

    inverse = {
        "attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v",
        "attn1.to_out.0": "self_attn.o", "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k",
        "attn2.to_v": "cross_attn.v", "attn2.to_out.0": "cross_attn.o", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
        "condition_embedder.time_proj": "time_projection.1", "proj_out": "head.head",
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for module, layer in read(file).parts["transformer"].items():
        block, rest = module.split(".")[:2], module.split(".")[2:]
        start, name = (".".join(block) + ".", ".".join(rest)) if block[0] == "blocks" else ("", module)
        written = start + inverse[name]
        key = f"lora_unet_{written.replace('.', '_')}" if flat else f"diffusion_model.{written}"
        one = layer.with_scale_one() if alpha is None else layer
        down = "lora_A" if up == "lora_B" else "lora_down"
        tensors[f"{key}.{down}.weight"], tensors[f"{key}.{up}.weight"] = one.A.clone(), one.B.clone()
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
    save_file(tensors, place)
    return place


@pytest.mark.parametrize(
    ("flat", "up", "alpha", "targets"),
    [
        (False, "lora_B", None, ALL_LAYERS),
        (False, "lora_up", 3.0, ALL_LAYERS[:6]),
        (True, "lora_up", 3.0, ALL_LAYERS[:6]),
    ],
)
def test_foreign_files_are_diffusers_deltas(
    flat: bool, up: str, alpha: float | None, targets: tuple[str, ...], tmp_path: Path
) -> None:
    """Every layer, and the same update as diffusers' own converter makes of the file."""
    whole = tiny.lora_file(base("2.1"), tmp_path / "w", rank=2, alpha=3.0, targets=targets, text_targets=())
    file = foreign(whole, tmp_path / "foreign.safetensors", flat, up, alpha)
    made = MultiLoRAPipeline(base("2.1"))
    made.load_lora(file, "x")
    found = made.rack.loaded["x"].file.parts["transformer"]
    converted = type(made.pipe).lora_state_dict(str(file))
    wanted = {key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in converted if "lora_A" in key}
    assert set(found) == wanted
    for name, layer in found.items():
        product = converted[f"transformer.{name}.lora_B.weight"] @ converted[f"transformer.{name}.lora_A.weight"]
        torch.testing.assert_close(layer.delta(), product.float())


def test_a_pair_of_foreign_files(files: dict[str, Path], tmp_path: Path) -> None:
    foreign(files["a"], tmp_path / "x_high_noise.safetensors", True, "lora_up", 3.0)
    foreign(files["b"], tmp_path / "x_low_noise.safetensors", False)
    made = MultiLoRAPipeline(base("A14B"))
    made.load_lora(tmp_path / "x_high_noise.safetensors", "x")
    pipe = base("A14B")
    pipe.load_lora_weights(files["a"], adapter_name="x")
    pipe.load_lora_weights(files["b"], adapter_name="x", load_into_transformer_2=True)
    close(ours(made, "merge"), theirs(pipe))


def test_every_original_name_is_a_module() -> None:
    names = {name for name, _ in FAMILIES["wan"].tiny(image_dim=16, added_kv_proj_dim=24).transformer.named_modules()}
    for name in ORIGINAL.values():
        for letter in "qkv" if r"\2" in name and "add_" not in name else "kv":
            assert name.replace(r"\1", "0").replace(r"\2", letter) in names


def test_the_library_recognises_wan(files: dict[str, Path], tmp_path: Path) -> None:
    from studio.library import facts

    flat = foreign(files["a"], tmp_path / "flat.safetensors", True, "lora_up", 3.0)
    dotted = foreign(files["a"], tmp_path / "dotted.safetensors", False)
    assert {facts.adapter(file)["family"] for file in (files["a"], flat, dotted)} == {"wan"}
    for other in ("sd", "flux"):
        with pytest.raises(FamilyError):
            MultiLoRAPipeline(tiny.FAMILIES[other]()).load_lora(files["a"])


# Start pictures


@pytest.fixture(autouse=True)
def cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' pipeline for start pictures needs the package ftfy, and does not say so."""
    from diffusers.pipelines.wan import pipeline_wan_i2v

    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=lambda text: text), raising=False)


def test_image_to_video(files: dict[str, Path]) -> None:
    from PIL import Image

    picture = Image.new("RGB", (32, 32), (200, 40, 40))
    made = composer("5B", files, "a").for_task("image")
    found = made(PROMPT, image=picture, **CALL).images
    pipe = stock("5B", files, "a")
    from diffusers import WanImageToVideoPipeline

    parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    close(found, theirs(WanImageToVideoPipeline(**parts, expand_timesteps=True), image=picture))


def test_a_base_for_start_pictures(files: dict[str, Path], tmp_path: Path) -> None:
    """Wan 2.1's: more input channels, and CLIP's view of the picture."""
    from diffusers import WanImageToVideoPipeline
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    picture = Image.new("RGB", (32, 32), (200, 40, 40))
    whole = FAMILIES["wan"].tiny(in_channels=12, image_dim=16, added_kv_proj_dim=24)
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                              image_size=32, patch_size=16)  # fmt: skip
    parts = {name: getattr(whole, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    pipe = WanImageToVideoPipeline(
        **parts, image_encoder=CLIPVisionModel(config).eval(),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )  # fmt: skip
    pipe.save_pretrained(tmp_path / "base")
    file = tiny.lora_file(pipe, tmp_path / "lora", targets=("to_q", "add_k_proj", "add_v_proj"), text_targets=())
    made = MultiLoRAPipeline.from_pretrained(tmp_path / "base")
    assert made.family.name == "wan"
    made.load_lora(file, "x")
    found = made(PROMPT, image=picture, **CALL).images
    again = WanImageToVideoPipeline.from_pretrained(tmp_path / "base")
    again.load_lora_weights(file, adapter_name="x")
    close(found, theirs(again, image=picture))


# Regions


@pytest.mark.parametrize("method", ["output", "activation"])
@pytest.mark.parametrize("kind", BASES)
def test_a_region_of_the_whole_picture_is_plain_lora(kind: str, method: str, files: dict[str, Path]) -> None:
    made = composer(kind, files, "a", "c")
    parts = [part for model in models(made.pipe) for part in model.modules()]
    weights = [value.clone() for model in models(made.pipe) for value in model.parameters()]
    hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in parts]
    plain = ours(made, "merge")
    close(ours(made, method, regions=[Region(("a", "c"), box=(0.0, 0.0, 1.0, 1.0))]), plain)
    assert [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in parts] == hooks
    after = [value for model in models(made.pipe) for value in model.parameters()]
    assert all(map(torch.equal, after, weights))
    assert torch.equal(ours(made, "merge"), plain)


@pytest.mark.parametrize("kind", ["2.1", "A14B"])
def test_regions_that_do_not_see_each_other_are_separate_runs(kind: str, files: dict[str, Path]) -> None:
    """With self_mask every half is what diffusers draws alone, of half the width, with its own prompt and adapter: the
    network knows distances only. Over all steps and with guidance; in the A14B in both denoisers."""
    noise = torch.randn((1, 4, 2, 4, 4), generator=torch.Generator().manual_seed(3))
    halves = {"a": (0.0, 0.0, 0.5, 1.0), "b": (0.5, 0.0, 1.0, 1.0)}
    runs = []
    for name, part in zip(halves, (noise[..., :2], noise[..., 2:]), strict=True):
        pipe = stock(kind, files, name)
        use(pipe, **{name: 0.7})
        runs.append(theirs(pipe, prompt=f"a {name}", latents=part, width=16))
    made = composer(kind, files, "a", "b", a=0.7, b=0.7)
    regions = [Region((name,), box=box, prompt=f"a {name}") for name, box in halves.items()]
    close(ours(made, "activation", regions=regions, self_mask=True), torch.cat(runs, -1))


def test_activation_is_a_loop_over_the_rows(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of all frames see each other; of the texts each sees those of its rows."""
    texts = ("a cat", "a dog", "a fox")
    made = composer("2.1", files, "a", "b", a=reference.WEIGHTS[0], b=reference.WEIGHTS[1])
    regions = [
        Region((name,), box=box, prompt=text, scale=scale)
        for name, box, text, scale in zip("ab", reference.QUARTERS, texts[1:], reference.SCALES, strict=True)
    ]
    found = made.compose("activation", regions=regions)(texts[0], **CALL, guidance_scale=1.0).images
    share = reference.shares(reference.QUARTERS, 2, 2).repeat(1, 2)  # in both frames
    pipe = base("2.1")
    embeds = torch.cat([made.family.encode(pipe, text, None, 1, False).positive["embeds"] for text in texts], 1)
    slow = reference.Slow("wan", share, embeds.shape[1] // 3, 0)
    rows = reference.deltas([files[name] for name in "ab"], (3 / 2, 3 / 3))
    for name, module in pipe.transformer.named_modules():
        if any(name in row for row in rows):
            module.register_forward_hook(slow.hook(name, rows))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", slow.attention)
    close(found, theirs(pipe, prompt=None, prompt_embeds=embeds, guidance_scale=1.0))


def test_blended_regions_are_separate_passes(files: dict[str, Path]) -> None:
    """At one step and without guidance, the blend of two stock runs from the same noise."""
    call = {"num_inference_steps": 1, "guidance_scale": 1.0}
    runs = []
    for name in "ab":
        pipe = stock("A14B", files, name)
        noise = torch.randn((1, 4, 2, 4, 4), generator=torch.Generator().manual_seed(3))
        sized = {"height": 32, "width": 32, "num_frames": 5, "output_type": "latent"}
        runs.append(pipe(f"a {name}", latents=noise, **sized, **call).frames)
    wanted = torch.cat([runs[0][..., :2], runs[1][..., 2:]], -1)
    made = composer("A14B", files, "a", "b")
    boxes = {"a": (0.0, 0.0, 0.5, 1.0), "b": (0.5, 0.0, 1.0, 1.0)}
    regions = [Region((name,), box=box, prompt=f"a {name}") for name, box in boxes.items()]
    close(ours(made, "output", regions=regions, steps=1, guidance_scale=1.0), wanted)


def test_regions_that_a_video_does_not_have_are_refused(files: dict[str, Path]) -> None:
    made = composer("2.1", files, "a")
    for method in ("lora-composer", "cross"):
        with pytest.raises(InputError, match=r"no separate cross-attention|only for UNet"):
            made.compose(method, regions=[Region(("a",), box=(0, 0, 0.5, 1))])(PROMPT, **CALL)
    for method in ("output", "activation"):
        with pytest.raises(InputError, match=r"not known for Wan .*: give every region a place"):
            made.compose(method, regions="auto")
    made.pipe.transformer.register_to_config(image_dim=16)
    with pytest.raises(InputError, match=r"Wan 2\.1 for start pictures"):
        ours(made, "activation", regions=[Region(("a",), box=(0, 0, 0.5, 1))])


# Frames


def test_videos_are_lists_of_frames(files: dict[str, Path]) -> None:
    watcher = Watcher()
    made = composer("5B", files, "a")
    call = CALL | {"output_type": "pil", "width": 64, "images": 2}
    videos = made(PROMPT, **call, monitor=watcher, preview_every=1).images
    assert [len(frames) for frames in videos] == [5, 5]
    assert videos[0][0].size == (64, 32)
    assert watcher.reports[0].preview.size == (64, 32)
    alone = made(PROMPT, **(call | {"images": 1, "seed": 4})).images[0]
    assert max(abs(a - b) for a, b in zip(alone[2].tobytes(), videos[1][2].tobytes(), strict=True)) <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"frames": 6}, r"multiple of 4 plus 1 for this model, got 6: take 5 or 9"),
        ({"frames": 0}, r"got 0: take 1"),
        ({"width": 40}, r"multiple of 16 for this model, got 40"),
    ],
)
def test_off_the_grid(call: dict[str, Any], message: str) -> None:
    made = MultiLoRAPipeline(base("2.1"))
    with pytest.raises(InputError, match=message):
        made(PROMPT, **(CALL | call))


def test_the_familys_own_defaults() -> None:
    made = MultiLoRAPipeline(base("2.1"))
    seen: dict[str, Any] = {}
    made.pipe.__class__ = type("WanPipeline", (type(made.pipe),), {"__call__": keep(seen, type(made.pipe).__call__)})
    with pytest.raises(KeyboardInterrupt):
        made(PROMPT)
    assert (seen["num_frames"], made.family.size(made.pipe)) == (81, (480, 832))
    with pytest.raises(InputError, match="makes pictures: leave frames out"):
        MultiLoRAPipeline(tiny.sd())(PROMPT, frames=5)


def keep(seen: dict[str, Any], own: Callable[..., Any]) -> Callable[..., Any]:
    import functools

    @functools.wraps(own)
    def call(self: Any, **arguments: Any) -> Any:
        seen.update(arguments)
        raise KeyboardInterrupt

    return call


def test_a_single_file_is_refused(tmp_path: Path) -> None:
    save_file({"blocks.0.cross_attn.norm_q.weight": torch.zeros(2)}, tmp_path / "wan.safetensors")
    with pytest.raises(InputError, match=r"diffusers opens Wan .* from a directory or hub id only"):
        MultiLoRAPipeline.from_pretrained(tmp_path / "wan.safetensors")


def test_denoisers_from_files_of_their_own(tmp_path: Path) -> None:
    base("A14B").save_pretrained(tmp_path / "pair")
    base("2.1").save_pretrained(tmp_path / "one")
    others = {"high": base("2.1", 1).transformer, "low": base("2.1", 2).transformer}
    for word, model in others.items():
        save_file(model.state_dict(), tmp_path / f"x_{word}_noise.safetensors")
    for word in others:  # either names both
        made = MultiLoRAPipeline.from_pretrained(
            tmp_path / "pair", device="cpu", denoiser=tmp_path / f"x_{word}_noise.safetensors"
        )
        for model, wanted in zip(models(made.pipe), others.values(), strict=True):
            assert all(torch.equal(value, model.state_dict()[key]) for key, value in wanted.state_dict().items())
    alone = MultiLoRAPipeline.from_pretrained(
        tmp_path / "one", device="cpu", denoiser=tmp_path / "x_low_noise.safetensors"
    )
    key = next(iter(others["low"].state_dict()))
    assert torch.equal(alone.pipe.transformer.state_dict()[key], others["low"].state_dict()[key])
    (tmp_path / "x_low_noise.safetensors").rename(tmp_path / "y.safetensors")
    for name in ("x_high_noise", "y"):
        with pytest.raises(InputError, match=r"has 2 denoisers, and .* as in x_high_noise.* and x_low_noise"):
            MultiLoRAPipeline.from_pretrained(
                tmp_path / "pair", device="cpu", denoiser=tmp_path / f"{name}.safetensors"
            )


def test_a_recipe_knows_both_files_of_its_denoisers(tmp_path: Path) -> None:
    from studio.composition import recipes
    from studio.composition.schema import ComposeConfig

    base("A14B").save_pretrained(tmp_path / "pair")
    for word in ("high", "low"):
        (tmp_path / f"x_{word}_noise.safetensors").write_bytes(word.encode())
    config = ComposeConfig(base=str(tmp_path / "pair"), denoiser=str(tmp_path / "x_high_noise.safetensors"))
    made = recipes.build(config, {})["denoiser"]
    assert list(made["others"]) == ["x_low_noise.safetensors"]
    assert recipes._present_beside(config.denoiser, made, "denoiser", "denoiser") == config.denoiser
    (tmp_path / "x_low_noise.safetensors").write_bytes(b"another")
    with pytest.raises(InputError, match="of the recipe is not here"):
        recipes._present_beside(config.denoiser, made, "denoiser", "denoiser")


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
def test_a_gguf_pair_takes_a_pair_of_adapters(tmp_path: Path) -> None:
    """Against diffusers' own GGUF transformers with each half loaded into its own."""
    import diffusers

    def wide() -> Any:
        return FAMILIES["wan"].tiny(0, boundary_ratio=0.8, attention_head_dim=16)

    wide().save_pretrained(tmp_path / "pair")
    words = {"high": "transformer", "low": "transformer_2"}
    pipe = wide()
    for seed, (word, name) in enumerate(words.items(), 1):
        write_gguf(getattr(pipe, name), tmp_path / f"x_{word}_noise.gguf", "Q8_0")
        made = tiny.lora_file(
            wide(), tmp_path / word, seed=seed, rank=2, targets=("to_q", "ffn.net.2"), text_targets=()
        )
        half(made, tmp_path / f"thing_{word}_noise.safetensors")
    stored = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    parts = {
        name: diffusers.WanTransformer3DModel.from_single_file(
            tmp_path / f"x_{word}_noise.gguf", config=str(tmp_path / "pair"), subfolder=name,
            quantization_config=stored, dtype=torch.float32,
        )
        for word, name in words.items()
    }  # fmt: skip
    pipe = diffusers.WanPipeline.from_pretrained(tmp_path / "pair", **parts)
    pipe.set_progress_bar_config(disable=True)
    plain = theirs(pipe)
    for word, name in words.items():
        place = tmp_path / f"thing_{word}_noise.safetensors"
        pipe.load_lora_weights(place, adapter_name="thing", load_into_transformer_2=name == "transformer_2")
    use(pipe, thing=0.7)
    made = MultiLoRAPipeline.from_pretrained(tmp_path / "pair", device="cpu", denoiser=tmp_path / "x_low_noise.gguf")
    assert all(storage(model.blocks[0].attn1.to_q) == "gguf q8_0" for model in models(made.pipe))
    close(ours(made, "merge"), plain)
    made.load_lora(tmp_path / "thing_high_noise.safetensors", "thing", weight=0.7)
    wanted = theirs(pipe)
    close(ours(made, "merge"), wanted)
    assert not torch.allclose(wanted, plain, atol=1e-2)
    made.rack.clear()
    close(ours(made, "merge"), plain)
