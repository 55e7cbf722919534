"""One denoising step as a composition method plans it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One denoising step.

    Attributes:
        gates: strength of every adapter, in order; 0 = not used in this step.
        separate: True = one prediction per used adapter, then their mean; False = all used adapters in one prediction.
        rows: with regions, the strengths outside all regions, then those inside each; ``gates`` is then the largest
            strength of each adapter, and ``separate`` means one prediction per row.
    """

    gates: tuple[float, ...]
    separate: bool = False
    rows: tuple[tuple[float, ...], ...] = ()

    @property
    def active(self) -> tuple[int, ...]:
        """The adapters used in this step."""
        return tuple(i for i, gate in enumerate(self.gates) if gate != 0)

    @property
    def forwards(self) -> int:
        """Predictions of the denoiser per picture and guidance half."""
        return max(1, len(self.rows or self.active)) if self.separate else 1


Strengths = tuple[tuple[float, ...], ...]
"""strengths[k][i]: weight times schedule of adapter i at step k."""

TextAdapters = tuple[int, ...]
"""The adapters whose text encoder LoRAs are active in an encoding."""
