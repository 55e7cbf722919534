"""X-LoRA learns which expert a token needs: three tasks that contradict each other, told apart by their first token.

The tasks are those of ``benchmarks/contradictions.py``; a LoRA is trained on each, then a classifier.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapters.layers.experts import xlora
from adapters.layers.experts.classifier import ClassifierOptions
from adapters.layers.variant import read_layers
from benchmarks import dialects
from benchmarks.contradictions import accuracies, learn

TASKS = 3


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
