"""Alignment of a pruned base (LoRAM, arXiv 2502.13533, section 3): all its weights but the head's learn general text.

Plain next-token training in fp32 with AdamW, a cosine schedule and a warm-up. Order of rows and batches are functions
of the seed, so that a resumed alignment equals an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from adapters import files
from adapters.compression.sparsity import keep_zeros
from adapters.errors import InputError
from adapters.progress import Monitor, Progress, check
from pipelines.language.loading import LanguageModel
from studio.compression.pruning_schema import LoramConfig
from studio.datasets.seeds import global_seed
from studio.training.drivers.trainer import RunSampler
from studio.training.language.data import Batch, Collate
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.tasks.language import task_for

STATE = "alignment.pt"
WARMUP, CLIP, EVERY = 100, 1.0, 50
"""Warm-up steps (at most a tenth of the run), largest norm of the gradients, steps between two saved states."""


def rate(step: int, steps: int, highest: float) -> float:
    """The learning rate of ``step`` (from 0): linear warm-up, then a cosine to zero."""
    warmup = max(1, min(WARMUP, steps // 10))
    if step < warmup:
        return highest * (step + 1) / warmup
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def align(small: LanguageModel, config: LoramConfig, folder: Path, monitor: Monitor, resume: bool) -> float:
    """Train the weights of ``small`` in place; returns the loss of the last tenth of the steps.

    Raises:
        InputError: rows that cannot be used, or a loss that is not finite.
        Cancelled: ``monitor`` asked to stop; the state is saved in ``folder``.
    """
    model, steps = small.model.float(), config.align_steps
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    model.requires_grad_(True)
    if head is not embedding:
        head.requires_grad_(False)
    hooks = keep_zeros(model) if config.pattern != "groups" else []
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=config.align_rate, weight_decay=0.0)
    begun, losses = _load(folder / STATE, model, optimizer) if resume else (0, [])
    model.train()
    for step, batch in enumerate(_batches(small, config, begun), begun):
        if step % EVERY == 0 or monitor.cancelled():
            _save(folder / STATE, step, losses, model, optimizer)
        check(monitor)
        with global_seed(config.seed, "align", step):
            loss = model(**{name: value.to(small.device) for name, value in batch.items()}).loss
        if not bool(loss.isfinite()):
            raise InputError(f"The alignment's loss is not finite at step {step + 1}: lower align_rate.")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, config.align_rate)
        optimizer.step()
        losses.append(float(loss.detach()))
        monitor.report(Progress("aligning", step + 1, steps, loss=losses[-1]))
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False).eval()
    (folder / STATE).unlink(missing_ok=True)
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _batches(small: LanguageModel, config: LoramConfig, begun: int) -> Iterator[Batch]:
    """The batches of steps ``begun`` .. of the alignment."""
    asked = TrainLanguageConfig.parse(
        {"base": config.base, "data": config.align_data, "max_length": config.max_length, "too_long": "cut",
         "loss_on": "all", "seed": config.seed, "chat_template": config.chat_template}
    )  # fmt: skip
    task = task_for(asked)
    task.rows()
    samples = list(task.tokens(small.tokenizer, small.longest).shown)
    collate, size = Collate(small.tokenizer.pad_token_id), config.align_batch
    order = list(RunSampler(len(samples), config.align_steps * size, config.seed))
    for step in range(begun, config.align_steps):
        yield collate([samples[number] for number in order[step * size : (step + 1) * size]])


def _save(place: Path, step: int, losses: list[float], model: Any, optimizer: Any) -> None:
    state = {"step": step, "losses": losses, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    files.write(place, lambda part: torch.save(state, part))


def _load(place: Path, model: Any, optimizer: Any) -> tuple[int, list[float]]:
    if not place.is_file():
        return 0, []
    try:
        state = torch.load(place, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        raise InputError(f"'{place}' is damaged ({error}): delete it and resume, to align from the start.") from None
    return int(state["step"]), list(state["losses"])
