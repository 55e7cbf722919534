"""What one step of an RNA training costs, for its estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.genomics import model as models
from pipelines.genomics.kmers import Kmers
from pipelines.language.loading import longest_input
from studio.training.estimate import Work, count_language
from studio.training.rna import samples
from studio.training.schemas.rna import NEW, TrainRnaConfig
from studio.training.tasks.rna import PAPER_LENGTH, RnaTraining, task_for


def look(config: TrainRnaConfig, dtype: str) -> Work:
    """Count the cost of one step; every row is as long as the longest.

    Raises:
        InputError: as the training itself.
    """
    import torch

    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    task = task_for(config)
    task.rows()
    with torch.device("meta"):
        base = _outline(config, task)
    shown, _ = samples.rows(task.read.shown, base.kmers, config)
    longest = max(len(row["input_ids"]) for row in shown)
    with torch.device("meta"):
        model = base.model.to(kind).requires_grad_(False)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        total = sum(p.numel() for p in model.parameters())
        learner = task.put(model).train()
    kept, operations, flops = count_language(learner, config.batch_size, longest)
    learnt = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    frozen = 0 if config.mode == "full" else total
    said = f"Every row is counted with {longest} tokens, as long as the longest one"
    rows = len(task.arranged(shown))
    return Work({"model": frozen}, learnt, kept, flops, operations, "model", said, samples=rows)


def _outline(config: TrainRnaConfig, task: RnaTraining) -> models.RnaModel:
    """The base with shapes but no values."""
    import transformers

    from studio import library

    if config.base == NEW:
        kmers = Kmers.new(config.k, config.stride, config.max_length or PAPER_LENGTH)
        return models.new_model(
            kmers, task.opens, width=config.width, depth=config.depth, heads=config.heads, labels=task.read.labels
        )
    place = Path(library.resolve_rna(config.base))
    told = models.read_config(place)
    reads = longest_input(told) or 512
    kmers = Kmers.read(place, config.max_length or reads)
    told.max_position_embeddings = max(reads, kmers.longest)
    auto: Any = getattr(transformers, task.auto_class)
    return models.RnaModel(auto.from_config(told), kmers, str(place), ())
