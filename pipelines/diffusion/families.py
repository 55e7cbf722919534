"""What differs between model families, in one table: names, prompt encoding, batch arguments, targets.

Everything else in this package is written once for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adapters.errors import InputError


@dataclass(frozen=True)
class Encoding:
    """An encoded prompt: the positive and (or None) the negative embeddings.

    ``positive`` and ``negative`` map "embeds" (batch, tokens, width) and, where the family has them, "pooled"
    (batch, width) to tensors.
    """

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor] | None

    def call_arguments(self) -> dict[str, Tensor]:
        """The arguments with which a diffusers pipeline takes these embeddings."""
        names = {"embeds": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
        arguments = {names[key]: tensor for key, tensor in self.positive.items()}
        if self.negative is not None:
            arguments |= {f"negative_{names[key]}": tensor for key, tensor in self.negative.items()}
        return arguments


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: "sd", "sdxl", "sd3" or "flux".
        title: its name for people.
        pipeline: diffusers' class.
        denoiser: attribute of the denoising network.
        text_encoders: attributes of the text encoders an adapter may touch.
        batch_arguments: keyword arguments of the denoiser whose first dimension is the batch.
        text_arguments: where the denoiser takes embeddings: path of keys -> "embeds" or "pooled".
        targets: module name endings a LoRA adapts by default.
        encode: (pipeline, prompt, negative prompt, images per prompt, guided) -> Encoding.
        flow: trained by flow matching (its samplers differ).
    """

    name: str
    title: str
    pipeline: str
    denoiser: str
    text_encoders: tuple[str, ...]
    batch_arguments: tuple[str, ...]
    text_arguments: Mapping[tuple[str, ...], str]
    targets: tuple[str, ...]
    encode: Callable[[Any, str, str | None, int, bool], Encoding]
    flow: bool = False

    def pixel_step(self, pipe: Any) -> int:
        """Width and height must be multiples of this many pixels."""
        factor: int = pipe.vae_scale_factor
        return factor * 2 if self.flow else factor


def _encode_sd(pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
    positive, negatives = pipe.encode_prompt(prompt, pipe._execution_device, images, guided, negative)
    return Encoding({"embeds": positive}, {"embeds": negatives} if guided else None)


def _encode_sdxl(pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
    positive, negatives, pooled, negative_pooled = pipe.encode_prompt(
        prompt=prompt,
        device=pipe._execution_device,
        num_images_per_prompt=images,
        do_classifier_free_guidance=guided,
        negative_prompt=negative,
    )
    return _with_pooled(positive, negatives, pooled, negative_pooled, guided)


def _encode_sd3(pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
    positive, negatives, pooled, negative_pooled = pipe.encode_prompt(
        prompt=prompt,
        prompt_2=None,
        prompt_3=None,
        device=pipe._execution_device,
        num_images_per_prompt=images,
        do_classifier_free_guidance=guided,
        negative_prompt=negative,
    )
    return _with_pooled(positive, negatives, pooled, negative_pooled, guided)


def _encode_flux(pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
    positive, pooled, _ = pipe.encode_prompt(prompt, None, pipe._execution_device, images)
    if not guided:
        return _with_pooled(positive, None, pooled, None, False)
    negatives, negative_pooled, _ = pipe.encode_prompt(negative or "", None, pipe._execution_device, images)
    return _with_pooled(positive, negatives, pooled, negative_pooled, True)


def _with_pooled(positive: Any, negative: Any, pooled: Any, negative_pooled: Any, guided: bool) -> Encoding:
    return Encoding(
        {"embeds": positive, "pooled": pooled}, {"embeds": negative, "pooled": negative_pooled} if guided else None
    )


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="sd",
            title="Stable Diffusion 1.x / 2.x",
            pipeline="StableDiffusionPipeline",
            denoiser="unet",
            text_encoders=("text_encoder",),
            batch_arguments=(
                "sample",
                "timestep",
                "encoder_hidden_states",
                "timestep_cond",
                "added_cond_kwargs",
                "down_block_additional_residuals",
                "mid_block_additional_residual",
            ),
            text_arguments={("encoder_hidden_states",): "embeds"},
            targets=ATTENTION,
            encode=_encode_sd,
        ),
        Family(
            name="sdxl",
            title="Stable Diffusion XL",
            pipeline="StableDiffusionXLPipeline",
            denoiser="unet",
            text_encoders=("text_encoder", "text_encoder_2"),
            batch_arguments=(
                "sample",
                "timestep",
                "encoder_hidden_states",
                "timestep_cond",
                "added_cond_kwargs",
                "down_block_additional_residuals",
                "mid_block_additional_residual",
            ),
            text_arguments={("encoder_hidden_states",): "embeds", ("added_cond_kwargs", "text_embeds"): "pooled"},
            targets=ATTENTION,
            encode=_encode_sdxl,
        ),
        Family(
            name="sd3",
            title="Stable Diffusion 3 / 3.5",
            pipeline="StableDiffusion3Pipeline",
            denoiser="transformer",
            text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
            batch_arguments=(
                "hidden_states",
                "timestep",
                "encoder_hidden_states",
                "pooled_projections",
                "block_controlnet_hidden_states",
            ),
            text_arguments={("encoder_hidden_states",): "embeds", ("pooled_projections",): "pooled"},
            targets=ATTENTION,
            encode=_encode_sd3,
            flow=True,
        ),
        Family(
            name="flux",
            title="Flux",
            pipeline="FluxPipeline",
            denoiser="transformer",
            text_encoders=("text_encoder", "text_encoder_2"),
            batch_arguments=(
                "hidden_states",
                "timestep",
                "guidance",
                "encoder_hidden_states",
                "pooled_projections",
                "controlnet_block_samples",
                "controlnet_single_block_samples",
            ),
            text_arguments={("encoder_hidden_states",): "embeds", ("pooled_projections",): "pooled"},
            targets=ATTENTION,
            encode=_encode_flux,
            flow=True,
        ),
    )
}


def family_of(pipe: Any) -> Family:
    """The family of a diffusers pipeline object.

    Raises:
        InputError: a class we do not compose.
    """
    return _by_class(type(pipe).__name__, f"a {type(pipe).__name__}")


def detect(source: str | Path) -> Family:
    """The family of a model directory, a single file or a hub id.

    Raises:
        InputError: nothing there, or a family we do not know.
    """
    place = Path(source)
    if place.is_dir():
        index = place / "model_index.json"
        if not index.is_file():
            raise InputError(f"'{place}' holds no model_index.json, so it is no diffusers pipeline directory.")
        return _by_class(_class_name(index), f"'{place}'")
    if place.is_file():
        return _detect_file(place)
    if place.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1:
        raise InputError(f"Base model '{source}' is no directory, no file and no hub id ('owner/name').")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        index = Path(hf_hub_download(str(source), "model_index.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"Base model '{source}' is not here and could not be fetched from the hub: {reason}") from None
    return _by_class(_class_name(index), f"'{source}'")


def find(name: str) -> Family:
    """The family called ``name``.

    Raises:
        InputError: not one of the known names.
    """
    if name not in FAMILIES:
        raise InputError(f"Unknown model family '{name}': possible are auto, {', '.join(FAMILIES)}.")
    return FAMILIES[name]


SINGLE_FILE_SIGNS: tuple[tuple[str, str], ...] = (
    ("model.diffusion_model.joint_blocks.", "sd3"),
    ("joint_blocks.", "sd3"),
    ("double_blocks.", "flux"),
    ("model.diffusion_model.double_blocks.", "flux"),
    ("conditioner.embedders.1.", "sdxl"),
    ("conditioner.embedders.0.model.", "sdxl"),
    ("cond_stage_model.", "sd"),
)
"""Key prefixes that only occur in one family's single files, the most specific first."""


def _detect_file(file: Path) -> Family:
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        raise InputError(f"Single-file models are read as .safetensors only, not '{file.name}'.")
    try:
        with safe_open(file, framework="pt") as content:
            keys = list(content.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"'{file}' is not a readable safetensors file: {error}") from None
    for prefix, name in SINGLE_FILE_SIGNS:
        if any(key.startswith(prefix) for key in keys):
            return FAMILIES[name]
    raise InputError(
        f"'{file.name}' is a checkpoint of no known family ({', '.join(FAMILIES)}): name it with --family."
    )


def _class_name(index: Path) -> str:
    try:
        return str(json.loads(index.read_text(encoding="utf-8")).get("_class_name", ""))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"'{index}' is not valid JSON: {error}") from None


def _by_class(name: str, source: str) -> Family:
    for family in FAMILIES.values():
        if family.pipeline == name:
            return family
    possible = ", ".join(family.pipeline for family in FAMILIES.values())
    raise InputError(f"{source} is made for '{name or 'an unnamed pipeline'}'; composition works with {possible}.")
