"""The toy of two concepts (:mod:`tests.toy`): regions put each concept in its half more often than merging does.

64 pictures per run from the same seeds, 20 steps, guidance 3. A concept is there if it is in its own half and the other
one is not. Refinement is not judged here: the attention of so small a network is not localised (its invariants are
tested in test_lora_composer.py). The weights that lie here measured over 3 x 64 pictures: weaker concept 0 merged
and 0.41 with injection, mask and re-initialisation; both at once 0 and 0.15. Alone the concepts are there in 0.95 and
0.89 of 64 pictures.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.regions import Region
from tests import toy

SEEDS = 64
CALL: dict[str, Any] = {"steps": 20, "guidance_scale": 3.0, "output_type": "latent", "height": 8, "width": 16}
BOXES = {"a": (0, 0, 0.5, 1), "b": (0.5, 0, 1, 1)}
SIDES = {"a": "left", "b": "right"}


@cache
def composer() -> MultiLoRAPipeline:
    made = MultiLoRAPipeline(toy.pipeline())
    for name in toy.CONCEPTS:
        made.load_lora(toy.adapter(name), name)
    return made


def merged(seed: int, method: str = "merge") -> Tensor:
    composer().compose(method)
    pictures: Tensor = composer()("two <a> <b>", seed=seed, images=SEEDS, **CALL).images
    return pictures


def regional(seed: int, **options: Any) -> Tensor:
    """Injection, and the parts that ``options`` switch on."""
    regions = [
        Region((name,), box=BOXES[name], prompt=f"one {word}", words=(word,))
        for name, (word, _, _) in toy.CONCEPTS.items()
    ]
    parts = {"self_mask": False, "reinit": False, "refine": False, "capture": 1}
    composer().compose("lora-composer", regions=regions, **(parts | options))
    pictures: Tensor = composer()("two obj", seed=seed, images=SEEDS, **CALL).images
    return pictures


def shares(pictures: Tensor) -> dict[str, float]:
    """Share of pictures with a concept in its half: of each, of the weaker one, of both at once."""
    there = {name: toy.present(pictures, name, side) for name, side in SIDES.items()}
    found = {name: float(mask.float().mean()) for name, mask in there.items()}
    return {**found, "weaker": min(found.values()), "both": float((there["a"] & there["b"]).float().mean())}


@pytest.mark.slow
def test_each_concept_alone() -> None:
    for name, (word, _, _) in toy.CONCEPTS.items():
        composer().compose("merge", [name])
        pictures = composer()(f"one {word}", seed=0, images=SEEDS, **CALL).images
        sides = toy.present(pictures, name, "left") | toy.present(pictures, name, "right")
        assert float(sides.float().mean()) >= 0.8, name


@pytest.mark.journey
def test_regions_beat_merging() -> None:
    together, apart = shares(merged(0)), shares(regional(0, self_mask=True, reinit=True))
    assert apart["weaker"] > together["weaker"]


@pytest.mark.slow
def test_regions_put_the_weaker_concept_in_its_half_half_again_as_often_as_merging() -> None:
    starts = [number * SEEDS for number in range(3)]
    together = shares(torch.cat([merged(seed) for seed in starts]))
    apart = shares(torch.cat([regional(seed, self_mask=True, reinit=True) for seed in starts]))
    print({"merge": together, "injection + mask + re-initialisation": apart})
    assert apart["weaker"] >= 1.5 * together["weaker"]
    assert apart["both"] >= together["both"]


def test_the_weights_are_small() -> None:
    assert sum(file.stat().st_size for file in toy.FOLDER.glob("*.safetensors")) < 2e6


def test_what_counts_as_present() -> None:
    picture = torch.full((1, 3, 8, 16), -1.0)
    picture[:, 0, 2:5, 1:3] = 1  # six red pixels on the left
    assert bool(toy.present(picture, "a", "left"))
    assert not bool(toy.present(picture, "a", "right"))
    assert not bool(toy.present(picture, "b", "left"))
    picture[:, 2, 6:8, 5:7] = 1  # and four blue ones
    assert not bool(toy.present(picture, "a", "left"))
