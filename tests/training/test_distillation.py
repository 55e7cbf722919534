"""The distillation job on tiny bases of every family: what it learns, leaves alone, writes and refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters.errors import Cancelled, InputError
from adapters.formats import read
from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.distillation import embedding, trajectories
from pipelines.diffusion.distillation.consistency import DiffusionPath
from pipelines.diffusion.distillation.mark import read_mark
from studio import privacy
from studio.training import distill
from studio.training.families import family_of
from studio.training.objective import Diffusion
from studio.training.schemas.distill import DistillConfig
from studio.training.tasks.distillation import run
from studio.training.teacher import Teacher
from tests import tiny
from tests.training.conftest import Watcher


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a cat\n\na red dog\n")
    return file


@pytest.fixture(scope="session")
def undistilled(tmp_path_factory, bases):
    """The tiny bases; Flux without guidance as an input."""
    folder = tmp_path_factory.mktemp("flux")

    def get(family: str) -> Path:
        if family != "flux":
            return bases(family)
        if not (folder / "model_index.json").is_file():
            tiny.flux(guidance_embeds=False).save_pretrained(folder)
        return folder

    return get


TEACHER = {
    "guidance", "guidance_mode", "guidance_min", "guidance_max", "guidance_rescale", "guidance_from", "guidance_to",
    "null_prompt", "resolution", "knots", "seed", "styles", "trajectory_count", "objective", "dtype",
}  # fmt: skip
"""What recorded trajectories depend on, beside base and prompts."""


def config(base: Path, prompts: Path | str, **changes: Any) -> DistillConfig:
    """A short distillation; runs with the same teacher share its recorded trajectories, unless told otherwise."""
    values: dict[str, Any] = {
        "base": str(base), "prompts": str(prompts), "knots": 5, "trajectory_count": 3, "rank": 2, "steps": 4,
        "batch_size": 2, "resolution": 32, "device": "cpu", "learning_rate": 1e-2, "sample_steps": 2, "guidance": 4.0,
        "checkpoint_every": 0, "sample_every": 0, "save_every": 0,
    }  # fmt: skip
    if isinstance(prompts, Path) and prompts.is_file():
        teacher = repr((str(base), sorted((name, changes[name]) for name in TEACHER & changes.keys())))
        values["trajectories"] = str(prompts.parent / hashlib.sha256(teacher.encode()).hexdigest()[:12])
    return DistillConfig.parse(values | changes)


def same(first: str | Path, second: str | Path) -> bool:
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------------ what it makes


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("objective", ["guidance", "consistency"])
def test_every_family_gives_a_file_that_draws_the_sample(family, objective, undistilled, prompts, tmp_path):
    base = undistilled(family)
    wanted = config(base, prompts, objective=objective, steps=2, sample_prompts=["a cat"], inference_steps=2)
    result = run(wanted, tmp_path)
    drawn = np.asarray(diffusers.utils.load_image(result["samples"][0])).astype(int)
    pipe = diffusers.DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    if objective == "consistency":
        kind = diffusers.FlowMatchLCMScheduler if family in ("sd3", "flux") else diffusers.LCMScheduler
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(result["adapter"])
    torch.manual_seed(0)  # the flow sampler draws noise from the global generator
    picture = pipe("a cat", num_inference_steps=2, guidance_scale=1.0, width=32, height=32,
                   generator=torch.Generator().manual_seed(0)).images[0]  # fmt: skip
    if objective == "guidance" or family in ("sd", "sdxl"):
        assert np.abs(np.asarray(picture).astype(int) - drawn).max() <= 1
    assert len(result["teacher_samples"]) == (0 if family == "flux" else 1)
    mark = read_mark(read(result["adapter"]).metadata)
    assert mark is not None
    assert (mark.mode, mark.guidance, mark.objective) == ("fixed", 4.0, objective)
    assert mark.to_metadata() == result["distilled"]
    assert "set the pipeline's guidance to 1" in Path(result["card"]).read_text()


def test_every_format_draws_the_same_and_says_the_same(bases, prompts, tmp_path):
    result = run(config(bases("sd"), prompts, export=["diffusers", "peft", "kohya"], steps=3), tmp_path)
    drawn, marks = [], []
    for path in result["exports"].values():
        pipe = MultiLoRAPipeline.from_pretrained(bases("sd"))
        marks.append(pipe.load_lora(path).distilled)
        drawn.append(pipe("a cat", steps=2, output_type="latent").images)
    assert marks[0] is not None
    assert marks == [marks[0]] * 3
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0], rtol=1e-5, atol=1e-5)
    beside = json.loads((tmp_path / "guided.json").read_text())
    assert beside.items() >= marks[0].to_metadata().items()
    unet = diffusers.UNet2DConditionModel.from_pretrained(bases("sd"), subfolder="unet")
    with torch.no_grad():  # merged into the weights: the same
        for name, layer in pipe.rack.loaded[next(iter(pipe.adapters))].file.parts["unet"].items():
            unet.get_parameter(f"{name}.weight").add_(layer.delta())
    merged = MultiLoRAPipeline.from_pretrained(bases("sd"), unet=unet)
    latents = merged("a cat", steps=2, guidance_scale=1.0, output_type="latent").images
    torch.testing.assert_close(latents, drawn[0], rtol=1e-4, atol=1e-5)


def test_only_the_lora_learns(bases, prompts, tmp_path, monkeypatch):
    from studio.training.drivers.accelerate import Loop

    seen: dict[str, Any] = {}
    steps = Loop.run

    def watched(loop: Loop) -> dict[str, Any]:
        unet = loop.session.models["unet"]
        frozen = {name: p for name, p in unet.named_parameters() if "lora_" not in name}
        before = {name: (p.data_ptr(), p.clone()) for name, p in frozen.items()}
        result = steps(loop)
        seen["same"] = all(torch.equal(p, before[n][1]) for n, p in frozen.items())
        seen["shared"] = all(p.data_ptr() == before[n][0] for n, p in frozen.items())
        seen["states"] = {id(p) for p in loop.session.optimizer.state}
        seen["lora"] = {id(p) for name, p in unet.named_parameters() if "lora_" in name}
        seen["grad"] = [name for name, p in unet.named_parameters() if p.requires_grad and "lora_" not in name]
        return result

    monkeypatch.setattr(Loop, "run", watched)
    run(config(bases("sd"), prompts, guidance_mode="strength"), tmp_path)
    assert seen["same"]
    assert seen["shared"]
    assert seen["states"] == seen["lora"]
    assert not seen["grad"]


def test_teacher_and_student_pass_as_many_samples_as_they_should(bases, prompts, pictures, tmp_path):
    """Per step of batch B on data: 2 B of the teacher and B of the student; consistency asks the student twice."""
    counts: list[int] = []
    original = diffusers.UNet2DConditionModel.forward

    def counting(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counts.append(len(sample))
        return original(self, sample, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers.UNet2DConditionModel, "forward", counting)
        for objective, passes in (("guidance", 3), ("consistency", 4)):
            counts.clear()
            run(config(bases("sd"), "", data=str(pictures), states="data", objective=objective, steps=3),
                tmp_path / objective)  # fmt: skip
            assert sum(counts) == 3 * 2 * passes
        counts.clear()
        run(config(bases("sd"), prompts, trajectories=""), tmp_path / "recorded")
        assert sum(counts) == 2 * 16 * 5 + 4 * 2  # one part of 16 trajectories, guided at 5 knots; 4 steps of 2 states


# ------------------------------------------------------------------------------------------------ what it learns


def test_the_student_comes_near_the_guided_teacher(bases, prompts, tmp_path):
    result = run(config(bases("sd"), prompts, rank=8, steps=60, batch_size=8, learning_rate=3e-3), tmp_path)
    pipe = MultiLoRAPipeline.from_pretrained(bases("sd"))
    guided, plain = (pipe("a cat", steps=5, guidance_scale=w, output_type="latent").images for w in (4.0, 1.0))
    pipe.load_lora(result["adapter"])
    student = pipe("a cat", steps=5, output_type="latent").images
    assert (student - guided).square().mean() < 0.5 * (plain - guided).square().mean()
    assert result["loss"] < 0.3 * result["first_loss"]


def test_strength_at_zero_is_the_base_and_between_is_linear_in_the_adapter(bases, prompts, tmp_path):
    result = run(config(bases("sd"), prompts, guidance_mode="strength"), tmp_path)
    layers = read(result["adapter"]).parts["unet"]
    assert read_mark(read(result["adapter"]).metadata).guidance_at(1.0) == 4.0
    pipe = MultiLoRAPipeline.from_pretrained(bases("sd"))
    plain = pipe("a cat", steps=2, guidance_scale=1.0, output_type="latent").images
    pipe.load_lora(result["adapter"], weight=0.0)
    assert torch.equal(pipe("a cat", steps=2, guidance_scale=1.0, output_type="latent").images, plain)
    assert all(layer.scale == pytest.approx(1.0) for layer in layers.values())  # what training scaled is not left over


def test_guidance_as_an_input(bases, prompts, tmp_path):
    wanted = config(bases("sd"), prompts, guidance_mode="embedding", sample_prompts=["a cat"], steps=6)
    result = run(wanted, tmp_path)
    extra = Path(result["exports"]["w-embedding"])
    weight = embedding.read(extra)
    assert weight.abs().sum() > 0
    assert not any("cond_proj" in key for key in load_file(result["adapter"]))
    pipe = MultiLoRAPipeline.from_pretrained(bases("sd"))
    pipe.load_lora(result["adapter"])
    drawn = np.asarray(diffusers.utils.load_image(result["samples"][0])).astype(int)
    again = np.asarray(pipe("a cat", steps=2, guidance_scale=4.0, width=32, height=32).images[0]).astype(int)
    assert np.abs(again - drawn).max() <= 1


def test_a_style_is_in_teacher_and_student(bases, prompts, tmp_path):
    """Distilled on top of a style = distilled on a base with the style merged into it."""
    pipe = tiny.sd()
    style = tiny.lora_file(pipe, tmp_path, strength=1.0)
    plainly: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.1}  # Adam makes large steps of rounding errors
    on_top = run(config(bases("sd"), prompts, styles=[f"{style}:0.7"], **plainly), tmp_path / "on-top")
    for component, layers in read(style).parts.items():
        for name, layer in layers.items():
            with torch.no_grad():
                getattr(pipe, component).get_parameter(f"{name}.weight").add_(0.7 * layer.delta())
    pipe.save_pretrained(tmp_path / "merged")
    merged = run(config(tmp_path / "merged", prompts, **plainly), tmp_path / "m")
    plain = run(config(bases("sd"), prompts, **plainly), tmp_path / "p")
    a, b, c = (load_file(result["adapter"]) for result in (on_top, merged, plain))
    assert set(a) == set(b)
    near = max(float((a[key] - b[key]).abs().max()) for key in a)
    far = max(float((c[key] - b[key]).abs().max()) for key in a)
    assert near < 0.1 * far


# ------------------------------------------------------------------------------------------------ the teacher


def test_the_null_prompt_is_the_pipelines(bases):
    for family in ("sd", "sdxl"):
        pipe = diffusers.DiffusionPipeline.from_pretrained(bases(family))
        wanted = pipe.encode_prompt(prompt="a cat", device="cpu", num_images_per_prompt=1,
                                    do_classifier_free_guidance=True)  # fmt: skip
        null = family_of(pipe).null_condition()
        torch.testing.assert_close(null["embeds"], wanted[1])
        if family == "sdxl":
            assert not null["embeds"].any()
            torch.testing.assert_close(null["pooled"], wanted[3])
            assert family_of(pipe).null_condition("ugly")["embeds"].any()


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_recorded_paths_are_the_pipelines_pictures(family, bases, prompts, tmp_path):
    """The recorded trajectory ends where diffusers' own pipeline with guidance ends."""
    steps = 5
    run(config(bases(family), prompts, steps=1, knots=steps, seed=3, trajectories=""), tmp_path)
    recorded = trajectories.read_recording(tmp_path / "trajectories", 3)
    pipe = diffusers.DiffusionPipeline.from_pretrained(bases(family))
    pipe.set_progress_bar_config(disable=True)
    states: list[torch.Tensor] = []

    def note(_pipe: Any, _index: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        states.append(tensors["latents"])
        return {}

    options: dict[str, Any] = {"num_inference_steps": steps}
    if family != "sd3":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    else:
        options = {"sigmas": [k / steps for k in range(steps, 0, -1)], "max_sequence_length": 16}
    pipe(recorded.prompts[1], guidance_scale=4.0, latents=recorded.states[1, :1].float(), output_type="latent",
         width=32, height=32, callback_on_step_end=note, **options)  # fmt: skip
    for knot in range(1, steps):
        torch.testing.assert_close(states[knot - 1][0], recorded.states[1, knot].float(), rtol=2e-2, atol=2e-2)


def test_rescale_and_interval_reach_the_target(bases):
    family = family_of(diffusers.DiffusionPipeline.from_pretrained(bases("sd")))
    given, null = family.condition(["a cat", "a dog"]), family.null_condition()
    noisy, times, w = torch.randn(2, 4, 16, 16), torch.tensor([100, 900]), torch.full((2,), 6.0)
    values: dict[str, Any] = {"prompts": "x", "guidance": 6.0}
    full = Teacher(family, DistillConfig(**values), null)(noisy, times, given, w)
    part = Teacher(family, DistillConfig(**values, guidance_from=0.5), null)(noisy, times, given, w)
    tamed = Teacher(family, DistillConfig(**values, guidance_rescale=0.7), null)(noisy, times, given, w)
    alone = family.predict(family.denoiser, noisy, times, given)
    torch.testing.assert_close(part[0], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part[1], full[1])
    assert tamed.std() < full.std()


# ------------------------------------------------------------------------------------------------ stopping, resuming


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": "consistency", "distance": "huber", "ema": True, "gradient_accumulation": 2},
        {"guidance_mode": "strength", "gradient_checkpointing": True},
        {"guidance_mode": "embedding"},
    ],
    ids=["fixed", "consistency", "strength", "embedding"],
)
def test_resumed_is_uninterrupted_to_the_bit(changes, bases, prompts, tmp_path):
    wanted = config(bases("sd"), prompts, steps=6, **changes)
    whole = run(wanted, tmp_path / "whole")
    with pytest.raises(Cancelled, match="step 3 of 6"):
        run(wanted, tmp_path / "cut", Watcher(stop_at=3))
    resumed = run(wanted, tmp_path / "cut", resume=True)
    assert same(whole["adapter"], resumed["adapter"])
    if "w-embedding" in whole["exports"]:
        assert same(whole["exports"]["w-embedding"], resumed["exports"]["w-embedding"])
    with pytest.raises(InputError, match="other settings"):
        run(config(bases("sd"), prompts, steps=6, **changes, rank=3), tmp_path / "cut", resume=True)


def test_checkpointing_and_samples_change_nothing(bases, prompts, tmp_path):
    plain = run(config(bases("sd"), prompts, guidance_mode="strength"), tmp_path / "a")
    other = run(config(bases("sd"), prompts, guidance_mode="strength", gradient_checkpointing=True,
                       sample_prompts=["a cat"], sample_every=1), tmp_path / "b")  # fmt: skip
    assert len(other["samples"]) == 4
    for key, value in load_file(plain["adapter"]).items():
        torch.testing.assert_close(load_file(other["adapter"])[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", ["guidance", "consistency"])
def test_bf16_keeps_the_adapter_in_fp32(objective, bases, pictures, tmp_path):
    wanted = config(bases("sdxl"), "", states="data", data=str(pictures), dtype="bf16", objective=objective, steps=2)
    result = run(wanted, tmp_path)
    assert np.isfinite(result["loss"])
    assert all(value.dtype == torch.float32 for value in load_file(result["adapter"]).values())


def test_trajectories_are_shared_between_runs_and_stopped_recordings_go_on(bases, prompts, tmp_path):
    shared = str(tmp_path / "shared")
    many = {"trajectory_count": 20, "trajectories": shared, "steps": 2}

    class Impatient(Watcher):
        def cancelled(self) -> bool:
            return any(p.stage == "recording trajectories" for p in self.seen)

    with pytest.raises(Cancelled):
        run(config(bases("sd"), prompts, **many), tmp_path / "a", Impatient())
    first = trajectories.part_file(tmp_path / "shared", 0)
    kept = first.stat().st_mtime_ns
    result = run(config(bases("sd"), prompts, **many), tmp_path / "a")
    assert first.stat().st_mtime_ns == kept
    again = Watcher()
    other = run(config(bases("sd"), prompts, **many), tmp_path / "b", again)
    assert "recording trajectories" not in {p.stage for p in again.seen}
    assert same(result["adapter"], other["adapter"])
    for changes, named in (
        ({"guidance": 5.0}, "guidance"),
        ({"resolution": 64}, "shape"),
        ({"null_prompt": "x"}, "null"),
    ):
        with pytest.raises(InputError, match=rf"do not fit this run .*{named}"):
            run(config(bases("sd"), prompts, **many | changes), tmp_path / "c")
    with pytest.raises(InputError, match=r"do not fit this run .*base"):
        run(config(tiny.saved("sd", tmp_path, seed=5), prompts, **many), tmp_path / "d")


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"guidance": 1.0}, "nothing to distil"),
        ({"guidance": float("nan")}, "nothing to distil"),
        ({"objective": "consistency", "guidance_mode": "strength"}, "not linear in the guidance"),
        ({"guidance_mode": "strength", "guidance_rescale": 0.5}, "not linear in the guidance"),
        ({"guidance_mode": "strength", "guidance_min": 5.0, "guidance_max": 5.0}, "below guidance_max"),
        ({"guidance_from": 0.8, "guidance_to": 0.2}, "below guidance_to"),
        ({"prompts": ""}, "trajectories need prompts"),
        ({"states": "data"}, "captioned pictures"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"learning_rate": -1}, "above 0"),
        ({"gudance": 3}, r"did you mean 'guidance'\?"),
    ],
)
def test_configurations_that_cannot_be(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        config(Path("x"), **{"prompts": "p.txt", **changes})


def test_bases_that_are_distilled_already(bases, prompts, tmp_path):
    with pytest.raises(InputError, match="guidance_embeds"):
        run(config(bases("flux"), prompts), tmp_path / "a")
    assert run(config(bases("flux"), prompts, force=True, steps=1), tmp_path / "b")["steps"] == 1
    tiny.sd(time_cond_proj_dim=256).save_pretrained(tmp_path / "lcm")
    with pytest.raises(InputError, match="time_cond_proj_dim"):
        run(config(tmp_path / "lcm", prompts), tmp_path / "c")


def test_data_that_cannot_be(bases, pictures, prompts, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(InputError, match="There are no pictures"):
        run(config(bases("sd"), "", states="data", data=str(data)), tmp_path / "run")
    (data / "x.png").write_bytes(next(pictures.glob("*.png")).read_bytes())
    with pytest.raises(InputError, match="no caption"):
        run(config(bases("sd"), "", states="data", data=str(data)), tmp_path / "run")
    (tmp_path / "empty.txt").write_text("\n \n")
    for file, sentence in ((tmp_path / "empty.txt", "no prompts"), (tmp_path / "nothing.txt", "cannot be read")):
        with pytest.raises(InputError, match=sentence):
            run(config(bases("sd"), file), tmp_path / "run")
    assert run(config(bases("sd"), "", data=str(pictures), steps=1), tmp_path / "captions")["steps"] == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rank": 64}, "use at most"),
        ({"target_regex": "nothing"}, "No layer of"),
        ({"styles": ["nobody"]}, "nobody"),
    ],
)
def test_values_that_do_not_fit_the_base(changes, sentence, bases, prompts, tmp_path):
    with pytest.raises(InputError, match=sentence):
        run(config(bases("sd"), prompts, **changes), tmp_path)


def test_embedding_needs_a_unet(bases, prompts, tmp_path):
    with pytest.raises(InputError, match="UNet models"):
        run(config(bases("sd3"), prompts, guidance_mode="embedding"), tmp_path)


def test_unknown_predictions_and_targets_that_are_not_finite(bases):
    with pytest.raises(InputError, match="cannot be trained"):
        Diffusion(diffusers.DDIMScheduler(prediction_type="flow_prediction").config)
    with pytest.raises(InputError, match="supported are"):
        DiffusionPath(torch.linspace(0.99, 0.01, 10), "velocity", 5)
    family = family_of(diffusers.DiffusionPipeline.from_pretrained(bases("sd")))
    teacher = Teacher(family, DistillConfig(prompts="x"), family.null_condition())
    noisy = torch.randn(2, 4, 16, 16)
    noisy[1, 0, 0, 0] = float("inf")
    with pytest.raises(InputError, match="not finite at noise level 700 with guidance 4"):
        teacher(noisy, torch.tensor([5, 700]), family.condition(["a", "b"]), torch.full((2,), 4.0))


def test_adapters_in_the_base_are_refused(bases, prompts, tmp_path, monkeypatch):
    from studio.training.tasks import image

    original = image.load_base

    def with_adapter(*arguments: Any) -> Any:
        pipe = original(*arguments)
        pipe.load_lora_weights(tiny.lora_file(pipe, tmp_path))
        pipe.fuse_lora()
        return pipe

    monkeypatch.setattr(image, "load_base", with_adapter)
    with pytest.raises(InputError, match="fused into this pipeline"):
        run(config(bases("sd"), prompts), tmp_path / "run")


def test_damaged_trajectories_are_named(bases, prompts, tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, trajectories.part_file(folder, 0))
    with pytest.raises(InputError, match="contains no recorded trajectories"):
        run(config(bases("sd"), prompts, trajectories=str(folder)), tmp_path / "run")


# ------------------------------------------------------------------------------------------------ around it


def test_one_call(bases, prompts, tmp_path):
    wanted = config(bases("sd"), prompts, steps=1)
    values = wanted.model_dump(exclude_unset=True)
    result = distill(folder=tmp_path, **values)
    with safe_open(result["adapter"], "pt") as file:
        recipe = json.loads(file.metadata()["adapter_studio_recipe"])
    assert recipe["job"] == "distill"
    assert recipe["config"] == privacy.names_only(wanted.model_dump(mode="json"))
    assert DistillConfig.from_yaml(tmp_path / "config.yaml") == wanted
    with pytest.raises(InputError, match="not both"):
        distill(wanted, folder=tmp_path, steps=2)
