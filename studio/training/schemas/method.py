"""How an adapter starts and learns: the part of a training schema that image and language jobs share.

A training schema inherits :class:`MethodFields` (and, where the model gives logits, :class:`RegulariserFields`). Fields
are flat like all others: one field is one YAML key, one flag and one widget, in the group "Method". What cannot be
combined stands in :mod:`studio.training.schemas.combinations`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

Init = Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva", "corda", "lora_ga", "lora_sb"]
GradRule = Literal["plain", "allora"]
Perturbation = Literal["none", "ggpo", "mgpo", "flat"]
Regulariser = Literal["none", "ba"]

GROUP = "Method"

_METHOD: dict[str, Any] = {"group": GROUP, "advanced": False}
_METHOD_MORE: dict[str, Any] = {"group": GROUP, "advanced": True}


class MethodFields(BaseModel):
    """Initialisation, gradient rule, what is frozen, perturbation."""

    # ---------------------------------------------------------------- how it starts
    init: Init = Field(
        "default",
        description="How A and B start. pissa, olora, corda and lora_ga start away from zero without touching the "
        "base; what is saved is still an ordinary LoRA (of twice the rank).",
        json_schema_extra=_METHOD,
    )
    init_batches: int = Field(
        8,
        ge=1,
        description="Batches of the data that eva, corda, lora_ga and lora_sb look at before the first step.",
        json_schema_extra=_METHOD_MORE,
    )
    ga_gamma: float = Field(
        16.0,
        gt=0,
        description="lora_ga: strength of the start is out^(1/4) / sqrt(gamma); smaller starts stronger.",
        json_schema_extra=_METHOD_MORE,
    )
    ga_direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = Field(
        "ArB2r",
        description="lora_ga: which of the 2r singular directions of the gradient go to A and which to B.",
        json_schema_extra=_METHOD_MORE,
    )
    ga_scale: Literal["stable", "unit", "gd", "weightS"] = Field(
        "stable", description="lora_ga: size of the start (stable is the paper's).", json_schema_extra=_METHOD_MORE
    )
    ga_norm_clip: bool = Field(
        False,
        description="lora_ga: never start with an offset larger than the largest base weight.",
        json_schema_extra=_METHOD_MORE,
    )
    corda_mode: Literal["kpm", "ipm"] = Field(
        "ipm",
        description="corda: ipm learns fast along the directions the data uses, kpm keeps them and uses the others.",
        json_schema_extra=_METHOD_MORE,
    )
    sb_step: float | None = Field(
        None,
        gt=0,
        description="lora_sb: length of the first full step it starts from; empty = the first step's learning rate.",
        json_schema_extra=_METHOD_MORE,
    )

    # ---------------------------------------------------------------- how it learns
    freeze_a: bool = Field(
        False,
        description="Train B only (FFA-LoRA): half the parameters, and averages of several adapters are exact.",
        json_schema_extra=_METHOD,
    )
    grad_rule: GradRule = Field(
        "plain",
        description="allora scales the gradient of each output row by the size of that row's update; for sgd.",
        json_schema_extra=_METHOD,
    )
    allora_eta: float = Field(
        2.0,
        gt=0,
        allow_inf_nan=False,
        description="allora: factor on the gradient of rows that are still zero.",
        json_schema_extra=_METHOD_MORE,
    )
    allora_mode: Literal["gradient", "lr"] = Field(
        "gradient",
        description="allora: gradient is the paper's; lr scales the optimiser's update instead (ours, for AdamW).",
        json_schema_extra=_METHOD_MORE,
    )
    perturb: Perturbation = Field(
        "none",
        description="Train at slightly disturbed weights, for flatter and smoother learning: ggpo random, guided by "
        "gradients; flat random; mgpo along the momentum.",
        json_schema_extra=_METHOD,
    )
    perturb_sigma: float = Field(
        0.03,
        gt=0,
        allow_inf_nan=False,
        description="ggpo, flat: noise relative to the rows of the weight (0.03 is mild, 0.2 strong).",
        json_schema_extra=_METHOD_MORE,
    )
    perturb_beta: float = Field(
        0.01,
        ge=0,
        allow_inf_nan=False,
        description="ggpo: weight of the gradient's part of the noise.",
        json_schema_extra=_METHOD_MORE,
    )
    perturb_norm: Literal["sqrt", "sd-scripts"] = Field(
        "sqrt",
        description="ggpo: how weight and gradient norms are mixed (sqrt, or as kohya's sd-scripts does).",
        json_schema_extra=_METHOD_MORE,
    )
    perturb_schedule: Literal["constant", "cosine"] = Field(
        "constant",
        description="ggpo, flat: constant noise, or growing from zero to full over the run.",
        json_schema_extra=_METHOD_MORE,
    )
    perturb_rho: float = Field(
        0.05,
        gt=0,
        allow_inf_nan=False,
        description="mgpo: radius of the disturbance.",
        json_schema_extra=_METHOD_MORE,
    )
    perturb_ema: float = Field(
        0.9, ge=0, lt=1, description="mgpo: memory of the gradient norm.", json_schema_extra=_METHOD_MORE
    )
    perturb_direction: Literal["downhill", "uphill"] = Field(
        "downhill",
        description="mgpo: downhill looks ahead along the step (the authors' code), uphill is SAM's direction.",
        json_schema_extra=_METHOD_MORE,
    )
    perturb_every: int = Field(1, ge=1, description="Disturb every so many steps.", json_schema_extra=_METHOD_MORE)

    # ---------------------------------------------------------------- looking
    intruders_every: int = Field(
        0,
        ge=0,
        description="Count intruder dimensions every so many steps and log them; 0 = never.",
        json_schema_extra=_METHOD_MORE,
    )


class RegulariserFields(BaseModel):
    """Terms on the logits, for language and classification models. Empty numbers take the paper's value of the task."""

    reg: Regulariser = Field(
        "none",
        description="ba: BA-LoRA keeps answers near the base model's, diverse and concentrated; one more forward pass.",
        json_schema_extra=_METHOD,
    )
    ba_task: Literal["auto", "nlu", "nlg"] = Field(
        "auto",
        description="ba: nlg for text, nlu for classification; auto looks at the logits.",
        json_schema_extra=_METHOD_MORE,
    )
    ba_l1: float | None = Field(
        None, ge=0, description="ba: weight of consistency with the base.", json_schema_extra=_METHOD_MORE
    )
    ba_l2: float | None = Field(None, ge=0, description="ba: weight of diversity.", json_schema_extra=_METHOD_MORE)
    ba_l3: float | None = Field(
        None, ge=0, description="ba: weight of spectral concentration.", json_schema_extra=_METHOD_MORE
    )
    ba_k: int | None = Field(
        None, ge=1, description="ba: how many singular values count as large.", json_schema_extra=_METHOD_MORE
    )
    ba_topk: int = Field(
        20, ge=2, description="ba, text: diversity among this many likeliest tokens.", json_schema_extra=_METHOD_MORE
    )
    ba_temp: float = Field(
        2.0, gt=0, description="ba: temperature of the consistency term.", json_schema_extra=_METHOD_MORE
    )
    ba_norm: Literal["auto", "frobenius", "nuclear"] = Field(
        "auto", description="ba: what large singular values are compared with.", json_schema_extra=_METHOD_MORE
    )
    ba_schedule: Literal["paper", "constant"] = Field(
        "paper",
        description="ba: paper lets consistency fall and the others begin after a fifth of the run.",
        json_schema_extra=_METHOD_MORE,
    )
    ba_version: Literal["2026", "2024"] = Field(
        "2026", description="ba: formulas of the final paper or of the authors' first code.",
        json_schema_extra=_METHOD_MORE,
    )  # fmt: skip
