"""Ways to compute y_t += B_a A_a x_t for the tokens of a group, all with the same result.

    reference   adapter by adapter, as the formula reads
    torch       all adapters of a group in one batched product (decoding), or one grouped product (prompts)
    triton      two kernels that read the pages where they are, without copying them together first

``auto`` is triton on a CUDA device where it is installed, else torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

from adapters.errors import InputError, MissingDependencyError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from adapters.serving.dispatch import Group
    from adapters.serving.pool import PagePool

Kernel = Callable[["Tensor", "Tensor", "Group", "PagePool"], None]
"""(x (T, in), y (T, out) to add to in place, group, pool)."""

BACKENDS = ("auto", "torch", "triton", "reference")


def kernel(backend: str, device: torch.device) -> Kernel:
    """The function of this name.

    Raises:
        InputError: there is none of this name.
        MissingDependencyError: triton is asked for, but is not installed.
    """
    if backend not in BACKENDS:
        raise InputError(f"There is no backend '{backend}'{nearest(backend, BACKENDS)}: use one of "
                         f"{', '.join(BACKENDS)}.")  # fmt: skip
    installed = importlib.util.find_spec("triton") is not None
    if backend == "triton" or (backend == "auto" and installed and device.type == "cuda"):
        if not installed:
            raise MissingDependencyError("triton", "triton", "The backend 'triton'")
        from adapters.serving.kernels.with_triton import add

        return add
    if backend == "reference":
        from adapters.serving.kernels.reference import add
    else:
        from adapters.serving.kernels.batched import add
    return add
