"""Which layers of a language model get an adapter, and the PEFT configuration that puts them there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from adapters.errors import InputError
from adapters.layers.sizes import sizes
from studio.training.language import experts
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.schemas.speech import TrainSpeechConfig
from studio.training.schemas.vision_language import TrainVisionLanguageConfig
from studio.training.targets import check_ranks, no_match, peft_config

Chosen = TrainLanguageConfig | TrainVisionLanguageConfig | TrainSpeechConfig
"""Configurations that choose layers by the names of a language model."""

ATTENTION = (
    r"(q_proj|k_proj|v_proj|o_proj|out_proj|qkv_proj|Wqkv|c_attn|query_key_value|query|key|value|[qkv]_lin|out_lin|"
    r"attn\.c_proj|attention\.dense|attn\.dense|self_attn\.dense|attention\.output\.dense|attn\.Wo)"
)
HEADS = r"(.*\.)?(lm_head|embed_out|score|classifier|pre_classifier|pooler|cls|qa_outputs|vocab_\w+)(\..*)?"
"""Output layers, which 'linear' leaves out as other trainers do."""


def find_targets(model: nn.Module, config: Chosen, inside: str = "") -> list[str]:
    """Names of the layers of ``model`` that ``config`` chooses.

    Args:
        inside: only layers below the module of this name (the language model of a vision-language model).

    Raises:
        InputError: no layer matches (near names are shown), or a layer is smaller than its rank.
    """
    below = f"{inside}." if inside else ""
    layers = {n: module for n, module in model.named_modules() if _linear(module) and n.startswith(below)}
    if config.target_regex:
        chosen = [name for name in layers if re.fullmatch(config.target_regex, name)]
    else:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        inner = [name for name, module in layers.items() if module is not head and not re.fullmatch(HEADS, name)]
        wanted = rf"(.*\.)?{ATTENTION}" if config.targets == "attention" else r".*"
        chosen = [name for name in inner if re.fullmatch(wanted, name)]
    if config.exclude_regex:
        chosen = [name for name in chosen if not re.fullmatch(config.exclude_regex, name)]
    if not chosen:
        raise no_match(
            f"{inside} in {type(model).__name__}" if inside else type(model).__name__,
            config.target_regex or config.targets,
            config,
            list(layers),
        )
    return chosen


def layer_config(
    model: nn.Module, config: Chosen, fresh: Sequence[str] = (), task_type: str | None = None, inside: str = ""
) -> LoraConfig:
    """PEFT's configuration for ``model``; ``fresh`` modules learn as a whole, ``task_type`` is PEFT's."""
    targets = [name for name in find_targets(model, config, inside) if name not in fresh]
    conv1d = any(type(module).__name__ == "Conv1D" for module in model.modules())
    if getattr(config, "adalora_rank", 0):
        from adapters.learn.adalora import configuration

        made: LoraConfig = configuration(config, targets, task_type=task_type, modules_to_save=list(fresh) or None)
        check_ranks({name: sizes(model.get_submodule(name)) for name in targets}, made, config.rank)
        return made
    made = peft_config(
        config, targets, task_type=task_type, fan_in_fan_out=conv1d, modules_to_save=list(fresh) or None
    )  # fmt: skip
    check_ranks({name: sizes(model.get_submodule(name)) for name in targets}, made)
    return made


def add_adapter(
    model: Any, config: Chosen, fresh: Sequence[str] = (), task_type: str | None = None, inside: str = ""
) -> PeftModel:
    """``model`` with a new adapter in fp32; besides it only the ``fresh`` modules (a new head) learn."""
    method = getattr(config, "method", "lora")
    mixture, existing = method != "lora", experts.read(config, model) if experts.frozen(method) else []
    made: Any
    if existing:
        made = frozen_config(model, config, existing, fresh, task_type)
    else:
        made = (expert_config if mixture else layer_config)(model, config, fresh, task_type, inside)
    if config.quantization != "none":
        import peft

        prepare: Any = peft.prepare_model_for_kbit_training
        prepare(model, use_gradient_checkpointing=config.gradient_checkpointing)
    wrapped: Any = get_peft_model(model, made)
    if existing and not next(model.parameters()).is_meta:
        from adapters.layers.experts.xlora import fill

        fill(wrapped, existing)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped  # type: ignore[no-any-return]


def expert_config(
    model: nn.Module, config: Chosen, fresh: Sequence[str] = (), task_type: str | None = None, inside: str = ""
) -> PeftConfig:
    """The configuration of a mixture of experts on the same layers."""
    from adapters.layers.experts.presets import preset

    if config.use_rslora and config.use_dora:
        raise InputError("Experts are of one kind: switch use_rslora or use_dora off.")
    return preset(
        config.method, lambda name: getattr(config, name, None), task_type=task_type,
        target_modules=[name for name in find_targets(model, config, inside) if name not in fresh],
        modules_to_save=list(fresh) or None, r=config.rank, lora_alpha=config.alpha or config.rank,
        lora_dropout=config.dropout,
        expert_kind="dora" if config.use_dora else "rslora" if config.use_rslora else "lora",
    )  # fmt: skip


def frozen_config(
    model: nn.Module, config: Chosen, existing: Sequence[Any], fresh: Sequence[str] = (), task_type: str | None = None
) -> PeftConfig:
    """The configuration of an X-LoRA: its experts say which layers."""
    from adapters.layers.experts.xlora import config_for

    return config_for(
        model, existing, experts.options(config), task_type=task_type, modules_to_save=list(fresh) or None
    )


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
