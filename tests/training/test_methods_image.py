"""Training methods in the diffusion driver: ordinary files, untouched bases, exact resuming."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from adapters.errors import Cancelled, InputError
from studio.training.tasks.image import run
from tests.training.conftest import Watcher, settings
from tests.training.test_image_runs import same, tensors

RECIPES = {
    "corda": {"init": "corda", "init_batches": 2},
    "eva-ffa": {"init": "eva", "init_batches": 2, "freeze_a": True},
    "lora_ga-text": {"init": "lora_ga", "init_batches": 2, "use_rslora": True, "train_text_encoder": True, "ema": True},
    "lora_sb-convolutions": {"init": "lora_sb", "init_batches": 2, "targets": "all", "exclude_regex": r"time_.*"},
    "pissa-convolutions": {"init": "pissa", "targets": "all", "exclude_regex": r"time_.*"},
    "allora-ggpo": {
        "grad_rule": "allora",
        "optimizer": "sgd",
        "learning_rate": 5.0,
        "perturb": "ggpo",
        "max_grad_norm": 0,
    },
    "mgpo-accumulated": {"perturb": "mgpo", "gradient_accumulation": 2, "gradient_checkpointing": True},
}


def check_the_file(result, base) -> None:
    """Diffusers draws with the file what the run drew at its end, and that is not the plain base's picture."""
    drawn = np.asarray(diffusers.utils.load_image(result["samples"][-1])).astype(int)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        generator = torch.Generator().manual_seed(0)
        return np.asarray(pipe("a cross", num_inference_steps=2, guidance_scale=2.0, generator=generator).images[0])

    plain = draw().astype(int)
    pipe.load_lora_weights(result["adapter"])
    assert np.abs(draw().astype(int) - drawn).max() <= 1
    assert np.abs(plain - drawn).max() > 1


@pytest.mark.parametrize("values", RECIPES.values(), ids=RECIPES)
def test_the_file_gives_the_trained_picture_on_the_untouched_base(values, bases, pictures, tmp_path):
    result = run(settings(bases("sd"), pictures, steps=2, sample_prompts=["a cross"], **values), tmp_path)
    check_the_file(result, bases("sd"))
    assert not [key for key in tensors(result["adapter"]) if "lora_R" in key or "offset" in key]


@pytest.mark.slow
@pytest.mark.parametrize("init", ["default", "pissa", "lora_ga"])
@pytest.mark.parametrize("rule", ["plain", "allora"])
@pytest.mark.parametrize("perturb", ["none", "ggpo", "mgpo"])
def test_the_matrix_of_methods(init, rule, perturb, bases, pictures, tmp_path):
    """Five steps of every combination: finite losses, and the file gives the trained picture."""
    values = {"init": init, "grad_rule": rule, "perturb": perturb, "init_batches": 2, "learning_rate": 0.02}
    result = run(settings(bases("sd"), pictures, steps=5, sample_prompts=["a cross"], **values), tmp_path)
    assert all(np.isfinite([result["first_loss"], result["loss"]]))
    check_the_file(result, bases("sd"))


@pytest.mark.parametrize("name", ["lora_ga-text", "lora_sb-convolutions", "allora-ggpo", "mgpo-accumulated", "eva-ffa"])
def test_stopped_and_resumed_is_uninterrupted(name, bases, pictures, tmp_path):
    config = settings(bases("sd"), pictures, **RECIPES[name])
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Cancelled):
        run(config, tmp_path / "parts", Watcher(stop_at=2))
    resumed = run(config, tmp_path / "parts", resume=True)
    assert same(whole["adapter"], resumed["adapter"])


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_other_families(family, bases, pictures, tmp_path):
    config = settings(bases(family), pictures, steps=2, init="lora_ga", init_batches=1, rank=1, perturb="mgpo")
    assert run(config, tmp_path)["steps"] == 2


def test_looking_first_moves_no_random_numbers(bases, pictures, tmp_path):
    """A start that looks at batches and then changes nothing that is trained leaves the losses as they were."""
    plain = run(settings(bases("sd"), pictures, steps=1), tmp_path / "plain")
    looked = run(settings(bases("sd"), pictures, steps=1, init="eva", init_batches=2), tmp_path / "looked")
    assert looked["first_loss"] == plain["first_loss"]


def test_too_large_a_rank_for_two_times_r_names_the_layer(bases, pictures, tmp_path):
    config = settings(bases("sd"), pictures, steps=1, init="lora_ga", init_batches=1, rank=12)
    with pytest.raises(InputError, match=r"unet\..*at most 8"):
        run(config, tmp_path)
