"""The size of a linear layer, whatever class it has."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer of any kind: ``nn.Linear``, GPT-2's Conv1D, or a quantised one."""
    return isinstance(module, nn.Linear | Conv1D) or (hasattr(module, "in_features") and hasattr(module, "weight"))


def device_of(module: nn.Module) -> torch.device:
    """Where the module's numbers are; packed weights are buffers."""
    return next(chain(module.parameters(), module.buffers())).device


def sizes(module: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer of any type (GPT-2's Conv1D stores the transpose of its weight).

    An embedding table has one input per token.
    """
    if hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)
    if isinstance(module, Conv1D | nn.Embedding):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return int(module.weight.shape[0]), int(module.weight[0].numel())
