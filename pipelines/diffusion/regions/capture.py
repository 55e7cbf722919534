"""Capturing attention maps during a forward pass of a UNet, which stops as soon as all are captured.

    cross  M_i(cell, token) = mean over layers and heads of softmax over all tokens (Q K_i^T / sqrt d)
    self   S(cell, cell)    = mean over layers and heads of softmax over all cells (Q K^T / sqrt d), after isolation

Only the layers on one grid are captured (LoRA-Composer: latents / 4). Later layers are not needed for the maps or their
gradients, so the pass ends after the last of them: in Stable Diffusion 1.5 the two finest up blocks never run. Maps are
in fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from adapters.errors import InputError
from pipelines.diffusion.regions.unet import RegionalUNet, in_heads, ordered_blocks

OFFICIAL = 4
"""LoRA-Composer reads attention where the latents are this many times smaller."""

FEWEST = 8
"""Fewer cells per side than this are too coarse to separate subjects: a finer grid is used instead (ours)."""


class Captured(Exception):
    """Ends a forward pass once all maps are captured."""


class Capture:
    """The maps of one forward pass.

    Args:
        run: the run, which has the keys of every row's text.
        layers: paths of the transformer blocks to capture.
        rows: the rows of text to capture (0 is the background, regions start at 1).
        with_self: also capture self-attention.
        stop: end the pass after the last layer (with :class:`Captured`).
        last: number of samples to capture, from the end of the batch; 0 = all.
    """

    def __init__(
        self,
        run: RegionalUNet,
        layers: Collection[str],
        rows: Sequence[int],
        with_self: bool = False,
        stop: bool = True,
        last: int = 0,
    ) -> None:
        self.run, self.layers, self.rows, self.with_self, self.stop = run, set(layers), list(rows), with_self, stop
        self.last = last
        self._cross: list[Tensor] = []
        self._self: list[Tensor] = []

    def cross(self, name: str, attn: Any, query: Tensor) -> None:
        """Called by every cross-attention with its queries (batch, cells, width)."""
        if name not in self.layers:
            return
        queries = in_heads(query[-self.last :], attn.heads).float()
        keys = torch.stack([self.run.text_keys(name, row) for row in self.rows]).float()  # (rows, heads, tokens, width)
        scores = torch.einsum("bhcd,rhtd->brhct", queries, keys) * attn.scale
        self._cross.append(scores.softmax(-1).mean(2))
        if self.stop and len(self._cross) == len(self.layers):
            raise Captured

    def self_(self, name: str, attn: Any, query: Tensor, key: Tensor, allowed: Tensor | None) -> None:
        """Called by every self-attention with queries and keys (batch, heads, cells, width)."""
        if not self.with_self or name not in self.layers:
            return
        scores = query.float() @ key.float().transpose(-1, -2) * attn.scale
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        self._self.append(scores.softmax(-1).mean(1))

    def cross_maps(self) -> Tensor:
        """M (batch, rows, cells, tokens)."""
        return torch.stack(self._cross).mean(0)

    def self_maps(self) -> Tensor:
        """S (batch, cells, cells)."""
        return torch.stack(self._self).mean(0)


@contextmanager
def capturing(run: RegionalUNet, capture: Capture) -> Iterator[None]:
    """Inside, ``run`` captures maps, for conditional-only passes."""
    halves = run.halves
    run.capture, run.halves = capture, ("positive",)
    try:
        yield
    finally:
        run.capture, run.halves = None, halves


def maps(run: RegionalUNet, capture: Capture, sample: Tensor, arguments: dict[str, Any]) -> Capture:
    """Run one conditional-only forward pass (or as much of it as the maps need); returns ``capture``.

    Args:
        sample: the scaled latents (batch, 4, height, width).
        arguments: timestep, text and conditions of the positive half.
    """
    run.prepare(sample)
    with capturing(run, capture), suppress(Captured):
        run.unet.forward(sample, **arguments, return_dict=False)
    return capture


def factors(unet: nn.Module) -> dict[str, int]:
    """Path of each transformer block -> factor by which its grid is smaller than the latents."""
    depth = len(unet.down_blocks)  # type: ignore[arg-type]
    made = {}
    for name in ordered_blocks(unet):
        part, _, rest = name.partition(".")
        number = int(rest.partition(".")[0]) if part != "mid_block" else depth - 1
        made[name] = 2 ** (depth - 1 - number if part == "up_blocks" else number)
    return made


def capture_factor(unet: nn.Module, grid: tuple[int, int], wanted: int | None) -> int:
    """The grid to capture, as the factor by which it is smaller than the latents; ``wanted`` None = chosen by size.

    Raises:
        InputError: there is no cross-attention at the wanted factor.
    """
    there = sorted(set(factors(unet).values()))
    if wanted is not None:
        if wanted not in there:
            raise InputError(
                f"capture {wanted}: this model has cross-attention where the latents are {', '.join(map(str, there))} "
                "times smaller."
            )
        return wanted
    enough = [factor for factor in there if factor <= OFFICIAL and min(grid) // factor >= FEWEST]
    return max(enough, default=there[0])
