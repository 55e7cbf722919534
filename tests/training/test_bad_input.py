"""What cannot be trained is refused in one sentence that says what to do."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from adapters.errors import Cancelled, InputError, MissingDependencyError
from studio.training import checkpoint as checkpoints
from studio.training import optimizers, train_image
from studio.training.schemas.image import TrainImageConfig
from studio.training.tasks import image
from studio.training.tasks.image import run
from tests.training import bed
from tests.training.conftest import Watcher, settings

CONCEPT = {"data": "x", "trigger": "zxq"}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"data": "x"}, "needs a trigger word"),
        ({**CONCEPT, "rnk": 4}, "unknown key 'rnk' .did you mean 'rank'"),
        ({**CONCEPT, "learning_rate": 0}, "above 0"),
        ({**CONCEPT, "learning_rate": float("nan")}, "above 0"),
        ({**CONCEPT, "optimizer": "adamww"}, "'adamw', 'adamw8bit', 'adafactor'"),
        ({**CONCEPT, "prior_preservation": True}, "needs a class_prompt"),
        ({**CONCEPT, "train_text_encoder": True, "cache_text": "memory"}, "would go stale"),
        ({**CONCEPT, "crop": "random", "cache_latents": "disk"}, "fixed crop"),
        ({**CONCEPT, "ema": True, "optimizer": "schedulefree-adamw"}, "already averages"),
        ({**CONCEPT, "init": "pissa", "use_dora": True}, "cannot be saved as an ordinary adapter"),
        ({**CONCEPT, "init": "lora_ga", "continue_from": "x"}, "an init would replace"),
        ({**CONCEPT, "init": "lora_sb", "freeze_a": True}, "freezes A and B already"),
        ({**CONCEPT, "init": "lora_sb", "loraplus_ratio": 4}, "does not train B"),
        ({**CONCEPT, "grad_rule": "allora", "alpha": 3}, "no scaling factor"),
        ({**CONCEPT, "grad_rule": "allora", "use_rslora": True}, "no scaling factor"),
        ({**CONCEPT, "grad_rule": "allora", "dropout": 0.1}, "replaces dropout"),
        ({**CONCEPT, "grad_rule": "allora", "use_dora": True}, "plain low-rank"),
        ({**CONCEPT, "allora_eta": float("inf")}, "finite"),
        ({**CONCEPT, "perturb": "ggpo", "use_dora": True}, "not defined for DoRA"),
        ({**CONCEPT, "perturb": "mgpo", "optimizer": "adafactor"}, "only adamw and sgd"),
        ({**CONCEPT, "perturb": "mgpo", "optimizer": "sgd", "beta1": 0}, "beta1 is 0"),
        ({**CONCEPT, "perturb_sigma": 0}, "greater than 0"),
        ({**CONCEPT, "perturb_rho": float("nan")}, "perturb_rho"),
        ({**CONCEPT, "perturb_ema": 1}, "less than 1"),
        ({**CONCEPT, "perturb_every": 0}, "greater than or equal to 1"),
        ({**CONCEPT, "reg": "ba"}, "'reg' belongs to ba, which train language models only"),
        ({**CONCEPT, "snr_gamma": 5, "family": "flux"}, "flow matching"),
        ({**CONCEPT, "timestep_min": 0.5, "timestep_max": 0.5}, "below timestep_max"),
        ({**CONCEPT, "target_regex": "("}, "not a regular expression"),
        ({**CONCEPT, "name": "../up"}, "starts with a letter"),
        ({**CONCEPT, "instance_prompt": "a {thing}"}, "found {thing}"),
        ({**CONCEPT, "text_encoder_stop": 3}, "needs train_text_encoder"),
    ],
)
def test_refused_by_the_schema(values, sentence):
    with pytest.raises(InputError, match=sentence):
        TrainImageConfig.parse(values)


def test_config_and_values_exclude_each_other(tmp_path):
    with pytest.raises(InputError, match="not both"):
        train_image(TrainImageConfig.parse(CONCEPT), folder=tmp_path, rank=3)
    with pytest.raises(InputError, match="did you mean 'concept"):
        train_image(folder=tmp_path, preset="concpt", **CONCEPT)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"target_regex": "attention.to_q"}, "No layer of UNet2DConditionModel matches target_regex .* such as"),
        ({"rank": 999}, "Rank 999 is larger than the layer '.*: use at most 16"),
        ({"dtype": "fp16"}, "needs a GPU"),
        ({"resolution": 8, "bucket_step": 3}, "bucket_step must be a multiple of 2"),
        ({"validation_split": 0.99}, "leaves none of the 8 pictures"),
        ({"base": "no-such-base"}, "no-such-base"),
        ({"tracker": "comet_ml"}, "not installed"),
        ({"continue_from": "no-such-adapter"}, "no-such-adapter"),
        ({"init": "orthogonal", "rank": 3}, "even ranks"),
        ({"optimizer": "prodigy", "loraplus_ratio": 4.0}, "one learning rate"),
    ],
)
def test_refused_before_the_first_step(changes, sentence, bases, pictures, tmp_path):
    with pytest.raises(InputError, match=sentence):
        run(settings(**{"base": bases("sd"), "data": pictures} | changes), tmp_path)


def test_flow_models_refuse_what_means_nothing(bases, pictures, tmp_path):
    with pytest.raises(InputError, match="flow matching"):
        run(settings(bases("sd3"), pictures, snr_gamma=5.0), tmp_path)
    with pytest.raises(InputError, match="train_text_encoder to false"):
        run(settings(bases("sd3"), pictures, train_text_encoder=True), tmp_path)
    with pytest.raises(InputError, match="SD and SDXL only"):
        run(settings(bases("sd3"), pictures, export=["kohya"]), tmp_path)


def test_missing_library_names_the_extra_and_what_is_there(bases, pictures, tmp_path, monkeypatch):
    entry = optimizers.Entry(optimizers._adamw8bit, "surely_not_installed", "bnb")
    monkeypatch.setitem(optimizers.OPTIMIZERS, "adamw8bit", entry)
    with pytest.raises(MissingDependencyError, match=r"installed: adamw, adafactor, sgd.*adapter-studio\[bnb\]"):
        run(settings(bases("sd"), pictures, optimizer="adamw8bit"), tmp_path)


def test_broken_pictures_are_named_and_can_be_skipped(bases, tmp_path):
    data = bed.crosses(tmp_path / "data", count=3)
    (data / "empty.png").touch()
    (data / "text.jpg").write_text("no picture")
    with pytest.raises(InputError, match=r"2 pictures .*empty\.png \(empty file\); text\.jpg.*skip_broken"):
        run(settings(bases("sd"), data), tmp_path / "run")
    result = run(settings(bases("sd"), data, skip_broken=True, steps=1), tmp_path / "run")
    assert result["steps"] == 1


def test_missing_captions_are_named(bases, tmp_path):
    data = bed.crosses(tmp_path / "data", count=7, captions=False)
    with pytest.raises(InputError, match=r"7 pictures .* have no caption: 0\.png, 1\.png, 2\.png, 3\.png, 4\.png\. "):
        run(settings(bases("sd"), data), tmp_path / "run")
    run(settings(bases("sd"), data, allow_missing_captions=True, steps=1), tmp_path / "run")


def test_empty_and_missing_folders(bases, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        run(settings(bases("sd"), tmp_path / "nowhere"), tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures"):
        run(settings(bases("sd"), tmp_path / "empty"), tmp_path / "run")


def test_small_pictures_without_upscaling(bases, pictures, tmp_path):
    with pytest.raises(InputError, match=r"8 pictures are too small .*smallest bucket"):
        run(settings(bases("sd"), pictures, resolution=256, no_upscale=True), tmp_path)


def test_another_configuration_cannot_be_resumed(bases, tmp_path):
    data = bed.crosses(tmp_path / "data")
    config = settings(bases("sd"), data)
    with pytest.raises(Cancelled):
        run(config, tmp_path / "run", Watcher(stop_at=2))
    changed = config.model_copy(update={"rank": 4, "learning_rate": 0.5, "save_every": 3})
    with pytest.raises(InputError, match=r"other settings \(rank: 2 -> 4; learning_rate: 0.01 -> 0.5\)"):
        run(changed, tmp_path / "run", resume=True)
    (data / "0.txt").write_text("something else")
    with pytest.raises(InputError, match="pictures or captions have changed"):
        run(config, tmp_path / "run", resume=True)


def test_damaged_checkpoint(tmp_path):
    folder = tmp_path / "step-000001"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged"):
        checkpoints.load(folder)


def test_loss_that_is_not_finite_keeps_the_last_checkpoint(bases, pictures, tmp_path, monkeypatch):
    normal, calls = image.training_loss, []

    def poisoned(*arguments):
        loss, outputs = normal(*arguments)
        calls.append(1)
        return (loss * float("nan") if len(calls) > 2 else loss), outputs

    monkeypatch.setattr(image, "training_loss", poisoned)
    with pytest.raises(InputError, match="not finite at step 3; the checkpoint 'step-000002' is kept"):
        run(settings(bases("sd"), pictures, checkpoint_every=1), tmp_path)
    saved = checkpoints.load(tmp_path / "checkpoints" / "step-000002")
    assert all(bool(torch.isfinite(value).all()) for value in saved.adapter.values())
    assert not (tmp_path / "adapter.safetensors").exists()


def test_full_disk_keeps_what_was_saved(bases, pictures, tmp_path, monkeypatch):
    config = settings(bases("sd"), pictures, checkpoint_every=1)
    normal = checkpoints.save_file

    def full(tensors, path):
        if "step-000002" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        normal(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(InputError, match=r"could not be written .No space left on device"):
        run(config, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    monkeypatch.setattr(checkpoints, "save_file", normal)
    assert run(config, tmp_path, resume=True)["steps"] == 4
