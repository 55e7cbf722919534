"""The size of a linear layer, whatever class it has."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer of any kind: ``nn.Linear``, GPT-2's Conv1D, or a quantised one."""
    return isinstance(module, nn.Linear | Conv1D) or (hasattr(module, "in_features") and hasattr(module, "weight"))


def sizes(module: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer of any type (GPT-2's Conv1D stores the transpose of its weight).

    An embedding table has one input per token.
    """
    if hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)
    if isinstance(module, Conv1D | nn.Embedding):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return int(module.weight.shape[0]), int(module.weight[0].numel())
