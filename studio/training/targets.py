"""PEFT's configuration of a training's adapter, and checks of its layers, for any kind of model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig

from adapters.errors import InputError
from adapters.initialise.plain import in_peft


def peft_config(config: Any, targets: Sequence[str], **other: Any) -> LoraConfig:
    """PEFT's configuration of the adapter that a training asks for.

    Args:
        config: an :class:`~studio.training.schemas.base.AdapterTrainConfig` with methods.
        targets: names of the layers.
        other: values to add or override.
    """
    values = {
        "r": config.rank, "lora_alpha": config.alpha or config.rank, "lora_dropout": config.dropout,
        "target_modules": list(targets), "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern), "use_rslora": config.use_rslora, "use_dora": config.use_dora,
        "init_lora_weights": in_peft(config.init),
    }  # fmt: skip
    return LoraConfig(**values | other)


def check_ranks(sizes: Mapping[str, tuple[int, int]], made: LoraConfig, common: int = 0) -> None:
    """Refuse ranks too large for a layer.

    Args:
        sizes: layer -> (outputs, inputs) of its weight as a matrix.
        made: the configuration with the rank and the ranks by pattern.
        common: the rank, where the configuration has another word for it; 0 = its r.

    Raises:
        InputError: a rank above the smaller side, or an odd one for the orthogonal start.
    """
    patterns = made.rank_pattern or {}
    for name, (outputs, inputs) in sizes.items():
        rank = next((r for key, r in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), common or made.r)
        limit = min(outputs, inputs)
        if rank > limit:
            raise InputError(
                f"Rank {rank} is larger than the layer '{name}' ({outputs} x {inputs}): use at most {limit}, or leave "
                "the layer out with exclude_regex."
            )
        if made.init_lora_weights == "orthogonal" and rank % 2:
            raise InputError(f"The orthogonal init needs even ranks, '{name}' has {rank}.")


def no_match(model: str, pattern: str, config: Any, names: Sequence[str]) -> InputError:
    """The error that no layer of ``model`` matches ``pattern``, with the nearest names."""
    tried = f"target_regex '{config.target_regex}'" if config.target_regex else f"targets '{config.targets}'"
    plain = re.sub(r"[\\^$.*+?()\[\]{}|]+", ".", pattern).strip(".")
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.3) or names[:3]
    return InputError(f"No layer of {model} matches {tried}; it has layers such as {', '.join(near)}.")
