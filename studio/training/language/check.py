"""Checks the rows of a language training with only the tokenizer loaded."""

from __future__ import annotations

import statistics
from typing import Any

from pipelines.language.loading import open_tokenizer
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.tasks.language import task_for


def check_data(config: TrainLanguageConfig) -> dict[str, Any]:
    """What would be trained on.

    Returns:
        ``rows``, ``held_out``, ``samples``, ``tokens`` (shortest, mean, longest), ``learnt`` (share of tokens),
        ``labels``, ``columns``, ``remark`` (what is cut or left out), ``example`` (the first sample, learnt parts in
        double brackets).

    Raises:
        InputError: as the training itself.
    """
    from studio import library

    task = task_for(config)
    task.rows()
    tokenizer = open_tokenizer(library.resolve_base(config.base), task.template)
    samples = task.tokens(tokenizer)
    lengths = [len(sample["input_ids"]) for sample in samples.shown]
    return {
        "rows": len(task.read.shown),
        "held_out": len(task.read.held_out),
        "samples": len(samples.shown),
        "tokens": {"shortest": min(lengths), "mean": statistics.fmean(lengths), "longest": max(lengths)},
        "learnt": task.learnt(samples.shown),
        "labels": task.read.labels,
        "columns": task.read.columns,
        "remark": samples.remark,
        "example": task.example(samples.shown[0], tokenizer),
    }
