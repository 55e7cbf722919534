"""X-LoRA learns which expert a token needs: three tasks that contradict each other, told apart by their first token.

On bed T (``benchmarks/dialects.py``), whose base knows the first tokens 0 to 2 as those of its dialects. Task d asks
for Q_d(a) after a symbol a, with a permutation Q_d of the 28 symbols; a LoRA is trained on each, then a classifier.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from adapters.layers.experts import xlora
from adapters.layers.experts.classifier import ClassifierOptions
from adapters.layers.variant import read_layers
from benchmarks import dialects

FIRST, PAIRS, TASKS = 4, 6, 3


def rows(task: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(ids, labels), both (count, 13): the task's token, then six times a symbol and its answer; answers are learnt."""
    answers = torch.randperm(28, generator=torch.Generator().manual_seed(500 + task))
    asked = torch.randint(0, 28, (count, PAIRS), generator=generator)
    ids = torch.stack([asked, answers[asked]], -1).flatten(1) + FIRST
    ids = torch.cat([torch.full((count, 1), task), ids], 1)
    labels = torch.full_like(ids, -100)
    labels[:, 2::2] = ids[:, 2::2]
    return ids, labels


def learn(model, tasks, steps, rate, seed=0):
    """Train the model's parameters that learn, on all ``tasks`` in every batch."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        ids, labels = (torch.cat(parts) for parts in zip(*(rows(t, 16, generator) for t in tasks), strict=True))
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def accuracies(model) -> list[float]:
    """Share of right answers in each task."""
    found = []
    for task in range(TASKS):
        ids, _ = rows(task, 128, torch.Generator().manual_seed(9))
        guessed = model(input_ids=ids).logits[:, 1:-1:2].argmax(-1)
        found.append(float((guessed == ids[:, 2::2]).float().mean()))
    return found


def mean(values) -> float:
    return sum(values) / len(values)


@pytest.mark.slow
def test_gates_find_the_expert_that_a_task_needs():
    torch.set_num_threads(1)
    experts, alone = [], []
    for task in range(TASKS):
        torch.manual_seed(task)
        model = get_peft_model(
            dialects.model(), LoraConfig(r=4, lora_alpha=8, target_modules=["gate_proj", "up_proj", "down_proj"])
        )
        learn(model, [task], 400, 1e-2, seed=task)
        layers = read_layers(model.get_base_model(), "default")
        experts.append(xlora.Expert(f"task{task}", layers))
        alone.append(accuracies(model))
    own = [alone[task][task] for task in range(TASKS)]
    best = max(mean(row) for row in alone)
    print("\nbase", accuracies(dialects.model()), "experts", alone)
    assert min(own) > 0.9

    reached = {}
    for layerwise in (False, True):
        for steps in (100, 400):
            torch.manual_seed(5)
            options = ClassifierOptions(depth=2, size=64, dropout=0.0, layerwise=layerwise)
            model = xlora.add(dialects.model(), experts, options)
            with xlora.constant_gates(model.eval(), [1 / 3] * 3):
                uniform = accuracies(model)
            with xlora.constant_gates(model, [1.0] * 3):
                summed = accuracies(model)
            reached[layerwise, steps] = accuracies(learn(model, range(TASKS), steps, 1e-2))
    print("sum", summed, "uniform", uniform, "x-lora (layer-wise, steps)", reached)
    assert mean(reached[True, 400]) >= 0.95 * mean(own)
    for layerwise in (False, True):
        assert mean(reached[layerwise, 400]) >= mean(uniform) + 0.3
        assert mean(reached[layerwise, 400]) >= best + 0.3
