"""Zeros in place instead of smaller layers: the unstructured and semi-structured prunings of LoRAM.

Score of a weight W_ij, from a pass over some text with inputs x of the layer:

    wanda        |W_ij| ||x_j||_2      (A Simple and Effective Pruning Approach for Large Language Models,
                                        arXiv 2306.11695, section 2)
    magnitude    |W_ij|
    random       uniform numbers

    unstructured   the share p with the lowest scores of every row (output) becomes zero
    N:M            of every M neighbouring inputs of a row the N with the highest scores stay

Shapes stay, and so does memory: zeros are for hardware and kernels that skip them. An adapter trained beside them needs
no recovery. SparseGPT, which the paper uses for its unstructured runs, also changes what stays; it is not here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters.compression.slicing import members
from adapters.errors import InputError

PATTERNS: Mapping[str, tuple[int, int] | None] = {"unstructured": None, "2:4": (2, 4), "4:8": (4, 8)}
"""Name -> (N, M), or None."""


def keep(scores: Tensor, pattern: str, ratio: float) -> Tensor:
    """What stays of a weight: bool (out, in).

    Args:
        scores: (out, in), not negative.
        ratio: share of every row that becomes zero, for "unstructured"; N:M has its own.

    Raises:
        InputError: an unknown pattern, or inputs that groups of M do not fill.
    """
    if pattern not in PATTERNS:
        raise InputError(f"Unknown pattern '{pattern}': use one of {', '.join(PATTERNS)}.")
    group = PATTERNS[pattern]
    if group is None:
        count, blocks = round(scores.shape[1] * (1 - ratio)), scores
    else:
        count, size = group
        if scores.shape[1] % size:
            raise InputError(f"Groups of {size} do not fill {scores.shape[1]} inputs: choose another pattern.")
        blocks = scores.view(scores.shape[0], -1, size)
    order = torch.argsort(blocks, dim=-1, descending=True, stable=True)
    mask = torch.zeros(blocks.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, order[..., :count], True).view(scores.shape)


@torch.no_grad()
def input_norms(model: nn.Module, blocks: Iterable[int], runs: Iterable[Callable[[], Any]]) -> dict[str, Tensor]:
    """Path of a layer -> ||x_j||_2 (in,) of its inputs over all ``runs`` of the model, in fp32.

    Raises:
        InputError: there is no run.
    """
    wanted, sums, count = set(blocks), dict[str, Tensor](), 0

    def look(name: str) -> Callable[..., None]:
        def hook(_: Any, given: tuple[Any, ...]) -> None:
            found = given[0].flatten(0, -2).float().square().sum(0).cpu()
            sums[name] = sums[name] + found if name in sums else found

        return hook

    hooks = [m.register_forward_pre_hook(look(n)) for n, number, _, m in members(model) if number in wanted]
    try:
        for run in runs:
            run()
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise InputError("Importance by 'wanda' is measured on rows of data, and there are none.")
    return {name: found.sqrt() for name, found in sums.items()}


@torch.no_grad()
def put_zeros(
    model: nn.Module, blocks: Iterable[int], pattern: str, ratio: float, score: Callable[[str, Tensor], Tensor]
) -> tuple[float, str]:
    """Set weights of the linear layers of ``blocks`` to zero in place.

    Args:
        score: (path, weight (out, in)) -> scores (out, in).

    Returns:
        The share of zeros among these weights, and the digest of what stays.
    """
    wanted, digest, zeros, count = set(blocks), hashlib.blake2b(digest_size=16), 0, 0
    for name, number, _, module in members(model):
        if number not in wanted:
            continue
        stays = keep(score(name, module.weight), pattern, ratio)
        module.weight.masked_fill_(~stays, 0)
        digest.update(name.encode())
        digest.update(stays.cpu().numpy().tobytes())
        zeros, count = zeros + int((~stays).sum()), count + stays.numel()
    return (zeros / count if count else 0.0), digest.hexdigest()


def keep_zeros(model: nn.Module) -> list[Any]:
    """Hooks that keep the zeros of the blocks' weights at zero while all weights learn: their gradients are zero."""
    made = []
    for _, _, _, module in members(model):
        stays = module.weight.detach() != 0
        if not bool(stays.all()):
            made.append(module.weight.register_hook(lambda gradient, stays=stays: gradient * stays))
    return made
