"""Pictures of one batch with their own strengths are those that diffusers and PEFT make one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from adapters.errors import InputError
from pipelines.diffusion import MultiLoRAPipeline
from tests.pipelines.conftest import CALL, PROMPT, Bed, close, latents, peft_latents

STRENGTHS = ({"a": 0.0, "b": 0.5}, {"a": 0.7}, {"a": 1.2, "b": 0.0})


def pairs(strengths: Any) -> list[dict[str, tuple[float, float]]]:
    return [{name: (weight, weight) for name, weight in one.items()} for one in strengths]


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_every_picture_is_the_one_that_diffusers_makes_alone(beds: Callable[[str], Bed], family: str) -> None:
    bed = beds(family)
    pipe = bed.pipe()
    for name in "ab":
        pipe.load_lora_weights(bed.files[name], adapter_name=name)
    wanted = []
    for seed, one in enumerate(STRENGTHS):
        pipe.set_adapters(["a", "b"], [one["a"], one.get("b", 0.9)])
        wanted.append(peft_latents(pipe, seeds=(seed,)))
    composer = bed.composer("a", "b", b=0.9)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
    close(latents(composer, "merge", images=3, generator=seeds, strengths=pairs(STRENGTHS)), torch.cat(wanted))
    assert composer.adapters["a"].weight == 1
    close(latents(composer, images=1), latents(bed.composer("a", "b", b=0.9), "merge"))


def test_schedules_and_choices_hold_for_each_picture(sd: Bed) -> None:
    composer = MultiLoRAPipeline(sd.pipe())
    composer.load_lora(sd.files["a"], "a", schedule=[(0, 1), (0.5, 1), (0.5, 0), (1, 0)])
    both = latents(composer, images=2, strengths=pairs([{"a": 0.5}, {"a": 1.5}]))
    choice = latents(composer, images=2, strengths=pairs([{"a": 0.5}, {"a": 1.5}]), prompt="{a red apple|a red apple}")
    close(choice, both)
    for k, weight in enumerate((0.5, 1.5)):
        composer.unload_lora("a")
        composer.load_lora(sd.files["a"], "a", weight=weight, schedule=[(0, 1), (0.5, 1), (0.5, 0), (1, 0)])
        close(both[k : k + 1], latents(composer, seed=CALL["seed"] + k))


@pytest.mark.parametrize(
    ("method", "strengths", "words"),
    [
        ("merge", [{"a": 1.0}], "Strengths for 1 pictures are given, but 2 are made"),
        ("merge", [{"c": 1.0}, {}], "'c' is not part of the composition, which has a, b"),
        ("composite", [{"a": 1.0}, {}], "'composite' cannot give each picture its own strengths: use merge"),
    ],
)
def test_what_cannot_differ_in_a_batch_is_refused(sd: Bed, method: str, strengths: Any, words: str) -> None:
    composer = sd.composer("a", "b").compose(method)
    with pytest.raises(InputError, match=words):
        composer(PROMPT, images=2, strengths=pairs(strengths), **CALL)


@pytest.mark.parametrize("family", ["z-image", "krea2", "hidream", "ernie-image"])
def test_layers_that_take_all_pictures_together_are_refused_by_a_sentence(
    beds: Callable[[str], Bed], family: str
) -> None:
    composer = beds(family).composer("a", "c").compose("merge")
    with pytest.raises(InputError, match=r"cannot share a batch here.* make one picture at a time"):
        composer(PROMPT, images=2, strengths=pairs([{"a": 0.3}, {"a": 1.0}]), **CALL)
