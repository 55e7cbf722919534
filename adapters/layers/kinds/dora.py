"""DoRA (arXiv 2402.09353): a magnitude m (out,) with another kind,  y = m / |W0 + s B A| (W0 + s B A) x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapters.errors import InputError
from adapters.layers.protocol import Factors

if TYPE_CHECKING:
    from torch import Tensor


class Dora:
    """magnitude (out,) or (1, out, 1, 1) of PEFT; dora_scale (out, 1...) of kohya and LyCORIS."""

    name, order, beside = "DoRA", 60, True
    endings: Mapping[str, tuple[str, ...]] = {
        "magnitude": (
            ".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lora_magnitude_vector.default",
            ".lora_magnitude_vector.default.weight",
        ),
        "dora_scale": (".dora_scale",),
    }  # fmt: skip

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        return None

    def factors(self, parts: Mapping[str, Tensor]) -> Factors:
        raise ValueError("a magnitude needs the factors of another kind")


KIND = Dora()


def magnitude(parts: Mapping[str, Tensor], outputs: int, name: str, source: str) -> Tensor | None:
    """m (out,) in fp32, or None without DoRA.

    Raises:
        InputError: the number of magnitudes is not ``outputs``.
    """
    if "magnitude" not in parts and "dora_scale" not in parts:
        return None
    found = parts["magnitude" if "magnitude" in parts else "dora_scale"]
    # kohya and LyCORIS write (out, 1) or, with one number per input, (1, in)
    per_input = "dora_scale" in parts and found.ndim > 1 and found.shape[0] == 1 and found.numel() > 1
    if per_input or found.numel() != outputs:
        raise InputError(
            f"{source}: the DoRA magnitude of '{name}' has shape {tuple(found.shape)} for {outputs} outputs; only "
            "magnitudes per output are supported (older LyCORIS and OneTrainer files have one per input)."
        )
    return found.flatten().float()
