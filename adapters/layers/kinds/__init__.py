"""Kinds of layers as files write them: one file each says which tensors a kind has and what update they make.

    LoRA         s B A
    with core    s B (C * A)              C (r, r, kh, kw) between 1 x 1 kernels ("lora_mid", Tucker), folded into A
    LoHa         s (B1 A1) o (B2 A2)      arXiv 2108.06098; rank r1 r2: columns B1[:, i] o B2[:, j], rows A1[i] o A2[j]
    LoKr         s W1 (x) W2              arXiv 2309.14859; (B1 A1) (x) (B2 A2) = (B1 (x) B2) (A1 (x) A2)
    embedding    s B A                    of a table E (tokens, width), seen as the matrix E^T that one-hot tokens meet
    difference   D                        a whole matrix
    DoRA         m beside any of these    arXiv 2402.09353

Each becomes A and B exactly. A factored form whose rank reaches min(out, in) is kept as the whole matrix beside an
identity, which costs less and is exact too. The scale s is alpha / r of the written factors; it is 1 where no alpha is
written, or nothing is factored. A module here with a constant ``KIND`` is a kind; importing loads no torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from adapters.errors import InputError
from adapters.layers.protocol import Factors, LayerKind

if TYPE_CHECKING:
    from torch import Tensor

ALPHA = "alpha"
"""The role of the numerator of the scale, which every kind may have."""


@cache
def _discovered() -> tuple[LayerKind, ...]:
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return tuple(sorted((module.KIND for module in modules), key=lambda kind: kind.order))


KINDS: tuple[LayerKind, ...] = _discovered()
"""Every kind, in the order in which a layer is asked for them."""

_ENDINGS = {
    ending: (role, kept)
    for kind in KINDS
    for role, endings in kind.endings.items()
    for ending, kept in ((written, 0) if isinstance(written, str) else written for written in endings)
} | {".alpha": (ALPHA, 0)}
_BY_LENGTH = sorted({len(ending) for ending in _ENDINGS}, reverse=True)


def split_role(key: str) -> tuple[str, str] | None:
    """``(module with its prefix, role)`` of a key, or None if it is not an adapter's key."""
    for length in _BY_LENGTH:
        found = _ENDINGS.get(key[-length:])
        if found is not None and len(key) > length:
            return key[: len(key) - length + found[1]], found[0]
    return None


def kinds_of(roles: frozenset[str] | set[str]) -> list[LayerKind]:
    """The kinds whose tensors are among ``roles``."""
    return [kind for kind in KINDS if any(role in roles for role in kind.endings)]


def factors(parts: Mapping[str, Tensor], name: str, source: str) -> Factors:
    """A and B of what ``parts`` (role -> tensor) say.

    Raises:
        InputError: parts missing, parts of two kinds, shapes that do not multiply, or products that are not finite.
    """
    kinds = [kind for kind in kinds_of(set(parts)) if not kind.beside]
    if len(kinds) > 1:
        names = ", ".join(kind.name for kind in kinds)
        raise InputError(f"{source}: layer '{name}' is written in two forms at once ({names}).")
    for role, tensor in parts.items():
        if role != ALPHA and not tensor.is_floating_point():
            raise InputError(f"{source}: layer '{name}' holds {tensor.dtype} numbers; adapters are floating point.")
    if not kinds:
        found = ", ".join(sorted(parts))
        raise InputError(f"{source}: the layer '{name}' has {found} and nothing that it belongs to.")
    try:
        made = kinds[0].factors(parts)
    except InputError:
        raise
    except KeyError as missing:
        raise InputError(f"{source}: the {kinds[0].name} layer '{name}' has no {missing.args[0]}.") from None
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in parts.items())
        reason = str(error).splitlines()[0]
        raise InputError(f"{source}: the parts of layer '{name}' do not fit each other ({shapes}): {reason}") from None
    if not (made.A.isfinite().all() and made.B.isfinite().all()):
        raise InputError(f"{source}: the numbers of layer '{name}' are so large that their product is infinite.")
    return made
