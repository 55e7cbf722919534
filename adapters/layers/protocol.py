"""What every kind of adapter layer offers: the tensors that it is written with, and the update that they make.

Other forms in memory (experts, shared factors) say the same things of themselves; merging, gating, inspection and the
writers of files ask a layer for nothing else than :class:`AdapterLayer` names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Ending = str | tuple[str, int]
"""The end of a key, or that and how many of its characters belong to the module's name."""


class AdapterLayer(Protocol):
    """The adapter of one module, in memory."""

    @property
    def rank(self) -> int:
        """Columns of B."""

    @property
    def scale(self) -> float:
        """s."""

    @property
    def size(self) -> int:
        """How many numbers it holds."""

    def delta(self) -> Tensor:
        """The update (out, in...) in fp32."""


@dataclass(frozen=True, eq=False)
class Factors:
    """A layer's update.

    Attributes:
        A: (r, in), (r, in, kh, kw), or (r, in * kh * kw) where the file does not tell the kernel.
        B: (out, r) or (out, r, 1, 1).
        dim: the rank that alpha is divided by; 0 = there is none and the scale is 1.
    """

    A: Tensor
    B: Tensor
    dim: int


class LayerKind(Protocol):
    """One way to write a layer.

    Attributes:
        name: what people call it.
        order: place among the kinds.
        beside: it stands beside another kind instead of for itself (DoRA's magnitude).
        endings: role of a tensor -> what its key may end in.
    """

    @property
    def name(self) -> str: ...

    @property
    def order(self) -> int: ...

    @property
    def beside(self) -> bool: ...

    @property
    def endings(self) -> Mapping[str, Sequence[Ending]]: ...

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """The rank that the shapes (by role) tell; None where they do not."""

    def factors(self, parts: Mapping[str, Tensor]) -> Factors:
        """A and B; raises KeyError for a role that is missing and ValueError for shapes that do not fit."""
