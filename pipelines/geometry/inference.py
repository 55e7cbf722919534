"""Predictions for many pairs: each image is encoded once, pairs are decoded in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adapters.errors import InputError
from adapters.progress import Monitor, Progress, Silent, check
from pipelines.geometry.images import Photo
from pipelines.geometry.network import Encoded
from pipelines.geometry.pairs import Pair


@dataclass(frozen=True)
class Predictions:
    """Pointmaps of ``E`` ordered pairs, each view padded to the same number of pixels ``P``.

    Shapes: points1, points2 ``(E, P, 3)`` in the frame of the pair's first image; confidence1, confidence2 ``(E, P)``,
    0 in padding. ``sizes`` are (height, width) of the images; ``encodings`` is the number of images encoded.
    """

    sizes: tuple[tuple[int, int], ...]
    pairs: tuple[Pair, ...]
    points1: Tensor
    points2: Tensor
    confidence1: Tensor
    confidence2: Tensor
    encodings: int = 0

    def map1(self, edge: int) -> tuple[Tensor, Tensor]:
        """Pointmap ``(H, W, 3)`` and confidence ``(H, W)`` of an edge's first view."""
        return _shaped(self.points1[edge], self.confidence1[edge], self.sizes[self.pairs[edge][0]])

    def map2(self, edge: int) -> tuple[Tensor, Tensor]:
        """The same for the edge's second view."""
        return _shaped(self.points2[edge], self.confidence2[edge], self.sizes[self.pairs[edge][1]])

    def select(self, edges: Sequence[int]) -> Predictions:
        """Some of the edges, in the order given."""
        names = ("points1", "points2", "confidence1", "confidence2")
        chosen = {name: getattr(self, name)[list(edges)] for name in names}
        return replace(self, pairs=tuple(self.pairs[edge] for edge in edges), **chosen)

    def to(self, device: Any) -> Predictions:
        """Move the tensors."""
        names = ("points1", "points2", "confidence1", "confidence2")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def _shaped(points: Tensor, confidence: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    count = size[0] * size[1]
    return points[:count].unflatten(0, size), confidence[:count].unflatten(0, size)


def precision(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Autocast for encoder and decoders (the heads stay in fp32): ``auto`` is bf16 on GPUs that have it, else fp32."""
    if dtype == "auto":
        dtype = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if dtype == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])


@torch.no_grad()
def predict(
    network: nn.Module, photos: Sequence[Photo], pairs: Sequence[Pair], chunk: int = 8, dtype: str = "auto",
    monitor: Monitor | None = None,
) -> Predictions:  # fmt: skip
    """Pointmaps of all ``pairs``, in fp32 on the CPU.

    Args:
        network: a :class:`~pipelines.geometry.network.PointmapNetwork`, with or without an adapter around it.
        photos: the images that ``pairs`` index.
        chunk: pairs decoded together; only pairs of equal sizes share a chunk.
        dtype: as for :func:`precision`.
        monitor: receives progress and may cancel.

    Raises:
        InputError: no pairs, or pixels or predictions that are not finite.
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    monitor = monitor or Silent()
    if not pairs:
        raise InputError("There are no image pairs to predict.")
    device = next(network.parameters()).device
    encoded: list[Encoded] = []
    with precision(device, dtype):
        for number, photo in enumerate(photos):
            check(monitor)
            monitor.report(Progress("images", number, len(photos)))
            if not photo.pixels.isfinite().all():
                raise InputError(f"The picture '{photo.name}' holds values that are not finite.")
            encoded.append(network.encode(photo.pixels[None].to(device) * 2 - 1))  # type: ignore[operator]
    sizes = tuple(photo.size for photo in photos)
    room = max(h * w for h, w in sizes)
    count = len(pairs)
    out = [torch.zeros(count, room, 3), torch.zeros(count, room, 3), torch.zeros(count, room), torch.zeros(count, room)]
    done = 0
    for group in _chunks(pairs, sizes, chunk):
        check(monitor)
        sides = [
            Encoded(torch.cat([encoded[pairs[e][side]].tokens for e in group]), encoded[pairs[group[0]][side]].grid)
            for side in (0, 1)
        ]
        with precision(device, dtype):
            answers = network.decode(*sides)  # type: ignore[operator]
        for side, (points, confidence) in enumerate(answers):
            flat = points.flatten(1, 2).float().cpu()
            if not flat.isfinite().all():
                raise InputError("The network gave points that are not finite: its weights or the adapter are damaged.")
            out[side][group, : flat.shape[1]] = flat
            out[2 + side][group, : flat.shape[1]] = confidence.flatten(1).float().cpu()
        done += len(group)
        monitor.report(Progress("pairs", done, count))
    return Predictions(sizes, tuple(pairs), out[0], out[1], out[2], out[3], len(photos))


def _chunks(pairs: Sequence[Pair], sizes: Sequence[tuple[int, int]], chunk: int) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for edge, (i, j) in enumerate(pairs):
        groups.setdefault((sizes[i], sizes[j]), []).append(edge)
    return [group[k : k + chunk] for group in groups.values() for k in range(0, len(group), max(1, chunk))]
