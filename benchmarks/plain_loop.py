"""The smallest loop that drives the training methods: a model, a data function, one optimiser."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from adapters.initialise.plain import in_peft
from adapters.layers.variant import untouched
from adapters.plugin import Answers, Calibration, Closure, Handles, Plugins
from studio.training.methods import plugins_for
from studio.training.schemas.method import MethodFields, RegulariserFields

Batch = Tensor | dict[str, Tensor]
"""Token ids (batch, length) that are their own labels, or a model's inputs with "labels" by name."""

Data = Callable[[int], Batch]
"""Batch number n."""


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """What the model is called with."""
    return {"input_ids": batch, "labels": batch} if isinstance(batch, Tensor) else batch


def cut(batch: Batch, count: int) -> Iterator[dict[str, Tensor]]:
    """``batch`` in ``count`` parts."""
    given = inputs_of(batch)
    for parts in zip(*(tensor.chunk(count) for tensor in given.values()), strict=True):
        yield dict(zip(given, parts, strict=True))


class Recipe(MethodFields, RegulariserFields):
    """One run: the method's fields and the few a loop needs."""

    rank: int = 4
    alpha: float | None = None
    use_rslora: bool = False
    use_dora: bool = False
    dropout: float = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    max_grad_norm: float = 0.0
    seed: int = 0
    steps: int = 150
    accumulation: int = 1
    checkpointing: bool = False


@dataclass
class Run:
    """A finished (or stopped) run; ``seconds`` and ``times`` (per step) are of the processor, not of the clock."""

    model: PeftModel
    optimizer: torch.optim.Optimizer
    plugins: Plugins
    losses: list[float] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    times: list[float] = field(default_factory=list)


def prepare(base: nn.Module, recipe: Recipe, data: Data, targets: list[str], resuming: bool = False) -> Run:
    """Adapter, plugins and optimiser on ``base`` (which is not changed)."""
    torch.manual_seed(recipe.seed)
    made = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha or recipe.rank,  # type: ignore[arg-type]
        lora_dropout=recipe.dropout,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        target_modules=targets,
        init_lora_weights=in_peft(recipe.init),
    )
    model: Any = get_peft_model(base, made)  # type: ignore[arg-type]
    plugins = Plugins(plugins_for(recipe))
    plugins.configure(recipe)

    def loss_of(batch: Batch) -> Tensor:
        found: Tensor = model(**inputs_of(batch)).loss
        return found

    def losses(count: int) -> Iterator[Closure]:
        for number in range(count):
            yield partial(loss_of, data(number))

    calibration = None
    if "calibration" in plugins.needs() and not resuming:
        calibration = Calibration(losses, recipe.learning_rate)
    handles = Handles({"model": model}, calibration=calibration, steps=recipe.steps, seed=recipe.seed)
    plugins.initialise(handles)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, recipe.learning_rate, momentum=recipe.beta1)
    else:
        optimizer = torch.optim.AdamW(
            parameters, recipe.learning_rate, betas=(recipe.beta1, 0.999), weight_decay=recipe.weight_decay
        )
    plugins.after_inject(Handles({"model": model}, optimizer, None, recipe.steps, recipe.seed))
    if recipe.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model.enable_input_require_grads()
    model.train()
    return Run(model, optimizer, plugins)


def go_on(run: Run, recipe: Recipe, data: Data, start: int = 0, stop: int | None = None) -> Run:
    """Optimiser steps ``start`` .. ``stop - 1``; step n sees batch n, cut into ``accumulation`` parts."""
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    for step in range(start, recipe.steps if stop is None else stop):
        began = time.process_time()
        run.plugins.step_begin(step)
        total, logs = 0.0, {}
        for part in cut(data(step), recipe.accumulation):
            with run.plugins.forward_context():
                loss, logs = one_pass(run, part, 1 / recipe.accumulation)
            loss.backward()
            total += float(loss.detach())
        run.plugins.grads_ready(step)
        if recipe.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.plugins.after_step(step)
        run.times.append(time.process_time() - began)
        run.losses.append(total)
        run.logs.append(logs)
    run.seconds = sum(run.times)
    return run


def one_pass(run: Run, batch: Batch, share: float) -> tuple[Tensor, dict[str, float]]:
    """One forward pass: its share of the step's loss, and what plugins say of it."""
    given = inputs_of(batch)
    output = run.model(**given)
    answers = Answers(output.logits, given["labels"], partial(reference, run.model, batch), share)
    loss: Tensor = share * output.loss
    return run.plugins.loss(loss, answers)


@torch.no_grad()
def reference(model: PeftModel, batch: Batch) -> Tensor:
    """The untouched base model's logits."""
    with untouched(model):
        logits: Tensor = model(**inputs_of(batch)).logits
        return logits


def train(base: nn.Module, recipe: Recipe, data: Data, targets: list[str]) -> Run:
    """A whole run."""
    return go_on(prepare(base, recipe, data, targets), recipe, data)
