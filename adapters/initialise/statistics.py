"""Statistics for data-driven initialisations: gradients of weights and second moments of inputs.

The base stays frozen and may be quantised: one hook keeps a layer's input x, another receives delta = dL/dy, and
delta^T x is the gradient of the weight. Sums are in fp32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from transformers.pytorch_utils import Conv1D

from adapters.errors import InputError

Closure = Callable[[], Tensor]
"""Computes the mean loss of one batch, with gradients."""


def capture_gradients(layers: Mapping[str, nn.Module], losses: Iterable[Closure], count: int) -> dict[str, Tensor]:
    """Mean over ``count`` batches of dL/dW: name -> G (out, in * kernel), fp32, on the CPU.

    Args:
        layers: the frozen modules (Linear, Conv1D, Conv2d or quantised Linear) by name.
        losses: one closure per batch; at least ``count``.

    Raises:
        InputError: fewer batches than ``count``, a layer of another type, or one without a gradient (names listed).
    """
    _check_types(layers)
    total: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, x: Tensor, delta: Tensor) -> None:
        found = weight_gradient(module, x, delta).cpu()
        total[name] = total[name] + found if name in total else found

    with _watched(layers, keep):
        done = 0
        for closure in losses:
            with torch.enable_grad():
                closure().backward()
            done += 1
            if done == count:
                break
    if done < count:
        raise InputError(f"init needs {count} batches, but there are only {done}: set init_batches to {done}.")
    missing = [name for name in layers if name not in total]
    if missing:
        raise InputError(
            f"{len(missing)} layers got no gradient ({', '.join(missing[:5])}): they do not contribute to the loss; "
            "leave them out of the targets."
        )
    return {name: gradient / count for name, gradient in total.items()}


def capture_squares(layers: Mapping[str, nn.Module], losses: Iterable[Closure]) -> dict[str, Tensor]:
    """Mean over samples of (dL/dW)^2, the diagonal of the empirical Fisher information: name -> (out, in * kernel).

    Args:
        layers: as for :func:`capture_gradients`.
        losses: one closure per *sample*: of a batch, only the square of its mean gradient could be had.

    Raises:
        InputError: no samples, a layer of another type, or one without a gradient (names listed).
    """
    _check_types(layers)
    total: dict[str, Tensor] = {}
    one: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, x: Tensor, delta: Tensor) -> None:
        found = weight_gradient(module, x, delta).cpu()
        one[name] = one[name] + found if name in one else found

    done = 0
    with _watched(layers, keep):
        for closure in losses:
            with torch.enable_grad():
                closure().backward()
            for name, gradient in one.items():
                if name in total:
                    total[name].addcmul_(gradient, gradient)
                else:
                    total[name] = gradient.square()
            one.clear()
            done += 1
    missing = [name for name in layers if name not in total]
    if not done or missing:
        raise InputError(
            f"{len(missing)} layers got no gradient ({', '.join(missing[:5])}): give rows in which there is something "
            "to learn."
        )
    return {name: square.div_(done) for name, square in total.items()}


@torch.no_grad()
def capture_moments(
    layers: Mapping[str, nn.Module], losses: Iterable[Closure], count: int, scaled: bool = False
) -> dict[str, Tensor]:
    """Mean over batches of X^T X of the layers' inputs: name -> (in * kernel, in * kernel), fp32, on the CPU.

    Args:
        scaled: divide the inputs of each call by the absolute value of their largest entry (CorDA).

    Raises:
        InputError: fewer batches than ``count``, a layer of another type, or one that was never called.
    """
    _check_types(layers)
    total: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            rows = input_rows(module, args[0])
            if scaled:
                rows = rows / rows.max().abs().clamp_min(torch.finfo(rows.dtype).tiny)
            found = (rows.T @ rows).cpu()
            total[name] = total[name] + found if name in total else found

        return see

    handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
    done = 0
    try:
        for closure in losses:
            closure()
            done += 1
            if done == count:
                break
    finally:
        for handle in handles:
            handle.remove()
    if done < count:
        raise InputError(f"init needs {count} batches, but there are only {done}: set init_batches to {done}.")
    missing = [name for name in layers if name not in total]
    if missing:
        raise InputError(
            f"{len(missing)} layers are never called ({', '.join(missing[:5])}): leave them out of the targets."
        )
    return {name: moment / count for name, moment in total.items()}


@torch.no_grad()
def weight_gradient(module: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
    """dL/dW (out, in * kernel) in fp32 (or x's higher precision) from a layer's input and its output's gradient."""
    precise = torch.promote_types(x.dtype, torch.float32)
    x, delta = x.to(precise), delta.to(precise)
    if isinstance(module, nn.Conv2d):
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        found = conv2d_weight(x, shape, delta, module.stride, module.padding, module.dilation, module.groups)
        return found.flatten(1)
    return delta.flatten(0, -2).T @ x.flatten(0, -2)


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """The inputs of a layer as rows (positions, in * kernel), fp32 or higher; for a convolution, its patches."""
    precise = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(module, nn.Conv2d):
        if isinstance(module.padding, str):
            raise InputError(f"Convolutions with padding '{module.padding}' cannot be measured patch by patch.")
        patches = F.unfold(precise, module.kernel_size, module.dilation, module.padding, module.stride)
        return patches.transpose(1, 2).flatten(0, 1)
    return precise.flatten(0, -2)


@contextmanager
def _watched(layers: Mapping[str, nn.Module], keep: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, the backward pass calls ``keep(name, module, input, gradient of the output)`` for each layer's call."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0].detach()
            if output.requires_grad:
                output.register_hook(lambda delta: keep(name, module, x, delta))
                return output
            leaf = output.detach().requires_grad_()  # everything before it is frozen: the graph begins here
            leaf.register_hook(lambda delta: keep(name, module, x, delta))
            return leaf.clone()

        return see

    handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_types(layers: Mapping[str, nn.Module]) -> None:
    strange = [
        f"{name} ({type(module).__name__})"
        for name, module in layers.items()
        if isinstance(module, nn.Embedding)
        or not (isinstance(module, nn.Linear | nn.Conv2d | Conv1D) or hasattr(module, "in_features"))
    ]
    if strange:
        raise InputError(
            f"This init supports linear layers and 2-d convolutions, not {', '.join(strange[:5])}: "
            "leave those out of the targets."
        )
