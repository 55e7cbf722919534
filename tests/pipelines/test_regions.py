"""Regions: what must hold exactly, on tiny random models of every family, against independent references."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.regions import Region
from tests import tiny
from tests.pipelines.conftest import CALL, PROMPT, Bed, close, latents

ALL = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
UNETS = ("sd", "sdxl")


def regional(composer: MultiLoRAPipeline, method: str, *regions: Region, **options: Any) -> torch.Tensor:
    """The denoised latents of a short run with regions."""
    how = {key: options.pop(key) for key in list(options) if key not in CALL and key not in ("prompt", "images")}
    composer.compose(method, regions=list(regions), **how)
    result: torch.Tensor = composer(options.pop("prompt", PROMPT), **(CALL | options)).images
    return result


# One region, no region


@pytest.mark.parametrize("method", ["output", "activation"])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_a_region_of_the_whole_picture_is_plain_lora(beds: Any, family: str, method: str) -> None:
    bed: Bed = beds(family)
    # the pooled text of SD3 and Flux stays the background's, so there no text encoder layers
    te_weight = 0 if family not in UNETS and method == "activation" else None
    composer = MultiLoRAPipeline(bed.pipe())
    for name in ("a", "c"):
        composer.load_lora(bed.files[name], name, weight=0.8, te_weight=te_weight)
    plain = latents(composer, "merge")
    close(regional(composer, method, Region(("a", "c"), box=ALL)), plain)
    assert bool((plain - latents(bed.composer(), "merge")).abs().max() > 1e-3)


@pytest.mark.parametrize("family", UNETS)
def test_cross_on_the_whole_picture_is_the_lora_restricted_to_cross_attention(beds: Any, family: str) -> None:
    bed: Bed = beds(family)
    full = bed.composer("a")
    loaded = full._loaded["a"].file
    kept = {k: v for k, v in loaded.parts["unet"].items() if k.endswith(("attn2.to_k", "attn2.to_v", "attn2.to_out.0"))}
    restricted = MultiLoRAPipeline(bed.pipe())
    restricted.load_lora(loaded.with_parts({**loaded.parts, "unet": kept}), "a", weight=0.7)
    wanted = latents(restricted, "merge")
    composer = bed.composer("a", a=0.7)
    close(regional(composer, "cross", Region(("a",), box=ALL)), wanted)
    close(regional(composer, "lora-composer", Region(("a",), box=ALL), reinit=False, refine=False), wanted)


@pytest.mark.parametrize("method", ["output", "activation", "cross"])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_scale_zero_with_the_same_prompt_is_the_base_model(beds: Any, family: str, method: str) -> None:
    bed: Bed = beds(family)
    if method == "cross" and family not in UNETS:
        pytest.skip("no cross-attention")
    composer = bed.composer("a", "b") if family in UNETS or method == "output" else bed.composer("a")
    base = latents(bed.composer(), "merge")
    # SD3 and Flux: a region sees its own copy of the prompt, so the whole picture must be one region
    boxes = (LEFT, RIGHT) if family in UNETS or method == "output" else (ALL,)
    found = regional(composer, method, *(Region((n,), box=b, scale=0) for n, b in zip("ab", boxes, strict=False)))
    close(found, base)


@pytest.mark.parametrize("method", ["output", "activation", "cross"])
def test_adapters_in_no_region_act_everywhere(beds: Any, method: str) -> None:
    bed: Bed = beds("sd")
    composer = bed.composer("a", "b", "c")
    wanted = latents(bed.composer("b", "c"), "merge")
    close(regional(composer, method, Region(("a",), box=LEFT, scale=0)), wanted)
