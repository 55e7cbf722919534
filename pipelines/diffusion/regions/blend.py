"""Regions at the output: one prediction per row, blended by the regions' shares on the latents (method ``output``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapters.layers.gated import Gates
from pipelines.diffusion.denoise import Denoising
from pipelines.diffusion.families import Encoding, Family
from pipelines.diffusion.methods.step import Step, TextAdapters
from pipelines.diffusion.regions.masks import Place, level


class Blending(Denoising):
    """The hooks of one run: the batch once per row (row-major), each with its strengths and text, blended into one.

    Args:
        family, gates, steps, adapter_batch: as for :class:`Denoising`.
        encodings: the encoding of row k is called ``(k,)``; the pipeline itself was given the background's.
        places: the regions' places.
        grid: height and width of the latents in cells (for Flux: in packed tokens).
    """

    def __init__(
        self,
        family: Family,
        gates: Gates,
        steps: Sequence[Step],
        encodings: Mapping[TextAdapters, Encoding],
        places: Sequence[Place],
        grid: tuple[int, int],
        adapter_batch: int | None = None,
    ) -> None:
        rows = list(range(len(places) + 1))
        texts = [[(row,) for row in rows]] * len(steps)
        super().__init__(family, gates, steps, texts, encodings, (0,), adapter_batch)
        self.shares = level(places, *grid, hard=False, device=torch.device("cpu")).shares
        self.used = [row for row in rows if bool((self.shares[row] > 0).any())]
        self.grid = grid

    def predictions(self, step: Step) -> list[int]:
        """The rows with a share of the picture."""
        return self.used

    def set_gates(self, step: Step, predictions: Sequence[int], batch: int) -> None:
        """Set row-major strengths for every sample."""
        rows = [step.rows[row] for row in predictions]
        if len(rows) == 1:
            self.gates.joint(rows[0])
        elif rows[0]:
            self.gates.per_sample(torch.tensor(rows).repeat_interleave(batch, 0))

    def reduce(self, predictions: Tensor) -> Tensor:
        """Blend a row-major batch: (rows * batch, ...) -> (batch, ...)."""
        rows = predictions.view(len(self.used), -1, *predictions.shape[1:])
        shares = self.shares[self.used].to(predictions)
        if predictions.ndim == 3:  # packed tokens (batch, cells, channels), then those of references
            cells = shares.shape[1]
            blended = (rows[:, :, :cells] * shares[:, None, :, None]).sum(0)
            return torch.cat([blended, rows[0, :, cells:]], 1) if rows.shape[2] > cells else blended
        # between the rows and the cells: batch, channels and, of videos, frames
        return (rows * shares.view(len(self.used), *[1] * (rows.ndim - 3), *self.grid)).sum(0)
