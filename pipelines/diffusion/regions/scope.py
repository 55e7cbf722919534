"""The scope "cross": how much of an adapter is in the cross-attention layers, which are all it uses."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from adapters.errors import InputError
from adapters.formats import LoraFile
from pipelines.diffusion.regions.region import CROSS_LAYERS


def cross_part(file: LoraFile, component: str) -> set[str]:
    """The layers of an adapter that the scope "cross" uses."""
    return {name for name in file.parts.get(component, {}) if name.endswith(CROSS_LAYERS)}


def share_outside(file: LoraFile, component: str) -> float:
    """The share of an adapter's squared update norm that the scope "cross" leaves out."""
    inside = cross_part(file, component)
    sizes = {
        name: layer.scale**2 * _product_size(layer.A, layer.B) for name, layer in file.parts.get(component, {}).items()
    }
    total = sum(sizes.values())
    return 1 - sum(sizes[name] for name in inside) / total if total else 0.0


def check_scope(files: Mapping[str, LoraFile], component: str) -> list[str]:
    """Warnings about adapters (by name) that the scope "cross" hardly uses.

    Raises:
        InputError: an adapter without any cross-attention layer.
    """
    warnings = []
    for name, file in files.items():
        if not cross_part(file, component):
            raise InputError(
                f"'{name}' has no layer in cross-attention ({', '.join(CROSS_LAYERS)}), so the scope 'cross' would not "
                "use it: choose scope 'spatial' or the method 'activation'."
            )
        share = share_outside(file, component)
        if share > 0.5:
            warnings.append(
                f"{share:.0%} of '{name}' is outside cross-attention and left out by the scope 'cross'; scope "
                "'spatial' or the method 'activation' uses all of it."
            )
    return warnings


def _product_size(A: Tensor, B: Tensor) -> float:
    """|B A|_F^2 without computing the product."""
    down, up = A.float().flatten(1), B.float().flatten(1)
    return float(((down @ down.T) * (up.T @ up)).sum())
