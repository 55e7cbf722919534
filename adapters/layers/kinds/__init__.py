"""Kinds of adapter layers as files store them: one module per kind, with its tensors and the update they form.

    LoRA         s B A
    with core    s B (C * A)              C (r, r, kh, kw) between 1 x 1 kernels ("lora_mid", Tucker), folded into A
    LoHa         s (B1 A1) o (B2 A2)      arXiv 2108.06098; rank r1 r2: columns B1[:, i] o B2[:, j], rows A1[i] o A2[j]
    LoKr         s W1 (x) W2              arXiv 2309.14859; (B1 A1) (x) (B2 A2) = (B1 (x) B2) (A1 (x) A2)
    embedding    s B A                    of a table E (tokens, width), as the matrix E^T applied to one-hot tokens
    difference   D                        a full matrix
    DoRA         m with any of these      arXiv 2402.09353

Each is converted to A and B exactly. A product whose rank reaches min(out, in) is stored as the full matrix times an
identity, which is also exact and smaller. The scale s is alpha / r of the stored factors; it is 1 where no alpha is
stored or nothing is factored. A module here with a constant ``KIND`` is a kind; importing it does not load torch.
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
"""The role of the scale's numerator, which any kind may have."""


@cache
def _discovered() -> tuple[LayerKind, ...]:
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return tuple(sorted((module.KIND for module in modules), key=lambda kind: kind.order))


KINDS: tuple[LayerKind, ...] = _discovered()
"""All kinds, in the order in which they are tried."""

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
    """A and B of the layer stored as ``parts`` (role -> tensor).

    Raises:
        InputError: tensors are missing, belong to two kinds, have shapes that do not multiply, or give A or B that are
            not finite.
    """
    kinds = [kind for kind in kinds_of(set(parts)) if not kind.beside]
    if len(kinds) > 1:
        names = ", ".join(kind.name for kind in kinds)
        raise InputError(f"{source}: layer '{name}' has tensors of more than one kind ({names}).")
    for role, tensor in parts.items():
        if role != ALPHA and not tensor.is_floating_point():
            raise InputError(f"{source}: layer '{name}' holds {tensor.dtype} values; adapters are floating point.")
    if not kinds:
        found = ", ".join(sorted(parts))
        raise InputError(f"{source}: layer '{name}' has only {found}, without the factors that go with it.")
    try:
        made = kinds[0].factors(parts)
    except InputError:
        raise
    except KeyError as missing:
        raise InputError(f"{source}: the {kinds[0].name} layer '{name}' has no {missing.args[0]}.") from None
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in parts.items())
        reason = str(error).splitlines()[0]
        raise InputError(f"{source}: the tensors of layer '{name}' do not fit together ({shapes}): {reason}") from None
    if not (made.A.isfinite().all() and made.B.isfinite().all()):
        raise InputError(f"{source}: the values of layer '{name}' are so large that their product overflows.")
    return made
