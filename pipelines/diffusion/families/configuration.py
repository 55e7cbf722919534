"""Checks of a base's configuration: a field that changes results is either honoured or refused.

Composition uses diffusers' own pipeline and scheduler, which honour their fields; fields that such a pipeline would
ignore are refused here. Training and distillation compute noise levels, targets and latents themselves, and support
fewer fields.
"""

from __future__ import annotations

import inspect
from typing import Any

from adapters.errors import InputError
from pipelines.diffusion.families.base import Family

NOISE = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr",
}  # fmt: skip
"""Fields of a scheduler that define the noise the model was trained with; all are used in training."""

FLOW = {
    "num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len",
    "max_image_seq_len", "shift_terminal", "time_shift_type", "flow_shift", "use_flow_sigmas", "prediction_type",
}  # fmt: skip
"""The same for flow matching; training uses only the shift, unless it depends on the picture's size."""

SAMPLING = {
    "algorithm_type", "clip_sample", "clip_sample_range", "disable_corrector", "dynamic_thresholding_ratio",
    "euler_at_final", "final_sigmas_type", "interpolation_type", "invert_sigmas", "lambda_min_clipped",
    "lower_order_final", "original_inference_steps", "predict_x0", "sample_max_value", "set_alpha_to_one", "sigma_max",
    "sigma_min", "skip_prk_steps", "solver_order", "solver_p", "solver_type", "steps_offset", "stochastic_sampling",
    "thresholding", "timestep_scaling", "timestep_spacing", "timestep_type", "use_beta_sigmas",
    "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas", "variance_type",
}  # fmt: skip
"""Fields that only affect sampling and have no meaning for training."""

VAE = {
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
    "act_fn", "latent_channels", "norm_num_groups", "sample_size", "scaling_factor", "force_upcast", "use_quant_conv",
    "use_post_quant_conv", "mid_block_add_attention",
}  # fmt: skip
"""Fields of a VAE that every family honours; latent statistics are in the family's ``vae_fields``."""


def check_base(pipe: Any, family: Family) -> None:
    """Refuse a base that needs something the family's pipeline does not provide.

    Raises:
        InputError: a denoiser with other inputs, or latent statistics or a prediction type that would be ignored.
    """
    denoiser = getattr(pipe, family.denoiser)
    wanted, found = family.input_channels(pipe), denoiser.config.in_channels
    if type(pipe).__name__ == family.pipeline and found != wanted:
        raise InputError(
            f"The {family.denoiser} of this base reads {found} channels, {family.title} has {wanted}: it is made for "
            "more inputs (inpainting, depth ...), which are not supported. Use an ordinary base."
        )
    for field, possible in family.denoiser_inputs.items():
        if denoiser.config.get(field) not in possible:
            raise InputError(
                f"The {family.denoiser} of this base has {field} '{denoiser.config.get(field)}', which "
                f"{family.title} does not support: use an ordinary base."
            )
    for field in ("shift_factor", "latents_mean", "latents_std"):
        if pipe.vae.config.get(field) and field not in family.vae_fields:
            raise InputError(
                f"The VAE of this base has {field}, which the pipeline of {family.title} would ignore, so its pictures "
                "would be wrong: use another base."
            )
    prediction = pipe.scheduler.config.get("prediction_type")
    if prediction is not None and not family.flow and prediction not in family.predictions:
        raise InputError(
            f"The scheduler of this base predicts '{prediction}'; {family.title} supports "
            f"{', '.join(family.predictions)}."
        )


def check_trainable(pipe: Any, family: Family) -> None:
    """Refuse a base whose noise or latents training would compute wrongly.

    Raises:
        InputError: as :func:`check_base` and :meth:`Family.training_refusal`; an EDM base, or an unknown field of
            scheduler or VAE that is not at its default.
    """
    check_base(pipe, family)
    parts = [name for name, part in pipe.components.items() if part is not None]
    if refusal := family.training_refusal(type(pipe).__name__, parts):
        raise InputError(refusal)
    scheduler = pipe.scheduler
    kind = type(scheduler).__name__
    if is_edm(scheduler):
        raise InputError(
            f"This base uses EDM's noise and scaling ({kind}), which training and distillation do not support; it can "
            "only be used to compose pictures."
        )
    known = SAMPLING | (FLOW if family.flow else NOISE)
    if family.flow and scheduler.config.get("use_flow_sigmas"):  # a sampler of noise schedules that makes flow's levels
        known = known | NOISE | {"use_flow_sigmas", "flow_shift"}
    strange = unknown_fields(scheduler, known) + unknown_fields(pipe.vae, VAE | set(family.vae_fields))
    if strange:
        raise InputError(
            f"The configuration of this base has {', '.join(strange)}, which training does not support, so results "
            "could be wrong. Remove it from the configuration if it has no effect."
        )


def is_edm(scheduler: Any) -> bool:
    """Whether a scheduler follows Karras et al. 2022 (arXiv 2206.00364): noise levels sigma, scaled inputs."""
    return scheduler.config.get("sigma_data") is not None or type(scheduler).__name__.startswith("EDM")


def unknown_fields(part: Any, known: set[str]) -> list[str]:
    """``field=value`` for every field of a part's configuration that is not in ``known`` and not at its default."""
    defaults = {name: field.default for name, field in inspect.signature(type(part).__init__).parameters.items()}
    return [
        f"{name}={value!r}"
        for name, value in part.config.items()
        if not name.startswith("_") and name not in known and value is not None and value != defaults.get(name)
        and value is not False
    ]  # fmt: skip
