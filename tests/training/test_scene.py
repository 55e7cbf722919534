"""Scenes: the session trains what the plain loop trains, and whatever stops it, it goes on as if nothing had."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import assets
from adapters.errors import Cancelled, InputError
from adapters.formats import read
from adapters.layers.variant import read_layers
from adapters.progress import Progress
from assets.build.dust3r import initialise
from pipelines.geometry import ScenePipeline, calibration
from pipelines.geometry.calibration import Recipe
from pipelines.geometry.images import Affine, Photo
from pipelines.geometry.network import NetworkConfig, PointmapNetwork
from studio import jobs
from studio.cli.app import run as command
from studio.jobs import control
from studio.reconstruction import job as reconstruction
from studio.reconstruction.schema import ReconstructConfig
from studio.training import checkpoint as checkpoints
from studio.training.drivers import accelerate as driver
from studio.training.records import read_curve
from studio.training.schemas.scene import TrainSceneConfig
from studio.training.session import TrainSession
from studio.training.tasks import scene
from tests.geometry.rooms import room
from tests.training.conftest import Watcher

PICTURES = sorted(assets.path("scenes/room").glob("*.png"))[::2]
BASE = {"name": "small", "sha256": "abc", "licence": "none"}
SMALL = NetworkConfig(img_size=(32, 32), patch_size=8, enc_embed_dim=48, enc_depth=2, enc_num_heads=4, dec_embed_dim=32,
                      dec_depth=2, dec_num_heads=2)  # fmt: skip


def network() -> PointmapNetwork:
    return initialise(PointmapNetwork(SMALL), torch.Generator().manual_seed(0)).eval()


@cache
def lesson(seed: int, size: int) -> tuple[list[Photo], calibration.Labels]:
    made = room(seed, views=3, size=size)
    photos = [Photo(image, Affine(), f"{n}.png") for n, image in enumerate(made.views.image[0])]
    robust = calibration.robust_alignment(made.predictions, steps=30, warmup=10)
    return photos, calibration.pseudo_labels(robust, made.predictions.pairs, cutoff=0.3)


def scenes() -> scene.Scenes:
    """Two scenes with pictures of different sizes."""
    photos, labels = zip(lesson(3, 32), lesson(4, 24), strict=True)
    return scene.Scenes(network(), BASE, photos, labels)


def train(folder: Path, monitor: Any = None, resume: bool = False, given: Any = None, **values: Any) -> Any:
    """A session on the two scenes, to its end; returns it and its result."""
    config = TrainSceneConfig.parse({"rank": 4, "epochs": 2, "device": "cpu", **values})
    session = TrainSession.of(scene.SceneTask(config, given or scenes()), folder, monitor or Watcher())
    return session, driver.train(session, resume)


def tensors(folder: Any) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def same(first: Any, second: Any) -> bool:
    one, other = tensors(first), tensors(second)
    return all(torch.equal(one[name], other[name]) for name in one | other)


# ------------------------------------------------------------------------------------------------ the same training


def test_a_session_is_the_plain_loop_to_the_bit(tmp_path: Path) -> None:
    given = scenes()
    model, losses = calibration.train_adapter(network(), given.photos, given.labels, Recipe(rank=4, epochs=2, seed=5))
    session, result = train(tmp_path, seed=5)
    assert session.losses == losses
    assert len(losses) == 2 * 6  # 6 pairs of either scene, two at a time; sizes are not mixed
    kept = read(result["adapter"]).parts["model"]
    plain = read_layers(model)
    assert kept.keys() == plain.keys()
    assert all(kept[name].A.equal(plain[name].A) and kept[name].B.equal(plain[name].B) for name in plain)
    assert all(layer.B.abs().max() > 0 for layer in plain.values())
    about = json.loads((Path(result["adapter"]) / "scene.json").read_text())
    assert (about["losses"], about["base"], len(about["also"])) == (losses, BASE, 1)
    assert not list(tmp_path.glob("labels-*"))  # they serve resuming


def test_a_reconstruction_trains_what_the_pipeline_alone_trains(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 6, "mu": 1.0, "cutoff": 0.01}
    config = ReconstructConfig(
        images=list(map(str, PICTURES)), calibrate=True, rank=2, epochs=1, device="cpu", **options
    )
    done = reconstruction.run(config, tmp_path, Watcher())
    pipeline = ScenePipeline.from_pretrained(assets.path("models/dust3r-tiny"))
    learnt = pipeline(PICTURES, Recipe(rank=2, epochs=1), **options).record.calibration
    assert learnt is not None
    assert same(done["adapter"], learnt.save(tmp_path / "plain"))
    assert done["training_loss"] == [learnt.losses[0], learnt.losses[-1]]
    assert len(read_curve(tmp_path / "loss.csv")) == len(learnt.losses)


# ------------------------------------------------------------------------------------------------ stopped, and going on


class Killed(Watcher):
    """Ends the run in the middle of a step, as a kill does: nothing more is written."""

    def report(self, progress: Progress) -> None:
        super().report(progress)
        if progress.stage == "training" and progress.step == self.stop_at:
            raise SystemExit(9)

    def cancelled(self) -> bool:
        return False


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_bit(tmp_path: Path) -> None:
    _, whole = train(tmp_path / "whole")
    with pytest.raises(SystemExit):
        train(tmp_path / "part", Killed(stop_at=5), checkpoint_every=3)
    assert [place.name for place in checkpoints.existing(tmp_path / "part/checkpoints")] == ["step-000003"]
    other = scenes()  # of another device's rounding: what was learnt from at first is what counts
    other = replace(other, labels=[replace(one, world=one.world * (1 + 1e-6)) for one in other.labels])
    session, resumed = train(tmp_path / "part", resume=True, given=other, checkpoint_every=3)
    assert session.step == 12
    assert same(whole["adapter"], resumed["adapter"])
    curves = [[row["loss"] for row in read_curve(tmp_path / name / "loss.csv")] for name in ("whole", "part")]
    assert curves[0] == curves[1]


def test_a_reconstruction_that_was_cancelled_resumes_its_training(tmp_path: Path) -> None:
    values: dict[str, Any] = {"images": list(map(str, PICTURES)), "calibrate": True, "rank": 2, "epochs": 4, "steps": 6,
                              "mu": 1.0, "cutoff": 0.01, "device": "cpu"}  # fmt: skip
    whole = jobs.run_here("reconstruct", values, Watcher())
    assert whole.result is not None
    with pytest.raises(Cancelled, match="step 3 of"):
        jobs.run_here("reconstruct", values, Watcher(stop_at=3))
    stopped = jobs.get("last")
    assert stopped.status == "cancelled"
    jobs.resume(stopped.id)
    control.work_here(stopped.id, watcher := Watcher())
    assert next(p.step for p in watcher.seen if p.stage == "training") == 4
    resumed = jobs.get(stopped.id).result
    assert same(whole.result["adapter"], resumed["adapter"])
    for result in (whole.result, resumed):
        result["scene.json"] = json.loads(Path(result["adapter"], "scene.json").read_text())
    assert whole.result["scene.json"] == resumed["scene.json"]
    assert whole.result["cameras"] == resumed["cameras"]


def test_other_pictures_are_not_the_same_run(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        train(tmp_path, Watcher(stop_at=2))
    given = scenes()
    darker = [[replace(photo, pixels=photo.pixels / 2) for photo in one] for one in given.photos]
    with pytest.raises(InputError, match="The pictures have changed"):
        train(tmp_path, resume=True, given=replace(given, photos=darker))


def test_a_loss_that_is_not_finite_and_one_that_rises(tmp_path: Path) -> None:
    given = scenes()
    broken = replace(given, labels=[replace(one, world=one.world * torch.inf) for one in given.labels])
    with pytest.raises(InputError, match=r"not finite at step 1; no checkpoint .*Lower learning_rate"):
        train(tmp_path / "a", given=broken)
    able = ScenePipeline.from_pretrained(assets.path("models/dust3r-tiny")).network  # so its loss is small at first
    _, result = train(tmp_path / "b", given=replace(given, network=able), learning_rate=1.0, epochs=4)
    assert "probably diverged" in result["warning"]


# ------------------------------------------------------------------------------------------------ what may be asked


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "room"
    place.mkdir()
    for file in PICTURES:
        shutil.copy(file, place)
    return place


def settings(folder: Path, **values: Any) -> TrainSceneConfig:
    return TrainSceneConfig.parse(
        {"data": [str(folder)], "rank": 2, "epochs": 1, "align_steps": 6, "mu": 1.0, "cutoff": 0.01, "device": "cpu",
         **values}
    )  # fmt: skip


def test_folders_of_photos_become_an_adapter(tmp_path: Path, folder: Path, capsys: Any) -> None:
    flags = ["--rank", "2", "--epochs", "1", "--align-steps", "6", "--mu", "1", "--cutoff", "0.01", "--device", "cpu"]
    code = command(["train", "scene", "--data", str(folder), *flags, "--folder", str(tmp_path / "run"), "--json"])
    assert code == 0, capsys.readouterr().err
    made = json.loads(capsys.readouterr().out)
    config = ReconstructConfig(images=reconstruction.pictures_in(folder), calibrate=True, rank=2, epochs=1, steps=6,
                               mu=1.0, cutoff=0.01, device="cpu")  # fmt: skip
    done = reconstruction.run(config, tmp_path / "reconstruction", Watcher())
    assert same(made["adapter"], done["adapter"])
    assert str(tmp_path) not in Path(made["adapter"], "scene.json").read_text()
    used = reconstruction.run(
        config.model_copy(update={"calibrate": False, "adapter": made["adapter"]}), tmp_path / "used", Watcher()
    )
    assert used["cameras"] == done["cameras"]
    assert "calibrated to a scene: 4 pictures" in Path(made["card"]).read_text()


def test_a_stopped_run_is_kept_without_asking_the_network_again(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(Cancelled):
        scene.run(settings(folder, epochs=4), tmp_path / "run", Watcher(stop_at=2))
    kept = scene.run(settings(folder, epochs=4), tmp_path / "run", watcher := Watcher(), keep=True)
    assert kept["steps"] == 2
    assert not any(progress.stage in ("pairs", "align") for progress in watcher.seen)


def test_methods_layers_precision_and_measures(tmp_path: Path) -> None:
    """A start and a gradient rule that are no scene's own, some layers only, half precision, pairs kept out."""
    values = {"init": "orthogonal", "grad_rule": "allora", "exclude_regex": "enc_blocks.*", "save_dtype": "fp16",
              "validation_split": 0.3, "validation_every": 2, "gradient_accumulation": 2, "ema": True}  # fmt: skip
    session, result = train(tmp_path, **values)
    kept = tensors(result["adapter"])
    assert {value.dtype for value in kept.values()} == {torch.float16}
    assert not any("enc_blocks" in name for name in kept)
    assert [row["step"] for row in result["validation"]] == [2, 4]
    assert session.step == 4  # 2 epochs of 4 + 4 pairs, two at a time, two batches a step
    again, _ = train(tmp_path / "more", continue_from=result["adapter"], exclude_regex="enc_blocks.*", epochs=1)
    assert again.losses[0] != session.losses[0]


def test_blocks_that_are_computed_again_give_the_same_gradients(tmp_path: Path) -> None:
    results = [train(tmp_path / str(again), epochs=1, gradient_checkpointing=again) for again in (False, True)]
    assert results[0][0].losses == results[1][0].losses
    assert same(results[0][1]["adapter"], results[1][1]["adapter"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": []}, "name the folder of a scene"),
        ({"data": ["nowhere"]}, "no folder 'nowhere'"),
        ({"rank": 4000}, "Rank 4000 is larger than the layer"),
        ({"target_regex": "nothing"}, "No layer of the network matches target_regex 'nothing'"),
        ({"base": "naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt"}, "accept-licence"),
        ({"dtype": "fp16"}, "fp16 needs a GPU"),
        ({"validation_split": 0.99}, "too few to hold 99% of them out"),
        ({"graph": "star"}, "Unknown pair graph"),
    ],
)
def test_bad_input_is_a_sentence(values: dict[str, Any], message: str, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        scene.run(settings(folder, **values), tmp_path / "run")
