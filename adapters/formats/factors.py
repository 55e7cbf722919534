"""Other ways to write an update, each turned into A and B exactly.

    LoRA         s B A
    with core    s B (C * A)              C (r, r, kh, kw) between 1 x 1 kernels ("lora_mid", Tucker), folded into A
    LoHa         s (B1 A1) o (B2 A2)      arXiv 2108.06098; rank r1 r2: columns B1[:, i] o B2[:, j], rows A1[i] o A2[j]
    LoKr         s W1 (x) W2              arXiv 2309.14859; (B1 A1) (x) (B2 A2) = (B1 (x) B2) (A1 (x) A2)
    embedding    s B A                    of a table E (tokens, width), seen as the matrix E^T that one-hot tokens meet
    difference   D                        a whole matrix

A factored form whose rank reaches min(out, in) is kept as the whole matrix beside an identity, which costs less and is
exact too. The scale s is alpha / r of the written factors; it is 1 where no alpha is written, or nothing is factored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.errors import InputError
from adapters.formats.roles import Role

LIMIT = 2**27
"""Most numbers in one layer; real adapters stay far below, a damaged or hostile file may claim anything."""

Pair = tuple[Tensor, Tensor]
"""B (out, r) and A (r, columns)."""


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


def factors(parts: Mapping[Role, Tensor], name: str, source: str) -> Factors:
    """A and B of what ``parts`` say.

    Raises:
        InputError: parts missing, parts of two forms, or shapes that do not multiply.
    """
    forms = [form for form, marks in MARKS.items() if any(mark in parts for mark in marks)]
    if len(forms) > 1:
        raise InputError(f"{source}: layer '{name}' is written in two forms at once ({', '.join(forms)}).")
    for role, tensor in parts.items():
        if role != "alpha" and not tensor.is_floating_point():
            raise InputError(f"{source}: layer '{name}' holds {tensor.dtype} numbers; adapters are floating point.")
    form = forms[0] if forms else "LoRA"
    try:
        made = _FORMS[form](parts)
    except InputError:
        raise
    except KeyError as missing:
        raise InputError(f"{source}: the {form} layer '{name}' has no {missing.args[0]}.") from None
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in parts.items())
        reason = str(error).splitlines()[0]
        raise InputError(f"{source}: the parts of layer '{name}' do not fit each other ({shapes}): {reason}") from None
    if not bool(torch.isfinite(made.A).all() and torch.isfinite(made.B).all()):
        raise InputError(f"{source}: the numbers of layer '{name}' are so large that their product is infinite.")
    return made


MARKS: Mapping[str, tuple[Role, ...]] = {
    "LoRA": ("A", "B", "mid"),
    "embedding": ("table_A", "table_B"),
    "LoHa": ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"),
    "LoKr": ("k1", "k1_a", "k1_b", "k2", "k2_a", "k2_b", "kt"),
    "difference": ("diff",),
}
"""Which tensors belong to which form."""


def _lora(parts: Mapping[Role, Tensor]) -> Factors:
    A, B = parts["A"], parts["B"]
    if A.ndim not in (2, 4) or B.ndim not in (2, 4) or 0 in (*A.shape, *B.shape):
        raise ValueError("a LoRA has two matrices, or kernels, that are not empty")
    if B.ndim == 4 and B.shape[2:] != (1, 1):
        raise ValueError("B has a kernel, and only 1 x 1 is LoRA")
    dim = A.shape[0]
    if "mid" in parts:
        core = parts["mid"]
        if core.ndim != 4 or core.shape[:2] != (B.shape[1], dim) or A.ndim != 4 or A.shape[2:] != (1, 1):
            raise ValueError("a core lies between 1 x 1 kernels of its own rank")
        A = torch.einsum("jnab,ijhw->inhw", A.float(), core.float())
    if A.shape[0] != B.shape[1]:
        raise ValueError("A has one row for every column of B")
    return Factors(A, B, dim)


def _loha(parts: Mapping[Role, Tensor]) -> Factors:
    first, kernel = _hada(parts["w1_a"], parts["w1_b"], parts.get("t1"))
    second, other = _hada(parts["w2_a"], parts["w2_b"], parts.get("t2"))
    if kernel != other or _sizes(first) != _sizes(second):
        raise ValueError("both products have the same size")
    (B1, A1), (B2, A2) = first, second
    _check_inner(first, second)
    dim = parts["w1_b"].shape[0]
    out, columns = _sizes(first)
    rank = B1.shape[1] * B2.shape[1]
    if rank >= min(out, columns):
        _check_size(out, columns, min(out, columns))
        return _whole((B1 @ A1) * (B2 @ A2), kernel, dim)
    _check_size(out, columns, rank)
    B = (B1[:, :, None] * B2[:, None, :]).flatten(1)
    A = (A1[:, None, :] * A2[None, :, :]).flatten(0, 1)
    return Factors(_kernel(A, kernel), B, dim)


def _hada(w_a: Tensor, w_b: Tensor, core: Tensor | None) -> tuple[Pair, tuple[int, ...]]:
    """One of LoHa's products, and its kernel: B A, or with a core  sum_ij core[i, j] w_a[i, out] w_b[j, in]."""
    if core is None:
        return (_matrix(w_a), _matrix(w_b)), ()
    a, b = _matrix(w_a), _matrix(w_b)
    if core.ndim != 4:
        raise ValueError("a core has four dimensions")
    _check_size(a.shape[1], b.shape[1] * core.shape[2] * core.shape[3], core.shape[0])
    return (a.T, torch.einsum("jn,ijhw->inhw", b, core.float()).flatten(1)), tuple(core.shape[2:])


def _lokr(parts: Mapping[Role, Tensor]) -> Factors:
    dim = 0
    if "k1" in parts:
        first = _identity_pair(_matrix(parts["k1"]))
    else:
        first = _matrix(parts["k1_a"]), _matrix(parts["k1_b"])
        dim = first[0].shape[1]
    kernel: tuple[int, ...] = ()
    if "k2" in parts:
        whole = parts["k2"].float()
        if whole.ndim not in (2, 4):
            raise ValueError("the second factor is a matrix or a kernel")
        kernel = tuple(whole.shape[2:])
        second = _identity_pair(whole.flatten(1))
    elif "kt" in parts:
        second, kernel = _hada(parts["k2_a"], parts["k2_b"], parts["kt"])
        dim = parts["k2_b"].shape[0]
    else:
        second = _matrix(parts["k2_a"]), _matrix(parts["k2_b"])
        dim = second[0].shape[1]
    _check_inner(first, second)
    (out1, in1), (out2, in2) = _sizes(first), _sizes(second)
    out, columns = out1 * out2, in1 * in2
    rank = first[0].shape[1] * second[0].shape[1]
    if rank >= min(out, columns):
        _check_size(out, columns, min(out, columns))
        return _whole(torch.kron(first[0] @ first[1], second[0] @ second[1]), kernel, dim)
    _check_size(out, columns, rank)
    A = torch.kron(first[1].contiguous(), second[1].contiguous())
    return Factors(_kernel(A, kernel), torch.kron(first[0].contiguous(), second[0].contiguous()), dim)


def _table(parts: Mapping[Role, Tensor]) -> Factors:
    A, B = parts["table_A"], parts["table_B"]
    if A.ndim != 2 or B.ndim != 2 or 0 in A.shape or A.shape[0] != B.shape[1]:
        raise ValueError("A is (r, tokens) and B is (width, r)")
    return Factors(A, B, A.shape[0])


def _difference(parts: Mapping[Role, Tensor]) -> Factors:
    whole = parts["diff"].float()
    if whole.ndim not in (2, 4) or 0 in whole.shape:
        raise ValueError("only the weights of linear layers and convolutions can be composed")
    _check_size(whole.shape[0], whole[0].numel(), min(whole.shape[0], whole[0].numel()))
    return _whole(whole.flatten(1), tuple(whole.shape[2:]), 0)


_FORMS = {"LoRA": _lora, "embedding": _table, "LoHa": _loha, "LoKr": _lokr, "difference": _difference}


def _whole(matrix: Tensor, kernel: tuple[int, ...], dim: int) -> Factors:
    B, A = _identity_pair(matrix)
    return Factors(_kernel(A, kernel), B, dim)


def _identity_pair(matrix: Tensor) -> Pair:
    """(B, A) with B A = matrix, one of them the identity of the smaller side."""
    if 0 in matrix.shape:
        raise ValueError("a factor is empty")
    if matrix.shape[0] <= matrix.shape[1]:
        return torch.eye(matrix.shape[0]), matrix
    return matrix, torch.eye(matrix.shape[1])


def _matrix(tensor: Tensor) -> Tensor:
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError("a factor is a matrix that is not empty")
    return tensor.float()


def _kernel(A: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """A (r, in * kh * kw) with its kernel, where that is known."""
    return A.reshape(A.shape[0], -1, *kernel) if kernel else A


def _sizes(pair: Pair) -> tuple[int, int]:
    return pair[0].shape[0], pair[1].shape[1]


def _check_inner(*pairs: Pair) -> None:
    if any(B.shape[1] != A.shape[0] for B, A in pairs):
        raise ValueError("a product's inner sizes are equal")


def _check_size(out: int, columns: int, rank: int) -> None:
    if rank * (out + columns) > LIMIT:
        raise ValueError(f"an update of {out} x {columns} with rank {rank} is larger than any model's")
