"""The image training job: pictures in, one ordinary LoRA out.

See :mod:`studio.training.schemas.base` for how fields become flags and widgets.
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from studio.composition.schema import ModelChoice
from studio.library.base_families import FLOW
from studio.training.schemas import combinations, rules
from studio.training.schemas.base import AdapterTrainConfig, option, preset_field
from studio.training.schemas.method import MethodFields

Mode = Literal["concept", "style", "captioned"]
Targets = Literal["attention", "attention-mlp", "linear", "all"]
Export = Literal["diffusers", "peft", "kohya"]

_DATA = option("Data")
_DATA_MORE = option("Data", advanced=True)
_ADAPTER = option("Adapter")
_ADAPTER_MORE = option("Adapter", advanced=True)
_OPTIMISER = option("Optimiser")
_OPTIMISER_MORE = option("Optimiser", advanced=True)
_SCHEDULE = option("Schedule")
_SCHEDULE_MORE = option("Schedule", advanced=True)
_LOSS = option("Noise and loss")
_LOSS_MORE = option("Noise and loss", advanced=True)
_MEMORY = option("Memory and speed")
_MEMORY_MORE = option("Memory and speed", advanced=True)
_OUTPUT = option("Samples and saving")
_OUTPUT_MORE = option("Samples and saving", advanced=True)


class PictureFields(BaseModel):
    """Fields shared by jobs that learn from and draw pictures."""

    resolution: int | None = Field(
        None,
        ge=8,
        description="Pixels (side of the square with the same area); empty = the base model's own.",
        json_schema_extra=_DATA,
    )
    buckets: bool = Field(
        True,
        description="Keep aspect ratios: pictures are grouped into sizes of about equal area.",
        json_schema_extra=_DATA_MORE,
    )
    flip: bool = Field(False, description="Mirror half of the pictures left to right.", json_schema_extra=_DATA_MORE)
    cache_folder: str = Field(
        "",
        description="Folder of the caches and drawn class pictures; empty = the studio's own.",
        json_schema_extra=_MEMORY_MORE,
    )
    sample_steps: int | None = Field(
        None, ge=1, le=1000, description="Denoising steps of a sample; empty = the base's own.",
        json_schema_extra=_OUTPUT_MORE,
    )  # fmt: skip
    sample_seed: int = Field(
        0, ge=0, description="Seed of the samples, always the same.", json_schema_extra=_OUTPUT_MORE
    )
    export: list[Export] = Field(
        default=["diffusers"],
        description="File formats: diffusers (always written), peft (a directory), kohya (web UIs).",
        json_schema_extra=_OUTPUT,
    )


class TrainImageConfig(MethodFields, PictureFields, ModelChoice, AdapterTrainConfig):
    """Train a LoRA of a text-to-image model from a folder of pictures."""

    kind: ClassVar[str] = "train-image"

    preset: str = preset_field(kind)
    data: str = Field(
        description="Folder of pictures, with captions as same-named .txt files or metadata.jsonl / metadata.csv.",
        json_schema_extra=_DATA,
    )
    mode: Mode = Field(
        "concept",
        description="concept: one thing called by a trigger word; style: a look called by a trigger word; "
        "captioned: a set in which every picture has its own caption.",
        json_schema_extra=_DATA,
    )
    trigger: str = Field(
        "", description="New or rare word that calls the concept or style, e.g. 'zxq'.", json_schema_extra=_DATA
    )
    instance_prompt: str = Field(
        "",
        description="Prompt of pictures without a caption; {trigger} stands for the trigger word. "
        "Empty = 'a picture of {trigger}' (concept), 'a picture, {trigger} style' (style).",
        json_schema_extra=_DATA,
    )
    caption_template: str = Field(
        "{caption}",
        description="How a caption is used: {caption} and {trigger} are replaced. "
        "A trigger word that is in neither is put in front.",
        json_schema_extra=_DATA_MORE,
    )
    caption_prefix: str = Field(
        "", description="Text put in front of every caption and prompt of the set.", json_schema_extra=_DATA_MORE
    )
    caption_dropout: float = Field(
        0.0, ge=0, le=1, description="Share of pictures shown with an empty caption.", json_schema_extra=_DATA_MORE
    )
    shuffle_tags: bool = Field(
        False, description="Shuffle the comma-separated tags of a caption.", json_schema_extra=_DATA_MORE
    )
    keep_tags: int = Field(
        1,
        ge=0,
        description="How many leading tags shuffling leaves in place.",
        json_schema_extra=_DATA_MORE,
    )
    allow_missing_captions: bool = Field(
        False,
        description="captioned: use the instance prompt (or nothing) where a caption is missing.",
        json_schema_extra=_DATA_MORE,
    )
    repeats: int = Field(
        1, ge=1, description="How many times every picture is shown per epoch.", json_schema_extra=_DATA_MORE
    )
    bucket_min: int | None = Field(
        None, ge=8, description="Shortest side of a bucket; empty = half the resolution.", json_schema_extra=_DATA_MORE
    )
    bucket_max: int | None = Field(
        None, ge=8, description="Longest side of a bucket; empty = twice the resolution.", json_schema_extra=_DATA_MORE
    )
    bucket_step: int | None = Field(
        None,
        ge=1,
        description="Sides are multiples of this; empty = what the model needs.",
        json_schema_extra=_DATA_MORE,
    )
    no_upscale: bool = Field(
        False, description="Never enlarge a picture: small ones go to smaller buckets.", json_schema_extra=_DATA_MORE
    )
    crop: Literal["center", "random"] = Field(
        "center",
        description="Where a picture is cut to its bucket (random needs live latents).",
        json_schema_extra=_DATA_MORE,
    )
    prior_preservation: bool = Field(
        False,
        description="concept: also show pictures of the class, so that the class does not become the concept.",
        json_schema_extra=_DATA,
    )
    class_prompt: str = Field(
        "", description="The base's prompt for the class, e.g. 'a picture of a cat'.", json_schema_extra=_DATA
    )
    class_data: str = Field(
        "", description="Folder of class pictures; empty = the base model draws them.", json_schema_extra=_DATA_MORE
    )
    class_images: int = Field(
        50,
        ge=1,
        description="Class pictures the base model draws (kept for the next run).",
        json_schema_extra=_DATA_MORE,
    )
    prior_weight: float = Field(
        1.0, ge=0, description="Weight of the class pictures' loss.", json_schema_extra=_DATA_MORE
    )

    # ---------------------------------------------------------------- Adapter
    targets: Targets = Field(
        "attention",
        description="Layers that learn: attention; + feed-forward; every linear layer; every layer with convolutions.",
        json_schema_extra=_ADAPTER,
    )
    conv_rank: int = Field(
        0,
        ge=0,
        description="Rank of the convolutions; 0 = same as the linear layers where targets includes them.",
        json_schema_extra=_ADAPTER_MORE,
    )
    conv_alpha: float | None = Field(
        None, gt=0, description="Alpha of the convolutions; empty = conv_rank.", json_schema_extra=_ADAPTER_MORE
    )
    train_text_encoder: bool = Field(
        False, description="Also train a LoRA of the text encoder(s).", json_schema_extra=_ADAPTER
    )
    text_encoder_rank: int | None = Field(
        None, ge=1, description="Rank in the text encoders; empty = rank.", json_schema_extra=_ADAPTER_MORE
    )
    text_encoder_stop: int | None = Field(
        None,
        ge=1,
        description="Step after which the text encoders no longer learn; empty = never.",
        json_schema_extra=_ADAPTER_MORE,
    )

    # ---------------------------------------------------------------- Optimiser
    text_encoder_learning_rate: float | None = Field(
        None,
        description="Learning rate of the text encoders; empty = half of learning_rate.",
        json_schema_extra=_OPTIMISER_MORE,
    )
    text_encoder_loraplus_ratio: float = Field(
        1.0, gt=0, description="LoRA+ ratio in the text encoders.", json_schema_extra=_OPTIMISER_MORE
    )

    # ---------------------------------------------------------------- Schedule

    # ---------------------------------------------------------------- Noise and loss
    loss: Literal["l2", "l1", "huber"] = Field("l2", description="Distance to the target.", json_schema_extra=_LOSS)
    huber_delta: float = Field(
        0.1, gt=0, description="huber: where quadratic becomes linear.", json_schema_extra=_LOSS_MORE
    )
    snr_gamma: float | None = Field(
        None, gt=0, description="Min-SNR loss weights (5 is usual); empty = off.", json_schema_extra=_LOSS
    )
    noise_offset: float = Field(
        0.0,
        ge=0,
        description="Noise shared by a channel; helps with very dark or bright pictures.",
        json_schema_extra=_LOSS,
    )
    noise_offset_random: bool = Field(
        False, description="Draw a new offset strength for each picture.", json_schema_extra=_LOSS_MORE
    )
    input_perturbation: float = Field(
        0.0, ge=0, description="Extra noise on the noisy input only.", json_schema_extra=_LOSS_MORE
    )
    timestep_sampling: Literal["auto", "uniform", "logit-normal"] = Field(
        "auto",
        description="Which noise levels are trained on; auto = uniform (SD, SDXL), logit-normal (SD3, Flux).",
        json_schema_extra=_LOSS_MORE,
    )
    logit_mean: float = Field(0.0, description="logit-normal: mean.", json_schema_extra=_LOSS_MORE)
    logit_std: float = Field(1.0, gt=0, description="logit-normal: spread.", json_schema_extra=_LOSS_MORE)
    timestep_shift: float | None = Field(
        None,
        gt=0,
        description="Above 1: more training on noisy levels; below 1: on clean ones. Empty = the model's own.",
        json_schema_extra=_LOSS_MORE,
    )
    timestep_min: float = Field(
        0.0, ge=0, lt=1, description="Lowest noise level (0 = clean).", json_schema_extra=_LOSS_MORE
    )
    timestep_max: float = Field(
        1.0, gt=0, le=1, description="Highest noise level (1 = pure noise).", json_schema_extra=_LOSS_MORE
    )
    guidance: float = Field(
        1.0, ge=0, description="Flux: guidance value the model is trained at.", json_schema_extra=_LOSS_MORE
    )

    # ---------------------------------------------------------------- Memory and speed
    cache_latents: Literal["auto", "none", "memory", "disk"] = Field(
        "auto",
        description="Encode every picture once; auto = memory unless crops are random.",
        json_schema_extra=_MEMORY,
    )
    cache_text: Literal["auto", "none", "memory", "disk"] = Field(
        "auto",
        description="Encode every caption once; auto = memory unless the text encoder learns.",
        json_schema_extra=_MEMORY,
    )
    compile: bool = Field(False, description="torch.compile the denoiser.", json_schema_extra=_MEMORY_MORE)

    # ---------------------------------------------------------------- Samples and saving
    sample_negative: str = Field("", description="Negative prompt of the samples.", json_schema_extra=_OUTPUT_MORE)
    sample_guidance: float | None = Field(
        None, ge=0, description="Guidance of the samples; empty = the base's own.", json_schema_extra=_OUTPUT_MORE
    )
    validation_split: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the pictures held out for the validation loss.",
        json_schema_extra=_OUTPUT_MORE,
    )

    # ---------------------------------------------------------------- rules between fields
    _positive_text_rate = field_validator("text_encoder_learning_rate")(rules.learning_rate)

    @field_validator("caption_template", "instance_prompt")
    @classmethod
    def _known_placeholders(cls, value: str) -> str:
        strange = set(re.findall(r"{([^{}]*)}", value)) - {"caption", "trigger"}
        if strange:
            raise ValueError(f"only {{caption}} and {{trigger}} are replaced, found {{{sorted(strange)[0]}}}")
        return value

    @field_validator("sample_prompts")
    @classmethod
    def _known_in_samples(cls, value: list[str]) -> list[str]:
        strange = set(re.findall(r"{([^{}]*)}", " ".join(value))) - {"trigger"}
        if strange:
            raise ValueError(f"only {{trigger}} is replaced in a sample prompt, found {{{sorted(strange)[0]}}}")
        return value

    @model_validator(mode="after")
    def _combinations(self) -> TrainImageConfig:
        rules.refuse(self, _REFUSED)
        combinations.refuse(self)
        return self


_REFUSED: list[rules.Refusal] = [
    (
        lambda c: c.mode in ("concept", "style") and not c.trigger and not c.instance_prompt,
        "a concept or style needs a trigger word (or an instance_prompt) that calls it",
    ),
    (
        lambda c: c.prior_preservation and not c.class_prompt,
        "prior_preservation needs a class_prompt, e.g. 'a picture of a cat'",
    ),
    (
        lambda c: c.timestep_min >= c.timestep_max,
        "timestep_min must be below timestep_max",
    ),
    (
        lambda c: c.train_text_encoder and c.cache_text in ("memory", "disk"),
        "cached captions would go stale while the text encoder learns: set cache_text to 'none' or 'auto', "
        "or train_text_encoder to false",
    ),
    (
        lambda c: c.crop == "random" and c.cache_latents in ("memory", "disk"),
        "cached latents have a fixed crop: set crop to 'center' or cache_latents to 'none'",
    ),
    (
        lambda c: c.snr_gamma is not None and c.family in FLOW,
        "min-SNR weights mean nothing for flow matching models (SD3, Flux): leave snr_gamma empty",
    ),
    (
        lambda c: c.bucket_min is not None and c.bucket_max is not None and c.bucket_min > c.bucket_max,
        "bucket_min must not be above bucket_max",
    ),
    (
        lambda c: c.text_encoder_stop is not None and not c.train_text_encoder,
        "text_encoder_stop needs train_text_encoder: switch that on or leave the stop empty",
    ),
]
