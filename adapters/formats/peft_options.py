"""What PEFT's options say of an adapter's tensors: used, without effect on a finished adapter, or refused by name.

A LoRA here is  y = W0 x + s B A x  on the base as it stands, everywhere and at any strength. An option that makes the
adapter something else cannot be left out silently: the same tensors would then mean another model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapters.errors import InputError

KINDS = ("LORA", "LOHA", "LOKR")
"""PEFT's methods that are read."""

WITHOUT_EFFECT = frozenset({
    # which base, which task, who wrote it
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    # which modules were chosen: the tensors name them
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    # training alone
    "lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "eva_config", "corda_config",
    "loftq_config", "lora_ga_config", "velora_config", "init_weights", "runtime_config",
    # how the base keeps its weights: A and B are the same either way
    "fan_in_fan_out",
    # which factors LoHa and LoKr have: the tensors show it
    "use_effective_conv2d", "decompose_both", "decompose_factor", "use_upstream",
    # parameters of options that are refused themselves
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
    "(alora_invocation_tokens), and here an adapter acts everywhere",
    "layer_replication": "belongs to a model whose layers are repeated (layer_replication), not to the base as it is",
    "target_parameters": "adapts bare parameters (target_parameters), not modules",
    "use_qalora": "is a QA-LoRA, whose A reads groups of inputs (use_qalora)",
    "use_bdlora": "is a BD-LoRA, whose factors are blocks (use_bdlora)",
    "kasa_config": "is a KaSA adapter: the base was cut to its larger singular values at the start (kasa_config)",
    "monteclora_config": "is a MonteCLoRA, whose weights are drawn at random (monteclora_config)",
    "arrow_config": "routes every token to other adapters (arrow_config)",
    "megatron_config": "belongs to a model in Megatron's parallel layers (megatron_config)",
    "ensure_weight_tying": "is tied over several modules (ensure_weight_tying), and its tensors name only one",
}
"""Option -> what the adapter is or does with it."""

CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")
"""Starts (``init_lora_weights``) that take A and B out of the base's weights: the file fits only the changed base."""


def kind_of(config: Mapping[str, Any]) -> str:
    """PEFT's name of the method."""
    return str(config.get("peft_type") or "LORA").rpartition(".")[2].upper()


def check_options(config: Mapping[str, Any], source: str) -> None:
    """Refuse what is no LoRA, DoRA, LoHa or LoKr on the untouched base.

    Raises:
        InputError: another method, an option that makes the adapter something else, or one that is not known.
    """
    kind = kind_of(config)
    if kind not in KINDS:
        raise InputError(f"{source} holds a {kind} adapter; of PEFT's methods {', '.join(KINDS)} are read.")
    for option, value in config.items():
        if option in REFUSED and _is_set(value):
            raise InputError(f"{source} {REFUSED[option].format(value=value)}.")
    start = str(config.get("init_lora_weights") or "").lower()
    if CHANGES_BASE.match(start):
        raise InputError(
            f"{source} was started by {start} and belongs to a base whose weights were changed at the start: save it "
            "as an ordinary LoRA first (save_pretrained of PEFT with path_initial_model_for_weight_conversion)."
        )
    for option, value in config.items():
        # a switch that is on, or a table that is filled; a number alone says nothing without its switch
        if option not in USED | WITHOUT_EFFECT | set(REFUSED) and (value is True or (_is_set(value) and _holds(value))):
            raise InputError(
                f"{source} uses PEFT's option '{str(option)[:60]}', which is not known here: what it does to the "
                "adapter cannot be kept."
            )


def _is_set(value: Any) -> bool:
    return value not in (None, False, "none", "", 0, [], {}) if not isinstance(value, list | dict) else bool(value)


def _holds(value: Any) -> bool:
    return isinstance(value, list | dict)
