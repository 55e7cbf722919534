"""The cost of a reconstruction, estimated before it starts: memory by arithmetic, time by a short measurement."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from pipelines.geometry.network import NetworkConfig, PointmapNetwork

ALIGNMENT_BYTES = 385
"""Memory of the alignment per pixel of an ordered pair, with gradients, measured by ``benchmarks.geometry_size``."""


@dataclass(frozen=True)
class Estimate:
    """The expected cost.

    Attributes:
        pairs: ordered pairs.
        parameters: of the network.
        memory: peak, in bytes.
        network_seconds, alignment_seconds, training_seconds: of the predictions, the alignment and the calibration.
    """

    pairs: int
    parameters: int
    memory: int
    network_seconds: float
    alignment_seconds: float
    training_seconds: float

    def __str__(self) -> str:
        text = f"{self.pairs} ordered pairs, about {self.memory / 1e9:.1f} GB; network {self.network_seconds:.0f} s"
        text += f", alignment {self.alignment_seconds:.0f} s" if self.alignment_seconds else ""
        return text + (f", calibration {self.training_seconds:.0f} s more" if self.training_seconds else "")


def flops(config: NetworkConfig, height: int, width: int) -> tuple[float, float]:
    """Floating point operations to encode one image and to decode one ordered pair (matrix products only)."""
    tokens = height * width / config.patch_size**2
    e, d = config.enc_embed_dim, config.dec_embed_dim
    inner = 2 * config.mlp_ratio
    encode = config.enc_depth * (2 * tokens * e * e * (4 + inner) + 4 * tokens * tokens * e)
    decode = 2 * config.dec_depth * (2 * tokens * d * d * (8 + inner) + 8 * tokens * tokens * d)
    if config.head_type == "dpt":  # two full-resolution convolutions outweigh everything else in the head
        decode += 2 * 2 * height * width * 9 * (128 * 128 + 256 * 128 / 4 + 5 * 256 * 256 / 16)
    else:
        decode += 2 * 2 * tokens * d * 4 * config.patch_size**2
    return encode, decode


def speed(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Floating point operations per second of matrix products: the best of several, to exclude other programs' load."""
    size = 2048 if device.type == "cuda" else 384
    a = torch.randn(size, size, device=device, dtype=dtype)
    best, end = math.inf, time.perf_counter() + 0.05
    for count in range(40):
        begun = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        best = min(best, now - begun)
        if count > 4 and now > end:
            break
    return 2 * size**3 / best


def alignment_pace(device: torch.device) -> float:
    """Seconds per step of the alignment and pixel of an ordered pair, for distances and their gradients."""
    count = 2**15
    world = torch.randn(2, count, 3, device=device, requires_grad=True)
    points, turn = torch.randn(2, count, 3, device=device), torch.eye(3, device=device, requires_grad=True)
    best = math.inf
    for _ in range(5):
        begun = time.perf_counter()
        apart = world - (2 * (points @ turn.mT) + 1)
        ((apart * apart).sum(-1) + 1e-18).sqrt().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return best / count


def estimate(
    config: NetworkConfig, images: int, pairs: int, height: int, width: int, device: torch.device, chunk: int = 8,
    epochs: int = 0, steps: int = 0,
) -> Estimate:  # fmt: skip
    """The cost of ``pairs`` ordered pairs of ``images`` pictures of ``height`` x ``width`` pixels.

    Memory is the weights in fp32 and the largest of three stages: cached tokens, predictions and one chunk's
    activations; the alignment; a training step.

    Args:
        chunk: pairs decoded together.
        epochs: of the calibration; 0 = none.
        steps: of the alignment; 0 = none.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in PointmapNetwork(config).parameters())
    tokens = height * width // config.patch_size**2
    cache = images * tokens * config.enc_embed_dim * 4
    head = 256 * (height // 2) * (width // 2) * 3 if config.head_type == "dpt" else 8 * height * width
    work = chunk * 2 * 4 * (head + tokens * config.dec_embed_dim * (config.dec_depth + 12))
    kept = pairs * height * width * 32
    aligned = pairs * height * width * ALIGNMENT_BYTES if steps else 0
    train = (
        2
        * 2
        * tokens
        * 4
        * (config.enc_embed_dim * config.enc_depth * 14 + config.dec_embed_dim * config.dec_depth * 36)
    )
    encode, decode = flops(config, height, width)
    pace = speed(device, torch.bfloat16 if device.type == "cuda" else torch.float32) * 0.5
    seconds = (images * encode + pairs * decode) / pace
    training = epochs * pairs * (2 * encode + decode) * 3 / pace
    memory = parameters * 4 + max(cache + kept + work, aligned, kept + train if epochs else 0)
    # Gathering the views, cameras and Adam take as long again: 93 ns instead of 48 in benchmarks.geometry_size.
    aligning = 2 * steps * pairs * height * width * alignment_pace(device) if steps else 0.0
    return Estimate(pairs, parameters, memory, seconds, aligning, training)
