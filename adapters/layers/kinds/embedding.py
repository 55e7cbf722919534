"""LoRA on an embedding table E (tokens, width), as PEFT writes it: the update s B A of E^T."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapters.layers.protocol import Factors

if TYPE_CHECKING:
    from torch import Tensor


class Embedding:
    """table_A (r, tokens), table_B (width, r)."""

    name, order, beside = "embedding", 20, False
    endings: Mapping[str, tuple[str, ...]] = {
        "table_A": (".lora_embedding_A", ".lora_embedding_A.default"),
        "table_B": (".lora_embedding_B", ".lora_embedding_B.default"),
    }

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        shape = shapes.get("table_A", ())
        return shape[0] if len(shape) == 2 else None

    def factors(self, parts: Mapping[str, Tensor]) -> Factors:
        A, B = parts["table_A"], parts["table_B"]
        if A.ndim != 2 or B.ndim != 2 or 0 in A.shape or A.shape[0] != B.shape[1]:
            raise ValueError("A must be (r, tokens) and B (width, r)")
        return Factors(A, B, A.shape[0])


KIND = Embedding()
