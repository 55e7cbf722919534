"""A full weight difference D, as written by programs that do not factor it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapters.layers.products import check_size, whole
from adapters.layers.protocol import Factors

if TYPE_CHECKING:
    from torch import Tensor


class Difference:
    """diff (out, in) or (out, in, kh, kw)."""

    name, order, beside = "difference", 50, False
    endings: Mapping[str, tuple[str, ...]] = {"diff": (".diff",)}

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        return None

    def factors(self, parts: Mapping[str, Tensor]) -> Factors:
        change = parts["diff"].float()
        if change.ndim not in (2, 4) or 0 in change.shape:
            raise ValueError("only the weights of linear layers and convolutions can be composed")
        check_size(change.shape[0], change[0].numel(), min(change.shape[0], change[0].numel()))
        return whole(change.flatten(1), tuple(change.shape[2:]), 0)


KIND = Difference()
