"""Protocols of adapter layers: the tensors each kind is stored as, and the update they form.

Other forms in memory (experts, shared factors) offer the same; merging, gating, inspection and the file writers use
nothing of a layer beyond :class:`AdapterLayer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Ending = str | tuple[str, int]
"""The end of a key, alone or with how many of its characters belong to the module's name."""


class AdapterLayer(Protocol):
    """The adapter of one module, in memory."""

    @property
    def rank(self) -> int:
        """r, the number of columns of B."""

    @property
    def scale(self) -> float:
        """s, the factor of B A."""

    @property
    def size(self) -> int:
        """Number of parameters."""

    def delta(self) -> Tensor:
        """The update (out, in...) in fp32."""


@dataclass(frozen=True, eq=False)
class Factors:
    """A layer's update, without the scale.

    Attributes:
        A: (r, in), (r, in, kh, kw), or (r, in * kh * kw) where the file does not give the kernel size.
        B: (out, r) or (out, r, 1, 1).
        dim: the rank that divides alpha; 0 = none, and the scale is 1.
    """

    A: Tensor
    B: Tensor
    dim: int


class LayerKind(Protocol):
    """One way to store a layer.

    Attributes:
        name: the field's name for it.
        order: position among the kinds; lower comes first.
        beside: it accompanies another kind instead of standing alone (DoRA's magnitude).
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
        """The rank given by the shapes (by role); None if they do not give it."""

    def factors(self, parts: Mapping[str, Tensor]) -> Factors:
        """A and B; raises KeyError for a missing role and ValueError for shapes that do not fit."""
