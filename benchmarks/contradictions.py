"""Tasks that contradict each other, on bed T (:mod:`benchmarks.dialects`): what a mixture of experts is for.

Task d asks for Q_d(a) after a symbol a, Q_d a permutation of the symbols. A row is the task's own first token (0, 1, 2
...), then six times a symbol and its answer; only answers are learnt. The same symbol has another answer in every task,
and nothing but the first token tells which is meant. The base knows the first tokens 0 to 2 as those of its dialects;
:func:`informed` also knows those of more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks import dialects

PAIRS = 6
KEPT = 4
"""At least these first tokens are never symbols."""


def rows(task: int, count: int, generator: torch.Generator, tasks: int = 3) -> tuple[Tensor, Tensor]:
    """(ids, labels) of one of ``tasks`` tasks, both (count, 13)."""
    first = max(KEPT, tasks)
    symbols = dialects.TOKENS - first
    answers = torch.randperm(symbols, generator=torch.Generator().manual_seed(500 + task))
    asked = torch.randint(0, symbols, (count, PAIRS), generator=generator)
    ids = torch.stack([asked, answers[asked]], -1).flatten(1) + first
    ids = torch.cat([torch.full((count, 1), task), ids], 1)
    labels = torch.full_like(ids, -100)
    labels[:, 2::2] = ids[:, 2::2]
    return ids, labels


def mixed(which: Sequence[int], count: int, generator: torch.Generator, tasks: int = 3) -> tuple[Tensor, Tensor]:
    """``count`` rows of each of the tasks ``which``, one after the other."""
    ids, labels = zip(*(rows(task, count, generator, tasks) for task in which), strict=True)
    return torch.cat(ids), torch.cat(labels)


def accuracies(model: nn.Module, tasks: int = 3, count: int = 128) -> list[float]:
    """Share of right answers in each task."""
    model.eval()
    found = []
    for task in range(tasks):
        ids, _ = rows(task, count, torch.Generator().manual_seed(9), tasks)
        with torch.no_grad():
            guessed = model(input_ids=ids).logits[:, 1:-1:2].argmax(-1)
        found.append(float((guessed == ids[:, 2::2]).float().mean()))
    return found


def learn(
    model: Any, which: Sequence[int], steps: int, rate: float, seed: int = 0, tasks: int = 3, count: int = 16
) -> Any:
    """Train the parameters that learn, on ``count`` rows of all tasks ``which`` in every batch; routers' losses too."""
    from adapters.layers.experts import aux_loss, is_moe

    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=rate, weight_decay=0.0)
    generator, routed = torch.Generator().manual_seed(seed), is_moe(model)
    model.train()
    for _ in range(steps):
        ids, labels = mixed(which, count, generator, tasks)
        loss = model(input_ids=ids, labels=labels).loss
        (loss + aux_loss(model) if routed else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def informed(tasks: int, seed: int = 0, steps: int = 300) -> LlamaForCausalLM:
    """The base of bed T, trained on to know the first tokens of ``tasks`` tasks as those of as many dialects."""
    model = dialects.empty_model()
    model.load_state_dict(dialects.model().state_dict())
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    for step in range(steps):
        dialect = step % tasks
        ids = dialects.batch(dialect, 48, 77 + seed, step)
        ids[:, 0] = dialect
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)
