"""PEFT's options and their meaning for an adapter's tensors: used, without effect on a finished adapter, or refused.

A LoRA here is  y = W0 x + s B A x  on the unchanged base, everywhere and at any strength. An option that makes the
adapter anything else cannot be ignored silently: the same tensors would then give another model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapters.errors import InputError
from adapters.formats import mixture

KINDS = ("LORA", "LOHA", "LOKR")
"""PEFT's methods that are supported."""

WITHOUT_EFFECT = frozenset({
    # base, task and version
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    # the choice of modules: the tensors name them
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    # training only
    "lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "eva_config", "corda_config",
    "loftq_config", "lora_ga_config", "velora_config", "init_weights", "runtime_config",
    # how the base stores its weights: A and B are the same either way
    "fan_in_fan_out",
    # the factors of LoHa and LoKr: the tensors show them
    "use_effective_conv2d", "decompose_both", "decompose_factor", "use_upstream",
    # parameters of refused options
    "megatron_core", "qalora_group_size",
})  # fmt: skip
USED = frozenset({
    "peft_type", "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "init_lora_weights",
})  # fmt: skip
REFUSED: Mapping[str, str] = {
    "bias": "also trains biases, which cannot be composed",
    "lora_bias": "also trains biases (lora_bias), which cannot be composed",
    "modules_to_save": "also replaces whole modules ({value}), which cannot be composed",
    "trainable_token_indices": "also trains the embeddings of single tokens (trainable_token_indices), which cannot be "
    "composed",
    "alora_invocation_tokens": "is an activated LoRA (aLoRA): it acts only after its invocation tokens "
    "(alora_invocation_tokens), but here an adapter acts everywhere",
    "layer_replication": "is for a model with repeated layers (layer_replication), not for the base as it is",
    "target_parameters": "adapts single parameters (target_parameters), not modules",
    "use_qalora": "is a QA-LoRA, whose A reads groups of inputs (use_qalora)",
    "use_bdlora": "is a BD-LoRA, whose factors are block-diagonal (use_bdlora)",
    "kasa_config": "is a KaSA adapter, for a base truncated to its larger singular values (kasa_config)",
    "monteclora_config": "is a MonteCLoRA, whose weights are sampled at random (monteclora_config)",
    "arrow_config": "routes every token to other adapters (arrow_config)",
    "megatron_config": "is for a model with Megatron's parallel layers (megatron_config)",
    "ensure_weight_tying": "is tied over several modules (ensure_weight_tying), but its tensors name only one",
}
"""Option -> what the adapter is or does with it."""

CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")
"""Values of ``init_lora_weights`` that change the base's weights: the file fits only the changed base."""


def kind_of(config: Mapping[str, Any]) -> str:
    """PEFT's name of the method, in capitals."""
    return str(config.get("peft_type") or "LORA").rpartition(".")[2].upper()


def check_options(config: Mapping[str, Any], source: str) -> None:
    """Refuse everything but LoRA, DoRA, LoHa and LoKr on the unchanged base.

    Raises:
        InputError: another method, an option that makes the adapter something else, or an unknown option.
    """
    kind = kind_of(config)
    if kind == mixture.TYPE:
        raise InputError(f"{source} {mixture.NOT_A_LORA}.")
    if kind not in KINDS:
        raise InputError(f"{source} is a {kind} adapter; of PEFT's methods, {', '.join(KINDS)} are supported.")
    for option, value in config.items():
        if option in REFUSED and _is_set(value):
            raise InputError(f"{source} {REFUSED[option].format(value=value)}.")
    start = str(config.get("init_lora_weights") or "").lower()
    if CHANGES_BASE.match(start):
        raise InputError(
            f"{source} was initialised by {start}, which changed the base's weights: save it as an ordinary LoRA first "
            "(PEFT's save_pretrained with path_initial_model_for_weight_conversion)."
        )
    for option, value in config.items():
        # a switch that is on, or a table with entries; a number alone has no effect without its switch
        if option not in USED | WITHOUT_EFFECT | set(REFUSED) and (value is True or (_is_set(value) and _holds(value))):
            raise InputError(
                f"{source} uses PEFT's option '{str(option)[:60]}', which is unknown here, so its effect would be lost."
            )


def _is_set(value: Any) -> bool:
    return value not in (None, False, "none", "", 0, [], {}) if not isinstance(value, list | dict) else bool(value)


def _holds(value: Any) -> bool:
    return isinstance(value, list | dict)
