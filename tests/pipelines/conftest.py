"""Tiny pipelines and random adapters, made once per session."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.families import family_of
from tests import tiny

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

CALL: dict[str, Any] = {"steps": 4, "seed": 3, "output_type": "latent", "width": 32, "height": 32}
PROMPT = "a red apple"


@dataclass(frozen=True)
class Bed:
    """A tiny model and three adapters for it: a and b with text encoder layers, c on other layers and without."""

    family: str
    folder: Path
    files: dict[str, Path]

    def pipe(self) -> Any:
        """A fresh diffusers pipeline, always with the same weights."""
        return tiny.FAMILIES[self.family]()

    def composer(self, *names: str, **weights: float) -> MultiLoRAPipeline:
        """Our pipeline with some of the adapters loaded."""
        composer = MultiLoRAPipeline(self.pipe())
        for name in names:
            composer.load_lora(self.files[name], name, weight=weights.get(name, 1.0))
        return composer


def make_bed(family: str, folder: Path) -> Bed:
    pipe = tiny.FAMILIES[family]()
    others = {
        "sd": ("conv1", "to_q", "proj_in", "time_emb_proj"),
        "sdxl": ("conv2", "to_k", "ff.net.2"),
        "lumina2": ("to_k", "feed_forward.linear_1", "layers.1.norm1.linear"),
        "auraflow": ("to_q", "ff.linear_1", "ff_context.out_projection", "add_k_proj", "context_embedder"),
        "cogview4": ("to_q", "ff.net.0.proj", "norm1.linear"),
        "ernie-image": ("to_v", "mlp.up_proj", "linear_fc2", "text_proj"),
        "sana": ("attn2.to_q", "attn1.to_v", "ff.conv_inverted", "ff.conv_point", "caption_projection.linear_1"),
        "z-image": ("to_q", "feed_forward.w2", "layers.1.adaLN_modulation.0", "cap_embedder.1"),
        "krea2": ("to_q", "to_gate", "ff.down", "projector", "txt_in.linear_1"),
        "hidream": ("to_q", "to_out_t", "w1", "adaLN_modulation.1"),
        "qwen": ("to_q", "add_v_proj", "txt_mlp.net.2", "img_mod.1", "txt_in"),
        "flux2": ("add_k_proj", "to_qkv_mlp_proj", "linear_out", "single_transformer_blocks.0.attn.to_out"),
        "flux2-klein": ("add_k_proj", "to_qkv_mlp_proj", "linear_out", "single_transformer_blocks.0.attn.to_out"),
    }
    return Bed(
        family,
        folder,
        {
            "a": tiny.lora_file(pipe, folder / "a", seed=1, rank=2, alpha=4.0),
            "b": tiny.lora_file(pipe, folder / "b", seed=2, rank=3, alpha=1.5),
            "c": tiny.lora_file(
                pipe,
                folder / "c",
                seed=3,
                rank=2,
                alpha=2.0,
                targets=others.get(family, ("to_q", "proj_out")),
                text_targets=(),
            ),
        },
    )


@pytest.fixture(scope="session")
def beds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bed]:
    """The bed of a family, made on first use."""
    made: dict[str, Bed] = {}

    def bed(family: str) -> Bed:
        if family not in made:
            made[family] = make_bed(family, tmp_path_factory.mktemp(family))
        return made[family]

    return bed


@pytest.fixture(scope="session")
def sd(beds: Callable[[str], Bed]) -> Bed:
    return beds("sd")


def latents(composer: MultiLoRAPipeline, method: str = "", **options: Any) -> torch.Tensor:
    """The denoised latents of a short run."""
    call = {
        key: options.pop(key)
        for key in list(options)
        if key not in ("adapters", "tau", "te_mode", "adapter_batch", "fold")
    }
    if method:
        composer.compose(method, **options)
    result: torch.Tensor = composer(call.pop("prompt", PROMPT), **(CALL | call)).images
    return result


def peft_latents(
    pipe: Any, guidance: float | None = None, seeds: tuple[int, ...] = (3,), **options: Any
) -> torch.Tensor:
    """The same run by diffusers alone; the guidance is the family's usual one."""
    options |= own_size(pipe)
    family = family_of(pipe)
    result: torch.Tensor = pipe(
        prompt=PROMPT,
        num_inference_steps=4,
        **family.guidance_arguments(family.usual(pipe)[1] if guidance is None else guidance),
        width=32,
        height=32,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **options,
    ).images
    return result


def own_size(pipe: Any) -> dict[str, Any]:
    """What keeps a pipeline from choosing another size than it is asked for."""
    known = inspect.signature(type(pipe).__call__).parameters
    return {"use_resolution_binning": False} if "use_resolution_binning" in known else {}


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to ``tolerance`` of the largest value (random networks have large outputs)."""
    difference = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))
    assert difference <= tolerance, difference
