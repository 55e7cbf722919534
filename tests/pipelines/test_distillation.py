"""The mathematics of distillation against diffusers, PEFT and algebra, and distilled adapters in a pipeline."""

from __future__ import annotations

import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from peft import LoraConfig
from torch import nn

from adapters.errors import FamilyError, InputError
from adapters.formats import read, write_diffusers, write_kohya, write_peft
from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.distillation import embedding, use
from pipelines.diffusion.distillation.consistency import DiffusionPath, FlowPath, boundary, pseudo_huber
from pipelines.diffusion.distillation.guidance import guidance_at, guided, strength, within
from pipelines.diffusion.distillation.mark import Mark, read_mark
from pipelines.diffusion.distillation.student import Student, static_bytes
from tests import tiny

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
TEN = {"num_inference_steps": 10}


def abar() -> torch.Tensor:
    return DDIMScheduler(**NOISE).alphas_cumprod


def inputs(batch: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    times = torch.randint(0, 1000, (batch,), generator=generator)
    return torch.randn(batch, 4, 16, 16, generator=generator), times, torch.randn(batch, 7, 16, generator=generator)


def unet_with_adapter(rank: int = 2, trained: bool = False):
    """A tiny UNet with a PEFT adapter on attention and convolutions."""
    torch.manual_seed(0)
    unet = tiny.unet()
    plain = {name: value.clone() for name, value in unet.state_dict().items()}
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_v", "conv1", "time_emb_proj"]))
    if trained:
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return unet, plain


# ------------------------------------------------------------------------------------------------ guidance


def test_guidance_is_diffusers():
    without, with_prompt = torch.randn(2, 3, 4, 8, 8).double()
    for w in (1.5, 7.5):
        wanted = without + w * (with_prompt - without)
        torch.testing.assert_close(guided(without, with_prompt, w), wanted)
        torch.testing.assert_close(
            guided(without, with_prompt, w, rescale=0.7), rescale_noise_cfg(wanted, with_prompt, 0.7)
        )
    each = torch.tensor([1.0, 2.0, 5.0]).double()
    wanted = torch.stack([guided(without[k : k + 1], with_prompt[k : k + 1], float(w))[0] for k, w in enumerate(each)])
    torch.testing.assert_close(guided(without, with_prompt, each), wanted)


def test_no_guidance_is_the_conditional_prediction_to_the_bit():
    without, with_prompt = torch.randn(2, 3, 4, 8, 8)
    assert torch.equal(guided(without, with_prompt, 1.0), with_prompt)
    assert torch.equal(guided(without, with_prompt, torch.ones(3)), with_prompt)


def test_guided_v_and_guided_epsilon_are_one_field():
    path = DiffusionPath(abar(), "v_prediction", 50)
    noisy, times, _ = inputs()
    without, with_prompt = torch.randn(2, *noisy.shape)
    as_noise = [path.clean_and_noise(noisy, v, times)[1] for v in (without, with_prompt)]
    _, converted = path.clean_and_noise(noisy, guided(without, with_prompt, 6.0), times)
    torch.testing.assert_close(converted, guided(as_noise[0], as_noise[1], 6.0), rtol=1e-5, atol=1e-5)


def test_strength_and_guidance_are_inverse():
    for w in (1.0, 2.5, 4.0, 9.0):
        assert guidance_at(float(strength(w, 4.0)), 4.0) == pytest.approx(w)
    assert strength(1.0, 4.0) == 0
    assert strength(4.0, 4.0) == 1


def test_an_interval_leaves_the_rest_unguided():
    w = within(torch.full((3,), 7.0), torch.tensor([0.1, 0.5, 0.95]), 0.2, 0.9)
    assert w.tolist() == [1.0, 7.0, 1.0]


# ------------------------------------------------------------------------------------------------ teacher and student


def test_the_teacher_is_the_untouched_base_also_with_checkpointing():
    unet, plain = unet_with_adapter(trained=True)
    student = Student(unet, "default")
    noisy, times, words = inputs()
    torch.manual_seed(0)
    base = tiny.unet()
    with torch.no_grad():
        wanted = base(noisy, times, words).sample
        with student.off():
            assert torch.equal(unet(noisy, times, words).sample, wanted)
        assert not torch.equal(unet(noisy, times, words).sample, wanted)
    unet.train()
    unet.enable_gradient_checkpointing()
    with torch.no_grad(), student.off():
        target = unet(noisy, times, words).sample
    (unet(noisy, times, words).sample - 2 * target).square().mean().backward()
    checkpointed = {name: p.grad.clone() for name, p in unet.named_parameters() if p.requires_grad}
    unet.disable_gradient_checkpointing()
    unet.zero_grad()
    (unet(noisy, times, words).sample - 2 * target).square().mean().backward()
    for name, parameter in unet.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, checkpointed[name], rtol=1e-4, atol=1e-7)
    frozen = {name.replace(".base_layer", ""): p for name, p in unet.named_parameters() if "lora_" not in name}
    assert all(torch.equal(plain[name], value) for name, value in frozen.items())


def test_a_fresh_student_is_the_conditional_teacher_and_its_loss_is_known():
    unet, _ = unet_with_adapter()
    student = Student(unet, "default")
    noisy, times, words = inputs()
    null = torch.randn(1, 7, 16).expand(3, -1, -1)
    with torch.no_grad(), student.off():
        conditional, without = unet(noisy, times, words).sample, unet(noisy, times, null).sample
    answer = unet(noisy, times, words).sample
    assert torch.equal(answer, conditional)
    loss = (answer - guided(without, conditional, 5.0)).square().mean()
    assert float(loss.detach()) == pytest.approx(float((16 * (conditional - without).square()).mean()), rel=1e-6)
    nothing = (answer - guided(without, conditional, 1.0)).square().mean()
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert all(not p.grad.any() for p in unet.parameters() if p.grad is not None)


def test_every_sample_has_its_own_strength():
    unet, _ = unet_with_adapter(trained=True)
    student = Student(unet, "default")
    noisy, times, words = inputs()
    with torch.no_grad():
        student.set_strength(torch.tensor([0.0, 0.5, 1.0]))
        mixed = unet(noisy, times, words).sample
        for row, share in enumerate((0.0, 0.5, 1.0)):
            student.set_strength(torch.full((3,), share))
            torch.testing.assert_close(unet(noisy, times, words).sample[row], mixed[row], rtol=1e-5, atol=1e-6)
        student.set_strength(None)
        assert all(layer.scaling["default"] == 1.0 for layer in student.layers)
        torch.testing.assert_close(unet(noisy, times, words).sample[2], mixed[2], rtol=1e-5, atol=1e-6)
        with student.off():
            torch.testing.assert_close(unet(noisy, times, words).sample[0], mixed[0], rtol=1e-5, atol=1e-6)


def test_only_the_adapter_adds_bytes():
    unet, plain = unet_with_adapter(rank=3)
    wanted = 0
    for module in unet.modules():
        if hasattr(module, "lora_A"):
            weight = module.base_layer.weight
            inner = weight[0].numel()
            wanted += 4 * 3 * (inner + weight.shape[0])
    sizes = static_bytes(unet)
    assert sizes["learning"] == wanted
    assert sizes["frozen"] == sum(value.nbytes for value in plain.values())


# ------------------------------------------------------------------------------------------------ consistency


def test_the_boundary_gives_the_state_itself():
    skip, out = boundary(torch.tensor([0, 999]))
    assert (float(skip[0]), float(out[0])) == (1.0, 0.0)
    reference = LCMScheduler(**NOISE | {"clip_sample": False})
    wanted = reference.get_scalings_for_boundary_condition_discrete(999)
    assert (float(skip[1]), float(out[1])) == pytest.approx([float(value) for value in wanted])
    noisy, _, _ = inputs()
    path = DiffusionPath(abar(), "epsilon", 50)
    assert torch.equal(path.jump(noisy, torch.randn_like(noisy), torch.zeros(3, dtype=torch.long)), noisy)
    assert torch.equal(FlowPath(3.0, 10).jump(noisy, torch.randn_like(noisy), torch.zeros(3)), noisy)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_step_is_ddim(prediction):
    scheduler = DDIMScheduler(**NOISE, prediction_type=prediction, timestep_spacing="trailing", set_alpha_to_one=False)
    scheduler.set_timesteps(50)
    path = DiffusionPath(scheduler.alphas_cumprod, prediction, 50)
    assert path.start().flip(0).tolist() == scheduler.timesteps.tolist()
    state = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for time in (scheduler.timesteps[0], scheduler.timesteps[20], scheduler.timesteps[-1]):
        answer = torch.randn_like(state)
        start = time.expand(2)
        end = path.end(start)
        assert int(end[0]) == max(int(time) - 20, 0)
        wanted = scheduler.step(answer, time, state, eta=0.0).prev_sample
        torch.testing.assert_close(path.step(state, answer, start, end), wanted, rtol=1e-4, atol=1e-5)


def test_a_jump_is_what_the_lcm_sampler_ends_on():
    scheduler = LCMScheduler(**NOISE, prediction_type="v_prediction")
    scheduler.set_timesteps(1)
    path = DiffusionPath(scheduler.alphas_cumprod, "v_prediction", 50)
    state, answer = torch.randn(2, 1, 4, 8, 8)
    wanted = scheduler.step(answer, scheduler.timesteps[0], state).denoised
    torch.testing.assert_close(path.jump(state, answer, scheduler.timesteps[:1]), wanted, rtol=1e-5, atol=1e-5)


def test_flow_steps_are_eulers():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    path = FlowPath(3.0, 8)
    scheduler.set_timesteps(sigmas=[k / 8 for k in range(8, 0, -1)])
    torch.testing.assert_close(path.start().flip(0), scheduler.sigmas[:-1])
    state, answer = torch.randn(2, 1, 4, 8, 8)
    start = path.start().flip(0)[2:3]
    scheduler._step_index = 2
    wanted = scheduler.step(answer, scheduler.timesteps[2], state).prev_sample
    torch.testing.assert_close(path.step(state, answer, start, path.end(start)), wanted, rtol=1e-5, atol=1e-6)
    assert float(path.end(path.start()[:1])) == 0


def test_pseudo_huber_is_quadratic_then_absolute():
    error, zero = torch.tensor([1e-5, 10.0]).double(), torch.zeros(2).double()
    value = pseudo_huber(error, zero, 1e-2).double()
    assert float(value[0]) == pytest.approx(1e-10 / 2e-2, rel=0.2)
    assert float(value[1]) == pytest.approx(10.0, rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "sentence"), [(("flow", 50), "supported are"), (("epsilon", 0), "between 1 and 1000")]
)
def test_paths_that_cannot_be(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        DiffusionPath(abar(), *arguments)


# ------------------------------------------------------------------------------------------------ files


MARK = Mark(
    mode="fixed", guidance=4.0, low=4.0, high=4.0, null_prompt="ugly, 'blurred'", prediction_type="epsilon",
    rescale=0.7, interval=(0.1, 0.9), base="tiny", objective="consistency", steps=4, sampler="lcm",
)  # fmt: skip


def adapter(folder: Path, mark: Mark | None, seed: int = 1, name: str = "adapter") -> Path:
    """A random LoRA for the tiny pipeline, marked as distilled."""
    folder.mkdir(exist_ok=True)
    file = read(tiny.lora_file(tiny.sd(), folder, seed=seed, text_targets=()))
    path = folder / f"{name}.safetensors"
    return write_diffusers(file, path, mark.to_metadata() if mark else {})


@pytest.mark.parametrize("mode", ["fixed", "strength", "embedding"])
@pytest.mark.parametrize("writer", [write_diffusers, write_kohya, write_peft])
def test_the_mark_survives_every_format(mode, writer, tmp_path):
    changes = {"mode": mode, "embedding": "e.safetensors" if mode == "embedding" else "", "low": 1.0, "high": 6.4}
    mark = Mark(**{**vars(MARK), **changes})
    file = read(adapter(tmp_path / "a", mark))
    writer(file, tmp_path / ("b" if writer is write_peft else "b.safetensors"))
    again = read(tmp_path / ("b" if writer is write_peft else "b.safetensors"))
    assert read_mark(again.metadata) == mark
    assert read_mark({}) is None


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [({"distilled_guidance": "four"}, "damaged"), ({"w_ref": "4", "cfg_convention": "lcm"}, "convention 'lcm'")],
)
def test_damaged_marks_are_refused(entries, sentence):
    with pytest.raises(InputError, match=sentence):
        read_mark(entries)


def test_the_sinusoid_is_diffusers():
    pipe = tiny.sd()
    w = torch.tensor([1.0, 4.0, 7.5])
    torch.testing.assert_close(
        embedding.sinusoid(w), pipe.get_guidance_scale_embedding(w - 1, 256), rtol=1e-4, atol=1e-4
    )


# ------------------------------------------------------------------------------------------------ pipelines


@pytest.fixture
def pipe() -> MultiLoRAPipeline:
    return MultiLoRAPipeline(tiny.sd())


def latents(pipe: MultiLoRAPipeline, **changes) -> torch.Tensor:
    return pipe("a cat", steps=3, output_type="latent", **changes).images


def samples_seen(pipe: MultiLoRAPipeline, **changes) -> int:
    """Samples that pass the denoiser in a call."""
    seen: list[int] = []
    handle = pipe.pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(len(args[0])),
                                                      with_kwargs=True)  # fmt: skip
    try:
        latents(pipe, **changes)
    finally:
        handle.remove()
    return sum(seen)


def test_a_distilled_adapter_halves_the_passes_and_refuses_more(pipe, tmp_path):
    assert samples_seen(pipe, guidance_scale=4.0, images=2) == 2 * 3 * 2
    report = pipe.load_lora(adapter(tmp_path, MARK))
    assert report.distilled == MARK
    assert "guidance 4 built in" in str(report)
    assert samples_seen(pipe, images=2) == 3 * 2
    assert not pipe.plan(3).guided
    with pytest.raises(InputError, match="set guidance_scale to 1"):
        latents(pipe, guidance_scale=4.0)
    assert samples_seen(pipe, guidance_scale=4.0, allow_double_guidance=True) == 6
    assert torch.equal(latents(pipe), latents(pipe, guidance_scale=1.0))


def test_it_composes_by_merging_only_and_alone_of_its_kind(pipe, tmp_path):
    pipe.load_lora(adapter(tmp_path / "a", MARK), name="fast")
    pipe.load_lora(adapter(tmp_path / "b", None, seed=2), name="cat")
    merged = latents(pipe)
    pipe.compose("switch")
    with pytest.raises(InputError, match="use method 'merge'"):
        latents(pipe)
    pipe.compose("merge", adapters=["cat"])
    assert not torch.equal(latents(pipe, guidance_scale=1.0), merged)
    assert pipe.plan(3).guided
    pipe.load_lora(adapter(tmp_path / "c", MARK, seed=3), name="faster")
    pipe.compose("merge")
    with pytest.raises(InputError, match="guide twice"):
        latents(pipe)


def test_one_file_of_several_stays_distilled(pipe, tmp_path):
    pipe.load_lora(adapter(tmp_path / "a", MARK), name="fast", weight=0.5)
    pipe.load_lora(adapter(tmp_path / "b", None, seed=2), name="cat")
    wanted = latents(pipe)
    pipe.export(tmp_path / "one.safetensors")
    mark = read_mark(read(tmp_path / "one.safetensors").metadata)
    assert mark is not None
    assert (mark.mode, mark.guidance) == ("fixed", 2.5)
    alone = MultiLoRAPipeline(tiny.sd())
    alone.load_lora(tmp_path / "one.safetensors")
    torch.testing.assert_close(latents(alone), wanted, rtol=1e-4, atol=1e-4)


def test_strength_outside_the_trained_range_warns(pipe, tmp_path):
    mark = Mark(mode="strength", guidance=4.0, low=1.0, high=6.4)
    pipe.load_lora(adapter(tmp_path, mark), name="fast", weight=2.5)
    with pytest.warns(UserWarning, match=r"Guidance 8.5 is outside the range that 'fast' was trained for \(1 to 6.4\)"):
        latents(pipe)


def test_another_kind_of_base_warns(pipe, tmp_path):
    with pytest.warns(UserWarning, match="predicts v_prediction; this one predicts epsilon"):
        pipe.load_lora(adapter(tmp_path, Mark(mode="fixed", guidance=4.0, low=4.0, high=4.0,
                                              prediction_type="v_prediction")))  # fmt: skip


def test_guidance_as_an_input_is_a_slider_and_leaves_no_trace(tmp_path):
    base = tiny.sd()
    name = f"adapter-{embedding.NAME}-0.safetensors"
    mark = Mark(mode="embedding", guidance=4.0, low=1.0, high=6.4, embedding=name)
    path = adapter(tmp_path, mark)
    pipe = MultiLoRAPipeline(base)
    with pytest.raises(InputError, match="needs its guidance embedding"):
        pipe.load_lora(path)
    embedding.write(tmp_path / name, 0.02 * torch.randn(16, embedding.WIDTH), {})
    pipe.load_lora(path)
    assert samples_seen(pipe) == samples_seen(pipe, guidance_scale=2.0) == 3
    assert torch.equal(latents(pipe), latents(pipe, guidance_scale=4.0))
    assert not torch.equal(latents(pipe), latents(pipe, guidance_scale=2.0))
    with pytest.warns(UserWarning, match="outside"):
        latents(pipe, guidance_scale=9.0)
    assert base.unet.config.time_cond_proj_dim is None
    assert base.unet.time_embedding.cond_proj is None
    embedding.write(tmp_path / name, torch.randn(24, embedding.WIDTH), {})
    pipe.unload_lora("adapter")
    pipe.load_lora(path)
    with pytest.raises(FamilyError, match="another base model"):
        latents(pipe)


def test_what_pipelines_allow_is_decided_without_a_model():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use.check_use({}, "composite", None, False) == (5.0, None)
        assert use.check_use({"f": (MARK, 1.0)}, "merge", None, False) == (1.0, MARK)
        assert use.check_use({"f": (MARK, 1.0)}, "merge", 3.0, True) == (3.0, MARK)
