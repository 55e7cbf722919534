"""Whole runs of the image trainer: what comes out, and that it can stop and go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from adapters.errors import Cancelled, InputError
from pipelines.diffusion import families
from pipelines.diffusion.drawing import stills
from studio.training import train_image
from studio.training.check import check_data
from studio.training.records import read_curve
from studio.training.tasks.image import run
from tests import tiny
from tests.training import bed
from tests.training.conftest import Watcher, settings


def tensors(path: str | Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def same(first: str | Path, second: str | Path) -> bool:
    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def shapes_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bed")
    torch.set_num_threads(1)
    bed.pipeline(steps=100).save_pretrained(folder)
    return folder


def test_overfits_a_new_shape(shapes_base, pictures, tmp_path):
    config = settings(
        shapes_base,
        pictures,
        rank=8,
        steps=120,
        batch_size=4,
        learning_rate=2e-2,
        timestep_min=0.7,
        sample_every=60,
        sample_at_start=True,
    )
    result = run(config, tmp_path)
    assert result["loss"] <= 0.7 * result["first_loss"]
    assert [Path(file).name for file in result["samples"]] == [f"step-{n:06d}-0.png" for n in (0, 60, 120)]
    assert len(read_curve(tmp_path / "loss.csv")) == 120


@pytest.mark.parametrize("family", [name for name in tiny.TRAINABLE if name not in ("sd", "sdxl")])
def test_learns_one_picture(family, bases, tmp_path):
    one = bed.crosses(tmp_path / "one", count=1)
    config = settings(bases(family), one, steps=30, rank=4, batch_size=4, learning_rate=2e-2, targets="linear")
    run(config, tmp_path / "run")
    losses = [float(row["loss"]) for row in read_curve(tmp_path / "run/loss.csv")]
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])


@pytest.mark.parametrize("family", [*tiny.DRAWN_SMALL, "wan"])
def test_file_gives_the_trained_picture_in_diffusers(family, bases, pictures, tmp_path):
    text = family in ("sd", "sdxl")
    config = settings(
        bases(family), pictures, steps=2, sample_prompts=["a cross"], alpha=3.0, train_text_encoder=text, ema=True
    )
    watcher = Watcher()
    result = run(config, tmp_path, watcher)
    drawn = np.asarray(diffusers.utils.load_image(result["samples"][0]))
    pipe = diffusers.DiffusionPipeline.from_pretrained(bases(family))
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "num_inference_steps": 2,
        "width": 32,
        "height": 32,
        **families.family_of(pipe).guidance_arguments(2.0),
        **families.family_of(pipe).picture_arguments(),
    }

    def draw():
        dice = torch.Generator().manual_seed(0)
        return np.asarray(stills(pipe(prompt="a cross", generator=dice, **arguments))[0])

    plain = draw()
    pipe.load_lora_weights(result["adapter"])
    assert np.abs(draw().astype(int) - drawn).max() <= 1  # the file holds the scale in B
    assert not np.array_equal(plain, drawn)
    if text:
        assert any(key.startswith("text_encoder.") for key in tensors(result["adapter"]))


def test_kontext_learns_and_gives_the_trained_picture_in_diffusers(bases, tmp_path):
    """Kontext also draws from text alone; that is what its LoRAs learn here."""
    place = tmp_path / "kontext"
    shutil.copytree(bases("flux"), place)
    index = json.loads((place / "model_index.json").read_text())
    (place / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxKontextPipeline"}))
    one = bed.crosses(tmp_path / "one", count=1)
    config = settings(
        place, one, steps=30, rank=4, batch_size=4, learning_rate=2e-2, targets="linear", sample_prompts=["a cross"]
    )
    result = run(config, tmp_path / "run")
    losses = [float(row["loss"]) for row in read_curve(tmp_path / "run/loss.csv")]
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
    pipe = diffusers.FluxKontextPipeline.from_pretrained(place)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(result["adapter"])
    dice = torch.Generator().manual_seed(0)
    found = pipe(prompt="a cross", num_inference_steps=2, width=32, height=32, max_area=1024, guidance_scale=2.0,
                 generator=dice).images[0]  # fmt: skip
    drawn = np.asarray(diffusers.utils.load_image(result["samples"][0]))
    assert found.size == (32, 32)
    assert np.abs(np.asarray(found).astype(int) - drawn).max() <= 1


@pytest.mark.parametrize(
    "extra",
    [
        {"use_dora": True},
        {"init": "pissa"},
        {"init": "olora", "use_rslora": True},
        {"targets": "all", "conv_rank": 1, "exclude_regex": r"time_embedding.*"},
        {"use_rslora": True, "dropout": 0.3},
        {"init": "orthogonal", "rank_pattern": {"attn2.to_q": 4}},
    ],
    ids=lambda extra: "-".join(map(str, extra.values())),
)
def test_every_kind_of_adapter_is_an_ordinary_file(extra, bases, pictures, tmp_path):
    config = settings(bases("sd"), pictures, steps=2, sample_prompts=["a cross"], **extra)
    result = run(config, tmp_path)
    drawn = np.asarray(diffusers.utils.load_image(result["samples"][0])).astype(int)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(bases("sd"))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(result["adapter"])
    picture = pipe("a cross", num_inference_steps=2, guidance_scale=2.0, generator=torch.Generator().manual_seed(0))
    assert np.abs(np.asarray(picture.images[0]).astype(int) - drawn).max() <= 1


def test_other_formats_hold_the_same_update(bases, pictures, tmp_path):
    from adapters.formats import read
    from adapters.formats.fit import fit

    result = run(settings(bases("sd"), pictures, export=["diffusers", "peft", "kohya"], alpha=5.0), tmp_path)
    assert set(result["exports"]) == {"diffusers", "peft", "kohya"}
    models = {"unet": diffusers.UNet2DConditionModel.from_pretrained(bases("sd"), subfolder="unet")}
    files = [fit(read(path), models) for path in result["exports"].values()]
    for _, module, layer in files[0].layers():
        for other in files[1:]:
            torch.testing.assert_close(other.parts["unet"][module].delta(), layer.delta())


def test_metadata_tells_how_it_was_made(bases, pictures, tmp_path):
    result = run(settings(bases("sd"), pictures, trigger="zxq", alpha=3.0), tmp_path)
    with safe_open(result["adapter"], "pt") as file:
        metadata = file.metadata()
    recipe = json.loads(metadata["adapter_studio_recipe"])
    assert recipe["triggers"] == ["zxq"]
    assert recipe["config"]["alpha"] == 3.0
    assert recipe["training"]["steps"] == 4
    assert recipe["base"]["digest"]
    assert recipe["data"]["pictures"] == 8
    described = json.loads(metadata["lora_adapter_metadata"])
    assert described["unet.lora_alpha"] == described["unet.r"], "the scale is in B, for readers of tensors alone"
    assert "zxq" in Path(result["card"]).read_text()


HARD = {
    "ema": True,
    "dropout": 0.2,
    "gradient_accumulation": 2,
    "noise_offset": 0.1,
    "input_perturbation": 0.1,
    "flip": True,
    "caption_dropout": 0.3,
    "snr_gamma": 5.0,
    "steps": 6,
}


@pytest.mark.parametrize(
    "extra",
    [{}, {"train_text_encoder": True, "text_encoder_stop": 4}, {"optimizer": "prodigy", "learning_rate": 1.0}],
    ids=["plain", "text-encoder", "prodigy"],
)
def test_resumed_is_uninterrupted_to_the_bit(extra, bases, pictures, tmp_path):
    config = settings(bases("sd"), pictures, **(HARD | extra))
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Cancelled, match="step 3 of 6"):
        run(config, tmp_path / "cut", Watcher(stop_at=3))
    resumed = run(config, tmp_path / "cut", resume=True)
    assert same(whole["adapter"], resumed["adapter"])
    curves = [read_curve(tmp_path / name / "loss.csv") for name in ("whole", "cut")]
    assert [row["loss"] for row in curves[0]] == [row["loss"] for row in curves[1]]


def test_schedule_free_resumes_and_samples_without_a_trace(bases, pictures, tmp_path):
    config = settings(bases("sd"), pictures, optimizer="schedulefree-adamw", steps=6)
    plain = run(config, tmp_path / "plain")
    with pytest.raises(Cancelled):
        run(config, tmp_path / "cut", Watcher(stop_at=3))
    with_samples = config.model_copy(update={"sample_prompts": ["a cross"], "sample_every": 2})
    assert same(plain["adapter"], run(with_samples, tmp_path / "cut", resume=True)["adapter"])


def test_samples_leave_no_trace(bases, pictures, tmp_path):
    config = settings(bases("sd"), pictures, dropout=0.2, ema=True)
    quiet = run(config, tmp_path / "quiet")
    seen = run(
        config.model_copy(
            update={"sample_prompts": ["a cross", "a {trigger}"], "sample_every": 1, "sample_at_start": True}
        ),
        tmp_path / "seen",
    )
    assert same(quiet["adapter"], seen["adapter"])
    assert len(seen["samples"]) == 10


def test_accumulated_batches_are_one_batch(bases, pictures, tmp_path):
    big = run(settings(bases("sd"), pictures, batch_size=8, optimizer="sgd"), tmp_path / "big")
    small = run(
        settings(bases("sd"), pictures, batch_size=2, gradient_accumulation=4, optimizer="sgd"), tmp_path / "small"
    )
    first, second = tensors(big["adapter"]), tensors(small["adapter"])
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-6)


def test_caches_change_nothing(bases, pictures, tmp_path):
    def train(name, **extra):
        return run(settings(bases("sd"), pictures, cache_folder=str(tmp_path / "cache"), **extra), tmp_path / name)

    memory = train("memory", flip=True)
    live = train("live", flip=True, cache_latents="none", cache_text="none", workers=1)
    disk = train("disk", flip=True, cache_latents="disk", cache_text="disk")
    again = train("again", flip=True, cache_latents="disk", cache_text="disk")
    assert len(list((tmp_path / "cache" / "latents").glob("*.safetensors"))) == 16
    assert same(memory["adapter"], disk["adapter"])
    assert same(disk["adapter"], again["adapter"])
    for key, value in tensors(memory["adapter"]).items():
        torch.testing.assert_close(tensors(live["adapter"])[key], value, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(bases, pictures, tmp_path):
    plain = run(settings(bases("sd"), pictures, train_text_encoder=True), tmp_path / "plain")
    saving = run(
        settings(bases("sd"), pictures, train_text_encoder=True, gradient_checkpointing=True), tmp_path / "saving"
    )
    for key, value in tensors(plain["adapter"]).items():
        torch.testing.assert_close(tensors(saving["adapter"])[key], value, rtol=1e-4, atol=1e-6)


def test_bf16_keeps_the_adapter_in_fp32(bases, pictures, tmp_path):
    result = run(settings(bases("sd"), pictures, dtype="bf16", sample_prompts=["a cross"]), tmp_path)
    assert all(value.dtype == torch.float32 for value in tensors(result["adapter"]).values())


def test_prior_pictures_are_drawn_once(bases, pictures, tmp_path):
    config = settings(
        bases("sd"),
        pictures,
        mode="concept",
        trigger="zxq",
        prior_preservation=True,
        class_prompt="a circle",
        class_images=3,
        cache_folder=str(tmp_path / "cache"),
        steps=1,
    )
    watcher = Watcher()
    run(config, tmp_path / "first", watcher)
    files = sorted((tmp_path / "cache" / "class").rglob("*.png"))
    assert len(files) == 3
    before = [file.stat().st_mtime_ns for file in files]
    second = Watcher()
    run(config, tmp_path / "second", second)
    assert [file.stat().st_mtime_ns for file in files] == before
    assert "drawing class pictures" in {p.stage for p in watcher.seen}
    assert "drawing class pictures" not in {p.stage for p in second.seen}


def test_continues_from_an_adapter(bases, pictures, tmp_path):
    first = run(settings(bases("sd"), pictures, alpha=3.0, train_text_encoder=True), tmp_path / "first")
    config = settings(
        bases("sd"), pictures, continue_from=first["adapter"], learning_rate=1e-12, train_text_encoder=True
    )
    second = run(config, tmp_path / "second")  # alpha 2 now; a file's scale is in its B
    a, b = tensors(first["adapter"]), tensors(second["adapter"])
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="set rank to 2"):
        run(config.model_copy(update={"rank": 4}), tmp_path / "third")


@pytest.mark.parametrize("name", ["adapter", "fox v1.5"])
def test_intermediate_adapters_and_checkpoints_are_limited(bases, pictures, tmp_path, name):
    config = settings(bases("sd"), pictures, steps=6, save_every=1, keep_last=2, checkpoint_every=1, keep_checkpoints=2,
                      name=name, export=["diffusers", "kohya", "peft"])  # fmt: skip
    run(config, tmp_path)
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == [
        f"{name}-{step:06d}{ending}" for step in (4, 5) for ending in ("-kohya.safetensors", "-peft", ".safetensors")
    ]
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000005"]


def test_validation_and_tensorboard(bases, pictures, tmp_path):
    config = settings(bases("sd"), pictures, validation_split=0.25, validation_every=2, tracker="tensorboard", epochs=1)
    watcher = Watcher()
    result = run(config, tmp_path, watcher)
    assert result["steps"] == 3  # 6 pictures, batches of 2
    assert [row["validation_loss"] != "" for row in read_curve(tmp_path / "loss.csv")] == [False, True, False]
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))
    last = watcher.seen[-1]
    assert last.total == 3
    assert {"learning_rate", "steps_per_second", "grad_norm"} <= set(last.metrics)


def test_one_call_with_a_preset(bases, pictures, tmp_path):
    result = train_image(
        folder=tmp_path,
        preset="concept-quick",
        base=str(bases("sd")),
        data=str(pictures),
        trigger="zxq",
        steps=1,
        device="cpu",
    )
    assert result["triggers"] == ["zxq"]


def test_plugins_join_in_order(bases, pictures, tmp_path):
    from adapters.plugin import Plugin

    calls: list[str] = []

    class Noting(Plugin):
        name = "noting"

        def before_inject(self, models):
            calls.append("before_inject")

        def after_inject(self, handles):
            calls.append("after_inject")
            self.parameters = [p for model in handles.models.values() for p in model.parameters() if p.requires_grad]

        def step_begin(self, step):
            calls.append("step_begin")

        def loss(self, loss, outputs):
            calls.append("loss")
            assert outputs.losses.shape == (2,)
            return 2 * loss, {"doubled": 1.0}

        def grads_ready(self, step):
            assert all(p.grad is not None for p in self.parameters)
            calls.append("grads_ready")

        def after_step(self, step):
            calls.append("after_step")

        def state_dict(self):
            return {"steps": len(calls)}

    watcher = Watcher()
    config = settings(bases("sd"), pictures, steps=1, gradient_accumulation=2)
    run(config, tmp_path, watcher, plugins=[Noting()])
    assert calls == [
        "before_inject",
        "after_inject",
        "step_begin",
        "loss",
        "loss",
        "grads_ready",
        "after_step",
    ]
    assert watcher.seen[-1].metrics["doubled"] == 1.0


def test_memory_presets_change_nothing(bases, pictures, tmp_path):
    plain = run(settings(bases("sd"), pictures), tmp_path / "plain")
    low = run(settings(bases("sd"), pictures, memory="low", sample_prompts=["a cross"]), tmp_path / "low")
    for key, value in tensors(plain["adapter"]).items():
        torch.testing.assert_close(tensors(low["adapter"])[key], value, rtol=1e-4, atol=1e-6)


def test_data_can_be_looked_at_before(tmp_path):
    data = bed.crosses(tmp_path / "data", count=2, captions=False)
    (data / "1.txt").write_text("a cross")
    (data / "bad.png").touch()
    found = check_data(settings("any", data, mode="concept", trigger="zxq"))
    assert found == {
        "pictures": 2,
        "broken": {"bad.png": "empty file"},
        "uncaptioned": ["0.png"],
        "smallest": (32, 32),
        "largest": (32, 32),
        "prompts": ["a picture of zxq", "zxq, a cross"],
        "remarks": [],
    }


def test_a_run_is_sampled_and_saved_at_each_quarter_and_drawn_without_the_adapter(bases, pictures, tmp_path):
    quiet = run(settings(bases("sd"), pictures, steps=8, seed=3), tmp_path / "quiet")
    config = settings(bases("sd"), pictures, steps=8, seed=3, sample_every=None, save_every=None)
    result = run(config, tmp_path / "run")
    assert same(result["adapter"], quiet["adapter"]), "looking changes nothing"
    assert quiet["samples"] == quiet["pairs"] == []
    assert [Path(file).name for file in result["samples"]] == [f"step-{n:06d}-0.png" for n in (2, 4, 6, 8)]
    assert sorted(file.name for file in (tmp_path / "run" / "saved").iterdir()) == [
        f"adapter-{n:06d}.safetensors" for n in (2, 4, 6)
    ]
    (pair,) = result["pairs"]
    assert pair["with_"] == result["samples"][-1]
    prompt = (pictures / "0.txt").read_text().strip()
    assert pair["prompt"] == prompt, "the first caption, when no prompt is given"
    pipe = diffusers.DiffusionPipeline.from_pretrained(bases("sd"))
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(prompt, num_inference_steps=2, guidance_scale=2.0, width=32, height=32,
                 generator=torch.Generator().manual_seed(pair["seed"])).images[0]  # fmt: skip
    without, with_ = (np.asarray(diffusers.utils.load_image(pair[key])).astype(int) for key in ("without", "with_"))
    assert np.abs(np.asarray(drawn).astype(int) - without).max() <= 1, "without the adapter it is the base"
    assert not np.array_equal(without, with_)
    card = Path(result["card"]).read_text()
    assert "samples/without-0.png" in card
    assert "samples/step-000008-0.png" in card


def test_any_checkpoint_becomes_an_adapter(bases, pictures, tmp_path):
    config = settings(bases("sd"), pictures, steps=6, checkpoint_every=1, keep_checkpoints=9, save_every=2)
    with pytest.raises(Cancelled):
        run(config, tmp_path, Watcher(stop_at=5))
    saved = tmp_path / "saved"
    assert sorted(file.name for file in saved.iterdir()) == [f"adapter-{n:06d}.safetensors" for n in (2, 4, 5)]
    for step in (2, 4, 5):
        result = run(config, tmp_path, keep=step)
        assert result["steps"] == step
        assert same(result["adapter"], saved / f"adapter-{step:06d}.safetensors")
    with pytest.raises(InputError, match=r"no checkpoint of step 9 .*there are: 1, 2, 3, 4, 5"):
        run(config, tmp_path, keep=9)
