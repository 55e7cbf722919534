"""What a training will need, beside what it needs."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from adapters.compression import backends
from adapters.compression.storage import stored_bytes
from adapters.errors import InputError
from studio import processes
from studio.cli.app import run as command
from studio.jobs import kinds
from studio.training import estimate as estimates
from studio.training.base import load_base
from studio.training.estimate import Work, estimate
from studio.training.families import family_of
from studio.training.inject import inject, lora_config
from studio.training.schemas.distill import DistillConfig
from studio.training.schemas.image import TrainImageConfig
from studio.training.tasks import distillation as tasks
from studio.training.tasks.image import run
from studio.training.teacher import Teacher
from studio.training.trainee import Trainee
from ui.pages import distill, train

WORK = Work(
    {"unet": 1000, "text_encoder": 500, "vae": 100}, learnt=10, kept=7, flops=5e9, operations=0, denoiser="unet"
)


def config(**values):
    return TrainImageConfig(
        name="x", data="x", trigger="zxq", device="cpu", **{"steps": 10, "sample_prompts": []} | values
    )


def test_memory_and_time_add_up():
    found = estimate(WORK, config(ema=False), "fp32", "cpu", speed=1e10)
    assert found.memory == {"base": 6400, "adapter": 80, "optimiser": 80, "activations": 7}
    assert found.total == 6567
    assert found.seconds == pytest.approx(10 * 5e9 / (1e10 * estimates.EFFICIENCY))
    twice = estimate(WORK, config(gradient_accumulation=2, ema=True, optimizer="sgd"), "bf16", "cuda", speed=1e10)
    assert twice.seconds == pytest.approx(2 * found.seconds)
    assert (twice.memory["adapter"], twice.memory["optimiser"]) == (120, 40)
    resting = estimate(WORK, config(memory="balanced"), "bf16", "cuda", speed=1e10)
    assert resting.memory["base"] == 2000  # text encoder and VAE wait elsewhere


@pytest.mark.parametrize("name", backends.PACKAGES)
def test_weights_in_few_bits_count_as_what_they_take(name):
    """Against the bytes of the stored model."""
    if not backends.probe(name).works:
        pytest.skip(backends.probe(name).reason)
    work = estimates.look(config(quantization=name), "fp32")
    plain = estimate(estimates.look(config(), "fp32"), config(), "fp32", "cpu", 1e10).memory["base"]
    found = estimate(work, config(quantization=name), "fp32", "cpu", 1e10).memory["base"]
    family = family_of(load_base(config(), torch.float32, torch.device("cpu")))
    before = stored_bytes(family.denoiser)
    backends.quantize(family.denoiser, name, torch.float32)
    assert plain - found == pytest.approx(before - stored_bytes(family.denoiser), rel=0.05)


def test_a_denoiser_from_a_file_counts_as_large_as_the_file(tmp_path):
    (tmp_path / "x.gguf").write_bytes(bytes(1000))
    model = torch.nn.Linear(10, 10)
    assert estimates.stored(model, "none", str(tmp_path / "x.gguf")) == (110, 1000)
    assert estimates.stored(model, "none", str(tmp_path / "x.safetensors")) == (0, 0)


@pytest.mark.parametrize("more", [{}, {"targets": "attention-mlp", "rank": 16, "batch_size": 2}])
def test_a_real_step_keeps_what_was_estimated(more):
    chosen = config(**more)
    work = estimates.look(chosen, "fp32")
    family = family_of(load_base(chosen, torch.float32, torch.device("cpu")))
    parts = {name: part for name, part in family.pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert work.parameters == {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    inject(family.denoiser, lora_config(family.denoiser, chosen, False, family.about.targets))
    size = estimates._inputs(family, chosen, False, torch.float32)[0].shape
    inputs = (torch.randn(size), torch.full((size[0],), 500), family.condition(["zxq"] * size[0]))
    kept, operations, _ = estimates.count(Trainee(family, {}).train(), inputs)
    assert work.kept == pytest.approx(kept, rel=0.02)
    assert work.operations == pytest.approx(operations, rel=0.1)
    with sdpa_kernel(SDPBackend.MATH):  # whose operations torch counts on a CPU
        flops = estimates.count(Trainee(family, {}).train(), inputs)[2]
    assert work.flops == pytest.approx(flops, rel=0.05)


@pytest.mark.journey
def test_a_run_takes_about_the_time_that_was_estimated(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (64, 64), "red").save(data / "a.png")
    chosen = config().model_copy(update={"data": str(data)})
    found = estimates.estimated(chosen)
    result = run(chosen, tmp_path / "run")
    assert estimates.look(chosen, "fp32").learnt == result["parameters"]
    assert found.seconds / 4 < result["seconds"] < found.seconds * 4


def test_checkpointing_keeps_less_and_computes_more():
    plain, again = (estimates.look(config(gradient_checkpointing=on), "fp32") for on in (False, True))
    assert again.kept < plain.kept / 2
    assert 1.2 < again.flops / plain.flops < 1.5


def test_command_and_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "data" / "a.png")
    asked = ["train", "image", "--data", str(tmp_path / "data"), "--name", "x", "--trigger", "zxq", "--device", "cpu"]
    assert command([*asked, "--estimate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory_total"] == sum(found["memory"].values()) > 50e6
    values = [train.KNOWN[name].default for name in train.NAMES]
    shown = dict(zip(train.NAMES, values, strict=True)) | {"name": "x", "trigger": "zxq", "data": "", "device": "cpu"}
    line = train.needed([], *(train.schema_form.show(train.KNOWN[name], shown[name]) for name in train.NAMES))
    assert line.startswith("About ")
    assert "for the training steps" in line
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"")
    with pytest.raises(InputError):
        estimates.estimated(config(base=str(single)))


# ------------------------------------------------------------------------------------------------ distillation

DISTILLED: list[dict[str, Any]] = [
    {"guidance_mode": "strength", "trajectory_count": 3},
    {"objective": "consistency", "states": "data", "guidance_mode": "embedding", "styles": ["fox:0.5"]},
]


def distillation(place, **values):
    """A short distillation on the embedded base, from two prompts or captioned pictures in ``place``."""
    prompts, pictures = place / "prompts.txt", place / "pictures"
    prompts.write_text("a flat icon of a dog\na flat icon of a cat\n")
    pictures.mkdir(exist_ok=True)
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(name)
    given = {"data": str(pictures)} if values.get("states") == "data" else {"prompts": str(prompts)}
    few = {"steps": 1, "batch_size": 2, "rank": 4, "knots": 2, "sample_every": 0, "save_every": 0, "device": "cpu"}
    return DistillConfig.parse({**given, **few, **values})


@pytest.mark.parametrize("values", DISTILLED)
def test_a_real_step_of_distillation_costs_what_was_estimated(values, tmp_path, monkeypatch):
    """Against the bytes kept and the operations of the task's own loss, and the teacher's own passes."""
    chosen = distillation(tmp_path, **values)
    work = estimates.look_at_distillation(chosen, "fp32")
    seen: dict[str, Any] = {"teacher": []}
    own_loss, own_teacher = tasks.DistillationTask.loss, Teacher.__call__

    def loss(task, batch):
        learnt = [p for p in task.family.denoiser.parameters() if p.requires_grad]
        own = {p.untyped_storage()._cdata for p in task.family.denoiser.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        with sdpa_kernel(SDPBackend.MATH), estimates._counting() as cost:  # whose operations torch counts on a CPU
            found = own_loss(task, batch)
            torch.autograd.grad(found[0], learnt, allow_unused=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = own_loss(task, batch)
        seen.update(kept=sum(map(torch.UntypedStorage.nbytes, kept.values())), cost=cost, learnt=learnt)
        return found

    def teacher(self, *given):
        with sdpa_kernel(SDPBackend.MATH), estimates._counting() as cost:
            found = own_teacher(self, *given)
        seen["teacher"].append(cost)
        return found

    monkeypatch.setattr(tasks.DistillationTask, "loss", loss)
    monkeypatch.setattr(Teacher, "__call__", teacher)
    tasks.run(chosen, tmp_path / "run")
    assert work.learnt == sum(parameter.numel() for parameter in seen["learnt"])
    assert work.kept == pytest.approx(seen["kept"], rel=0.02)
    assert work.operations == pytest.approx(seen["cost"].operations, rel=0.1)
    assert work.flops == pytest.approx(seen["cost"].flops, rel=0.05)
    if chosen.states == "data":
        assert work.first == (0, 0.0, 0)
        return
    passes, flops, _ = work.first
    assert passes == len(seen["teacher"])  # before the step, in which none is needed
    assert flops == pytest.approx(seen["teacher"][0].flops, rel=0.05)
    again = estimates.look_at_distillation(
        chosen.model_copy(update={"trajectories": str(tmp_path / "run" / "trajectories")}), "fp32"
    )
    assert again.first[0] == 0, "recorded paths are used again"


@pytest.mark.journey
def test_a_distillation_takes_about_the_time_that_was_estimated(tmp_path):
    chosen = distillation(tmp_path, steps=10, trajectory_count=16)
    found = estimates.estimated(chosen)
    begun = time.perf_counter()
    tasks.run(chosen, tmp_path / "run")
    assert 0 < found.recording < found.seconds
    assert found.seconds / 4 < time.perf_counter() - begun < found.seconds * 4


def test_command_and_page_of_distilling(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path / "home"))
    chosen = distillation(tmp_path)
    assert command(["train", "distill", "--prompts", chosen.prompts, "--device", "cpu", "--estimate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory_total"] == sum(found["memory"].values()) > 50e6
    assert 0 < found["seconds_recording"] < found["seconds"]
    shown = {name: distill.schema_form.show(item, item.default) for name, item in distill.KNOWN.items()}
    shown |= {"prompts": "a flat icon of a dog", "styles": [], "device": "cpu"}
    monkeypatch.setattr(processes, "apart", lambda function, *values: function(*values))  # a test above calls it
    line = distill.needed(*(shown[name] for name in distill.NAMES))
    assert line.startswith("About ")
    assert "to record trajectories)" in line
    assert command(["train", "scene", "--estimate"]) == 2
    with pytest.raises(InputError, match="not estimated"):
        kinds.find("compose").counts()
