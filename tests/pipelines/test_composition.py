"""What must hold for every way of composing, on a tiny Stable Diffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_base import set_adapters_for_text_encoder

from adapters.errors import Cancelled, InputError
from adapters.progress import Progress
from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.denoise import Denoising
from tests.pipelines.conftest import CALL, PROMPT, Bed, close, latents, peft_latents

METHODS = ("merge", "switch", "composite")


# One adapter, no adapter


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_one_adapter_is_plain_lora_bitwise(sd: Bed, method: str, weight: float) -> None:
    pipe = sd.pipe()
    pipe.load_lora_weights(sd.files["a"], adapter_name="a")
    pipe.set_adapters(["a"], [weight])
    close(latents(sd.composer("a", a=weight), method), peft_latents(pipe))


@pytest.mark.parametrize("method", METHODS)
def test_no_adapter_and_zero_weights_are_the_base_bitwise(sd: Bed, method: str) -> None:
    base = peft_latents(sd.pipe())
    assert torch.equal(latents(sd.composer(), method), base)
    assert torch.equal(latents(sd.composer("a", "b", a=0.0, b=0.0), method), base)


@pytest.mark.parametrize("method", METHODS)
def test_weights_one_and_zero_are_the_first_adapter(sd: Bed, method: str) -> None:
    alone = latents(sd.composer("a"), "merge")
    both = sd.composer("a", "b", b=0.0)
    found = latents(both, method, te_mode="merged" if method == "switch" else "auto", tau=4)
    assert torch.equal(found, alone)


# Merge


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_merge_equals_set_adapters(sd: Bed, guidance: float) -> None:
    pipe = sd.pipe()
    for name in "abc":
        pipe.load_lora_weights(sd.files[name], adapter_name=name)
    pipe.set_adapters(["a", "b", "c"], [0.8, 0.5, -0.4])
    composer = sd.composer("a", "b", "c", a=0.8, b=0.5, c=-0.4)
    close(latents(composer, "merge", guidance_scale=guidance), peft_latents(pipe, guidance))


def test_merge_equals_fuse_lora(sd: Bed) -> None:
    pipe = sd.pipe()
    for name in "ab":
        pipe.load_lora_weights(sd.files[name], adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.8, 0.5])
    pipe.fuse_lora(adapter_names=["a", "b"])
    close(latents(sd.composer("a", "b", a=0.8, b=0.5), "merge"), peft_latents(pipe))


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_export_equals_the_dynamic_merge(sd: Bed, tmp_path: Path, format: str) -> None:
    composer = sd.composer("a")
    composer.load_lora(sd.files["b"], "b", weight=0.5, te_weight=0.2, blocks={"down_blocks.0": 0.5, "mid_block": 0.0})
    path = tmp_path / ("merged" if format == "peft" else "merged.safetensors")
    merged = composer.compose("merge").export(path, format)
    assert merged.errors == {}
    again = MultiLoRAPipeline(sd.pipe())
    again.load_lora(path)
    close(latents(again, "merge"), latents(composer, "merge"))


def test_cut_export_reports_its_errors(sd: Bed, tmp_path: Path) -> None:
    merged = sd.composer("a", "b").compose("merge").export(tmp_path / "cut.safetensors", rank=3)
    assert merged.errors
    assert all(0 < error < 1 for error in merged.errors.values())
    assert merged.file.ranks() == (3,)


# Composite


def separate_passes(sd: Bed, names: list[str], guidance: float, weights: list[float] | None = None) -> torch.Tensor:
    """The official program: N passes with set_adapters before each; the prompt encoded with each adapter alone."""
    pipe = sd.pipe()
    weights = weights or [1.0] * len(names)
    for name in names:
        pipe.load_lora_weights(sd.files[name], adapter_name=name)
    texts = []
    for name, weight in zip(names, weights, strict=True):
        pipe.set_adapters([name], [weight])
        positive, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
        texts.append(torch.cat([negative, positive]) if guidance > 1 else positive)
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            guided = []
            for name, weight, text in zip(names, weights, texts, strict=True):
                pipe.set_adapters([name], [weight])
                halves = torch.cat([z] * 2) if guidance > 1 else z
                noise = pipe.unet(halves, t, encoder_hidden_states=text).sample
                if guidance > 1:
                    without, with_text = noise.chunk(2)
                    noise = without + guidance * (with_text - without)
                guided.append(noise)
            z = pipe.scheduler.step(torch.stack(guided).mean(0), t, z).prev_sample
    return z


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("adapter_batch", [None, 1, 2])
def test_composite_equals_separate_passes(sd: Bed, guidance: float, adapter_batch: int | None) -> None:
    composer = sd.composer("a", "b", "c", b=0.7)
    found = latents(composer, "composite", guidance_scale=guidance, adapter_batch=adapter_batch)
    close(found, separate_passes(sd, ["a", "b", "c"], guidance, [1.0, 0.7, 1.0]))


def test_composite_of_identical_adapters_is_plain(sd: Bed) -> None:
    composer = sd.composer("a")
    composer.load_lora(sd.files["a"], "again")
    composer.load_lora(sd.files["a"], "third")
    close(latents(composer, "composite"), latents(sd.composer("a"), "merge"))


@pytest.mark.parametrize("method", ["merge", "composite"])
def test_order_does_not_matter(sd: Bed, method: str) -> None:
    composer = sd.composer("a", "b", "c")
    close(latents(composer, method), latents(composer, method, adapters=["c", "a", "b"]))


def test_composing_some_of_the_loaded(sd: Bed) -> None:
    everything = sd.composer("a", "b", "c")
    assert torch.equal(
        latents(everything, "composite", adapters=["a", "c"]), latents(sd.composer("a", "c"), "composite")
    )


# Switch


def test_long_turns_are_the_first_adapter(sd: Bed) -> None:
    assert torch.equal(latents(sd.composer("a", "b"), "switch", tau=4), latents(sd.composer("a"), "merge"))


def test_switch_takes_turns(sd: Bed) -> None:
    """tau = 1 on four steps: a b a b, each with its own text encoding."""
    pipe = sd.pipe()
    for name in "ab":
        pipe.load_lora_weights(sd.files[name], adapter_name=name)
    texts = {}
    for name in "ab":
        pipe.set_adapters([name])
        positive, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
        texts[name] = torch.cat([negative, positive])
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        for name, t in zip("abab", pipe.scheduler.timesteps, strict=True):
            pipe.set_adapters([name])
            without, with_text = pipe.unet(torch.cat([z] * 2), t, encoder_hidden_states=texts[name]).sample.chunk(2)
            z = pipe.scheduler.step(without + 5.0 * (with_text - without), t, z).prev_sample
    close(latents(sd.composer("a", "b"), "switch"), z)


# Text encoders


def test_text_modes(sd: Bed) -> None:
    """What is encoded with which text encoder LoRAs."""
    composer = sd.composer("a", "b")
    spoken = [
        (composer.compose(method, te_mode=mode).plan(4).te_mode, composer.plan(4).encodings)
        for method, mode in (
            ("merge", "auto"),
            ("switch", "auto"),
            ("composite", "auto"),
            ("switch", "official"),
            ("composite", "official"),
        )
    ]
    assert spoken == [("merged", 1), ("per_adapter", 2), ("per_adapter", 2), ("official", 1), ("official", 1)]
    merged = latents(composer, "composite", te_mode="merged")
    assert torch.equal(merged, latents(composer, "composite", te_mode="official"))
    assert not torch.allclose(merged, latents(composer, "composite"))


def test_official_switch_encodes_with_the_first_adapter(sd: Bed) -> None:
    composer = sd.composer("a", "b")
    official = latents(composer, "switch", te_mode="official")
    silent = sd.composer("a")
    silent.load_lora(sd.files["b"], "b", te_weight=0.0)
    assert torch.equal(official, latents(silent, "switch", te_mode="merged"))


def test_te_weight(sd: Bed) -> None:
    pipe = sd.pipe()
    pipe.load_lora_weights(sd.files["a"], adapter_name="a")
    pipe.set_adapters(["a"], [0.8])
    set_adapters_for_text_encoder(["a"], pipe.text_encoder, [0.3])
    composer = MultiLoRAPipeline(sd.pipe())
    composer.load_lora(sd.files["a"], "a", weight=0.8, te_weight=0.3)
    close(latents(composer, "merge"), peft_latents(pipe))


# Blocks and schedules


def test_block_weights_by_exact_prefix(sd: Bed) -> None:
    """The factor holds for the block alone; a prefix is a whole name."""
    composer = MultiLoRAPipeline(sd.pipe())
    composer.load_lora(sd.files["a"], "a", blocks={"up_blocks.1": 0.25, "up_blocks.1.attentions.1": 2.0})
    gated = {layer.name: layer for layer in composer.joined().denoiser.layers}
    whole = {layer.name: layer for layer in sd.composer("a").joined().denoiser.layers}
    ratios = {name: float((gated[name].B / whole[name].B).nanmean()) for name in gated}
    for name, ratio in ratios.items():
        wanted = (
            2.0 if name.startswith("up_blocks.1.attentions.1.") else 0.25 if name.startswith("up_blocks.1.") else 1.0
        )
        assert ratio == pytest.approx(wanted), name
    with pytest.raises(InputError, match="No layer of this adapter is in the block 'up_block'"):
        MultiLoRAPipeline(sd.pipe()).load_lora(sd.files["a"], blocks={"up_block": 0.5})


def test_block_weights_equal_peft(sd: Bed) -> None:
    pipe = sd.pipe()
    pipe.load_lora_weights(sd.files["a"], adapter_name="a")
    pipe.set_adapters(["a"], [{"unet": {"down": 0.2, "mid": 0.7, "up": 1.0}, "text_encoder": 1.0}])
    composer = MultiLoRAPipeline(sd.pipe())
    composer.load_lora(sd.files["a"], "a", blocks={"down_blocks": 0.2, "mid_block": 0.7})
    close(latents(composer, "merge"), peft_latents(pipe))


def test_schedule_in_halves_equals_two_half_runs_bitwise(sd: Bed) -> None:
    """A on [0, .5) and B on [.5, 1) is: two steps with A alone, then two with B alone."""
    composer = MultiLoRAPipeline(sd.pipe())
    composer.load_lora(sd.files["a"], "a", te_weight=0.0, schedule=[(0, 1), (0.5, 1), (0.5, 0), (1, 0)])
    composer.load_lora(sd.files["b"], "b", te_weight=0.0, schedule=[(0, 0), (0.5, 0), (0.5, 1), (1, 1)])
    found = latents(composer, "merge")

    pipe = sd.pipe()
    composer_a, composer_b = (sd_composer(pipe, sd.files[name], name) for name in "ab")
    text = torch.cat(list(reversed(pipe.encode_prompt(PROMPT, "cpu", 1, True))))
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    pipe.scheduler.set_timesteps(4)
    for k, t in enumerate(pipe.scheduler.timesteps):
        half = composer_a if k < 2 else composer_b
        with half.joined().denoiser.attached() as gates, torch.no_grad():
            gates.joint([1.0])
            noise = pipe.unet(torch.cat([z] * 2), t, encoder_hidden_states=text, return_dict=False)[0]
        without, with_text = noise.chunk(2)
        z = pipe.scheduler.step(without + 5.0 * (with_text - without), t, z, return_dict=False)[0]
    assert torch.equal(found, z)
    assert torch.equal(latents(composer, "composite"), found)  # one adapter at a time is one prediction


def sd_composer(pipe: Any, path: Path, name: str) -> MultiLoRAPipeline:
    composer = MultiLoRAPipeline(pipe)
    composer.load_lora(path, name)
    return composer


def test_scheduled_strength_is_weight_times_factor(sd: Bed) -> None:
    composer = MultiLoRAPipeline(sd.pipe())
    composer.load_lora(sd.files["a"], "a", weight=2.0, schedule=[(0, 0), (1, 1)])
    assert [row[0] for row in composer.plan(4).gates] == [0.0, 0.5, 1.0, 1.5]


# DoRA


def test_dora_equals_peft(sd: Bed, tmp_path: Path) -> None:
    from tests import tiny

    path = tiny.lora_file(sd.pipe(), tmp_path, use_dora=True, text_targets=())
    pipe = sd.pipe()
    pipe.load_lora_weights(path, adapter_name="d")
    pipe.set_adapters(["d"], [0.7])
    composer = MultiLoRAPipeline(sd.pipe())
    assert composer.load_lora(path, "d", weight=0.7).dora
    close(latents(composer, "merge"), peft_latents(pipe))
    close(latents(composer, "composite"), peft_latents(pipe))


def test_dora_may_be_switched_but_not_faded(sd: Bed, tmp_path: Path) -> None:
    from tests import tiny

    path = tiny.lora_file(sd.pipe(), tmp_path, use_dora=True, text_targets=())
    composer = MultiLoRAPipeline(sd.pipe())
    composer.load_lora(path, "on", schedule=[(0, 1), (0.5, 1), (0.5, 0)])
    assert [row[0] for row in composer.plan(4).gates] == [1, 1, 0, 0]
    composer.load_lora(path, "fading", schedule=[(0, 1), (1, 0)])
    with pytest.raises(InputError, match="'fading' is a DoRA adapter"):
        composer.plan(4)


# Pictures


def test_picture_k_has_its_own_seed(sd: Bed) -> None:
    composer = sd.composer("a", "b")
    for method in METHODS:
        many = latents(composer, method, images=3, seed=10)
        one = latents(composer, method, images=1, seed=12)
        close(many[2:], one)
    assert len(composer(PROMPT, steps=1, images=2).images) == 2


def test_images_are_pictures_of_the_models_size(sd: Bed) -> None:
    picture = sd.composer("a")(PROMPT, steps=1).images[0]
    assert picture.size == (32, 32)
    assert sd.composer("a")(PROMPT, steps=1, width=48).images[0].size == (48, 32)
    assert sd.composer("a")(PROMPT, steps=1, height=48).images[0].size == (32, 48)


@pytest.mark.parametrize("name", ["default", "ddim", "dpm++", "euler", "euler_a", "unipc", "lcm"])
def test_every_sampler(sd: Bed, name: str) -> None:
    """Each runs, is asked once per step on the reduced prediction, and is put back."""
    composer = sd.composer("a", "b")
    own = composer.pipe.scheduler
    found = latents(composer, "composite", scheduler=name, images=2)
    assert torch.isfinite(found).all()
    assert composer.pipe.scheduler is own


def test_scheduler_steps_once_per_step(sd: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDIMScheduler

    shapes = []
    step = DDIMScheduler.step

    def counted(self: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(noise.shape))
        return step(self, noise, *args, **kwargs)

    monkeypatch.setattr(DDIMScheduler, "step", counted)
    composer = sd.composer("a", "b", "c")
    latents(composer, "composite")
    assert shapes == [(1, 4, 16, 16)] * 4
    assert composer.plan(4).forwards == 12


def test_samplers_that_ask_more_often(sd: Bed) -> None:
    """PNDM asks T + 1 times; the plan knows."""
    from diffusers import PNDMScheduler

    composer = sd.composer("a", "b")
    composer.pipe.scheduler = PNDMScheduler.from_config(composer.pipe.scheduler.config, skip_prk_steps=True)
    assert len(composer.plan(4).steps) == 5
    assert torch.isfinite(latents(composer, "switch")).all()


# Plan, progress, state


def test_plan_says_what_happens(sd: Bed) -> None:
    plan = sd.composer("a", "b").compose("switch", tau=2).plan(6)
    assert [step.active for step in plan.steps] == [(0,), (0,), (1,), (1,), (0,), (0,)]
    assert plan.forwards == 6
    assert plan.memory > 0
    text = str(plan)
    assert "step 0-1: a 1" in text
    assert "step 2-3: b 1" in text
    assert sd.composer("a", "b").compose("composite").plan(6).to_dict()["samples"] == 24


def test_reports_say_which_layers_are_changed(sd: Bed) -> None:
    composer = sd.composer("a", "c")
    linear = [name for name, module in sd.pipe().unet.named_modules() if isinstance(module, torch.nn.Linear)]
    wanted = sum(name.endswith(("to_q", "to_k", "to_v", "to_out.0")) for name in linear)
    found = composer.adapters["a"].coverage
    assert (found["unet"].linear, found["unet"].of, found["unet"].others) == (wanted, len(linear), 0)
    assert composer.adapters["c"].coverage["unet"].others > 0
    plan = composer.compose("merge").plan(4)
    told = f"unet {wanted} of {len(linear)} linear layers ("
    assert told in str(plan)
    assert told in plan.to_dict()["layers"]["a"]
    assert told in str(composer.adapters["a"])


def test_plan_matches_the_run(sd: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    before = Denoising._before
    monkeypatch.setattr(Denoising, "_before", lambda self, *args: (calls.append(self.step), before(self, *args))[1])
    composer = sd.composer("a", "b").compose("composite", adapter_batch=1)
    latents(composer)
    assert calls == [0, 1, 2, 3]


class Watcher:
    """Remembers reports; asks to stop after some steps."""

    def __init__(self, stop_after: int = 99) -> None:
        self.reports: list[Progress] = []
        self.stop_after = stop_after

    def report(self, progress: Progress) -> None:
        self.reports.append(progress)

    def cancelled(self) -> bool:
        return len(self.reports) >= self.stop_after


def test_progress_and_previews(sd: Bed) -> None:
    watcher = Watcher()
    latents(sd.composer("a"), "merge", monitor=watcher, preview_every=2, steps=5)
    assert [(report.step, report.total) for report in watcher.reports] == [(k + 1, 5) for k in range(5)]
    assert [report.preview is not None for report in watcher.reports] == [False, True, False, True, False]
    assert watcher.reports[1].preview.size == (32, 32)


def state(composer: MultiLoRAPipeline) -> tuple[Any, ...]:
    pipe = composer.pipe
    modules = [
        (name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for part in (pipe.unet, pipe.text_encoder, pipe.vae)
        for name, module in part.named_modules()
    ]
    weights = [
        (tensor.data_ptr(), tensor._version, tensor.requires_grad)
        for part in (pipe.unet, pipe.text_encoder)
        for tensor in part.parameters()
    ]
    return modules, weights, id(pipe.scheduler), dict(pipe.scheduler.config), pipe._progress_bar_config


@pytest.mark.parametrize("method", METHODS)
def test_everything_is_restored_after_a_call_a_stop_and_a_failure(
    sd: Bed, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    composer = sd.composer("a", "b")
    before = state(composer)
    good = latents(composer, method)
    assert state(composer) == before
    with pytest.raises(Cancelled):
        latents(composer, method, monitor=Watcher(stop_after=2))
    assert state(composer) == before
    with monkeypatch.context() as patch:
        patch.setattr(type(composer.pipe.scheduler), "step", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            latents(composer, method)
    assert state(composer) == before
    assert torch.equal(latents(composer, method), good)
    assert torch.equal(peft_latents(composer.pipe), peft_latents(sd.pipe()))


def test_context_manager_forgets_the_adapters(sd: Bed) -> None:
    with sd.composer("a", "b").compose("composite") as composer:
        latents(composer)
    assert composer.adapters == {}
    assert torch.equal(latents(composer), peft_latents(sd.pipe()))


def test_out_of_memory_proposes_what_to_do(sd: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    composer = sd.composer("a", "b")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(composer.pipe.scheduler), "step", full)
    with pytest.raises(InputError, match="adapter_batch=1"):
        latents(composer, "composite")
    with pytest.raises(InputError, match="memory="):
        latents(composer, "merge")


# Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "composit"}, "did you mean 'composite'"),
        ({"method": "merge", "adapters": ["a", "x"]}, "No adapter 'x'"),
        ({"method": "merge", "adapters": ["a", "a"]}, "named twice"),
        ({"method": "switch", "tau": 0}, "tau must be at least 1"),
        ({"method": "composite", "adapter_batch": 0}, "adapter_batch must be at least 1"),
        ({"method": "merge", "te_mode": "per_adapter"}, "one adapter per prediction"),
        ({"method": "merge", "te_mode": "loud"}, "Unknown te_mode"),
    ],
)
def test_compositions_that_are_refused(sd: Bed, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        sd.composer("a", "b").compose(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "a"}, "already loaded"),
        ({"weight": float("nan")}, "finite"),
        ({"te_weight": float("inf")}, "finite"),
        ({"schedule": [(0.5, 1), (0.2, 0)]}, "not in order"),
        ({"schedule": [(0, 1), (1.5, 0)]}, "outside"),
        ({"schedule": [(0, float("nan"))]}, "not finite"),
        ({"blocks": {"middle": 1.0}}, "No layer"),
        ({"blocks": {"mid_block": float("inf")}}, "finite"),
    ],
)
def test_adapters_that_are_refused(sd: Bed, options: dict[str, Any], words: str) -> None:
    composer = sd.composer("a")
    with pytest.raises(InputError, match=words):
        composer.load_lora(sd.files["b"], **options)
    assert list(composer.adapters) == ["a"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps"),
        ({"images": 0}, "images"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"seed": -1}, "seed"),
        ({"width": 33}, "multiple of 2"),
        ({"scheduler": "heun"}, "not possible"),
        ({"prompt": [PROMPT, PROMPT]}, "The prompt must be one text, got a list"),
        ({"negative_prompt": [PROMPT]}, "The negative prompt must be one text"),
    ],
)
def test_calls_that_are_refused(sd: Bed, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        sd.composer("a")(**({"prompt": PROMPT} | CALL | options))


def test_fused_and_foreign_adapters_are_refused(sd: Bed) -> None:
    pipe = sd.pipe()
    pipe.load_lora_weights(sd.files["a"], adapter_name="a")
    with pytest.raises(InputError, match="has adapters of its own"):
        MultiLoRAPipeline(pipe)
    pipe.fuse_lora()
    with pytest.raises(InputError, match="fused"):
        MultiLoRAPipeline(pipe)
    pipe.unload_lora_weights()
    with pytest.raises(InputError, match="fused"):  # the weights still hold the adapter
        MultiLoRAPipeline(pipe)
    compiled = sd.pipe()
    compiled.unet = torch.compile(compiled.unet)
    with pytest.raises(InputError, match="compiled"):
        MultiLoRAPipeline(compiled)
    clean = sd.composer("a")
    clean.pipe.fuse_qkv_projections()
    with pytest.raises(InputError, match="unfuse_qkv_projections"):
        latents(clean)


@pytest.mark.parametrize("method", ["switch", "composite"])
def test_dynamic_compositions_are_not_exported(sd: Bed, tmp_path: Path, method: str) -> None:
    with pytest.raises(InputError, match="only 'merge' can be exported"):
        sd.composer("a", "b").compose(method).export(tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_scheduled_merges_are_not_exported(sd: Bed, tmp_path: Path) -> None:
    composer = MultiLoRAPipeline(sd.pipe())
    composer.load_lora(sd.files["a"], "a", schedule=[(0, 1), (1, 0)])
    with pytest.raises(InputError, match="schedule"):
        composer.export(tmp_path / "x.safetensors")
