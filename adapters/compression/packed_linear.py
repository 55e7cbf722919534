"""A linear layer whose weight exists only packed in few bits: the product restores it and keeps nothing of its size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedLinear(nn.Linear):
    """y = x W'^T + bias with W' restored by :meth:`dequantise` for each product.

    It is an ``nn.Linear`` for whatever looks for linear layers, but its ``weight`` is None: what would write to it
    fails instead of doing nothing. Nothing of it learns; adapters act beside it.

    Args:
        shape: (out, in).
        buffers: the packed tensors by name; ``codes`` must be one of them, None is a part that is not there.
        bias: (out,), or None.
    """

    EXACT: ClassVar[tuple[str, ...]]
    """Buffers that keep their precision whatever ``to`` asks."""

    def __init__(self, shape: tuple[int, ...], buffers: Mapping[str, Tensor | None], bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.register_parameter("weight", None)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def reset_parameters(self) -> None:
        """Nothing to start at random."""

    @property
    def qweight(self) -> Tensor:
        """The packed codes, by the name where PEFT looks for the device of a quantised layer."""
        codes: Any = self.codes
        return codes

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W' (out, in)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear``, in the precision of x (of autocast, where that is on)."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y: Tensor = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves between devices; the buffers of :attr:`EXACT` keep their precision."""
        exact = {name: tensor for name in self.EXACT if (tensor := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self


class _Product(torch.autograd.Function):
    """x W'^T, keeping neither W' nor x: the backward pass restores W' again. The weight has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: PackedLinear) -> Tensor:
        ctx.module = module
        return F.linear(x, module.dequantise(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.module.dequantise(gradient.dtype), None
