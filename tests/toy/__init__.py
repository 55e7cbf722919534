"""The toy of two concepts: a pixel-space model so small that tests can draw hundreds of pictures with it.

Pictures are 8 x 16 pixels. The base model (a UNet of two levels, a text encoder of one layer that reads 8 tokens) knows
one or two shapes, squares and discs, in the colours of a palette, wherever they are: ``one obj``, ``two obj``. Two
concepts are trained on it, each a LoRA of rank 8 on ``attn2`` (to_k, to_v, to_out) and the embedding of one word:

    <a>  a red square        <b>  a blue disc

:mod:`tests.toy.make` made the weights in this directory, ``python -m tests.toy.make`` makes them again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel

from tests import tiny

FOLDER = Path(__file__).parent
BASE = FOLDER / "base.safetensors"
HEIGHT, WIDTH = 8, 16
TOKENS = 8
WORDS = ("one", "two", "obj")
CONCEPTS = {"a": ("<a>", "red", "square"), "b": ("<b>", "blue", "disc")}
"""Name -> word, colour, form."""

PALETTE = {
    "red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0), "green": (0.0, 1.0, 0.0), "yellow": (1.0, 1.0, 0.0),
    "cyan": (0.0, 1.0, 1.0), "pink": (1.0, 0.0, 1.0),
}  # fmt: skip
TARGETS = ("attn2.to_k", "attn2.to_v", "attn2.to_out.0")


def pipeline(weights: bool = True) -> StableDiffusionPipeline:
    """The toy as a Stable Diffusion pipeline whose latents are the pixels (its autoencoder is never used)."""
    torch.manual_seed(0)
    tokenizer = tiny.clip_tokenizer(WORDS)
    tokenizer.model_max_length = TOKENS
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(4,),
            latent_channels=3, norm_num_groups=2, sample_size=HEIGHT,
        ),
        text_encoder=CLIPTextModel(
            tiny.clip_config(32, num_hidden_layers=1, max_position_embeddings=TOKENS)
        ),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=(HEIGHT, WIDTH), in_channels=3, out_channels=3, block_out_channels=(16, 32),
            layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=32, attention_head_dim=4,
            norm_num_groups=8,
        ),
        scheduler=DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing="leading", steps_offset=1,
            prediction_type="v_prediction",
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    # pixels lie in [-1, 1]; the pipeline would not take this setting, because latents know no such bounds
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
    pipe.set_progress_bar_config(disable=True)
    if weights:
        tensors = load_file(BASE)
        for part in ("unet", "text_encoder"):
            own = {
                key.removeprefix(f"{part}."): value.float() for key, value in tensors.items() if key.startswith(part)
            }
            getattr(pipe, part).load_state_dict(own)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False).eval()
    return pipe


def adapter(name: str) -> Path:
    """The file of a concept: a LoRA in kohya's names, its word beside it."""
    return FOLDER / f"{name}.safetensors"


def present(pictures: Tensor, concept: str, half: str) -> Tensor:
    """Whether a concept is in a half of pictures (batch, 3, 8, 16) and the other concept is not: (batch,) bool.

    A pixel is of a colour if it is within a third of the range of it in every channel. Present are at least 5 pixels of
    the own colour and at most 1 of the other's.
    """
    part = pictures[..., : WIDTH // 2] if half == "left" else pictures[..., WIDTH // 2 :]
    other = next(name for name in CONCEPTS if name != concept)
    return (_count(part, concept) >= 5) & (_count(part, other) <= 1)


def _count(pictures: Tensor, concept: str) -> Tensor:
    colour = torch.tensor(PALETTE[CONCEPTS[concept][1]]) * 2 - 1
    return ((pictures - colour[:, None, None]).abs() < 2 / 3).all(1).sum((1, 2))
