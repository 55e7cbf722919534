"""LoRA (arXiv 2106.09685), s B A; for convolutions also with a core between 1 x 1 kernels (LoCon's "lora_mid")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapters.layers.protocol import Ending, Factors

if TYPE_CHECKING:
    from torch import Tensor


class Lora:
    """A (r, in...), B (out, r...), mid (r, r, kh, kw)."""

    name, order, beside = "LoRA", 10, False
    endings: Mapping[str, tuple[Ending, ...]] = {
        "A": (
            ".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight",
            ("_lora1.down.weight", 6), ("_lora2.down.weight", 6), ".lora_linear_layer.down.weight",
        ),
        "B": (
            ".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight", "_lora.up.weight",
            ("_lora1.up.weight", 6), ("_lora2.up.weight", 6), ".lora_linear_layer.up.weight",
        ),
        "mid": (".lora_mid.weight",),
    }  # fmt: skip

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        shape = shapes.get("A", ())
        return shape[0] if len(shape) in (2, 4) else None

    def factors(self, parts: Mapping[str, Tensor]) -> Factors:
        import torch

        A, B = parts["A"], parts["B"]
        if A.ndim not in (2, 4) or B.ndim not in (2, 4) or 0 in (*A.shape, *B.shape):
            raise ValueError("A and B must be matrices or kernels that are not empty")
        if B.ndim == 4 and B.shape[2:] != (1, 1):
            raise ValueError("the kernel of B must be 1 x 1")
        dim = A.shape[0]
        if "mid" in parts:
            core = parts["mid"]
            if core.ndim != 4 or core.shape[:2] != (B.shape[1], dim) or A.ndim != 4 or A.shape[2:] != (1, 1):
                raise ValueError("a core must stand between 1 x 1 kernels of its own rank")
            A = torch.einsum("jnab,ijhw->inhw", A.float(), core.float())
        if A.shape[0] != B.shape[1]:
            raise ValueError("A must have as many rows as B has columns")
        return Factors(A, B, dim)


KIND = Lora()
