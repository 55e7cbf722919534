"""A look at the rows of a language training before any model is loaded: only the tokenizer is."""

from __future__ import annotations

import statistics
from itertools import groupby
from typing import Any

from pipelines.language.loading import open_tokenizer
from studio.datasets.encoding import IGNORED, Encoded
from studio.training.language_data import encode, read_rows, template_of
from studio.training.schemas.language import TrainLanguageConfig


def check_data(config: TrainLanguageConfig) -> dict[str, Any]:
    """What would be trained on.

    Returns:
        ``rows``, ``held_out``, ``samples``, ``tokens`` (shortest, mean, longest), ``learnt`` (share of tokens),
        ``labels``, ``columns``, ``remark`` (what is cut or left out), ``example`` (the first sample, what is learnt in
        double brackets).

    Raises:
        InputError: as the training itself.
    """
    from studio import library

    rows = read_rows(config)
    tokenizer = open_tokenizer(library.resolve_base(config.base), template_of(config))
    samples = encode(rows, tokenizer, config, None)
    lengths = [len(sample["input_ids"]) for sample in samples.shown]
    learnt = [sum(label != IGNORED for label in sample.get("labels", ())) for sample in samples.shown]
    return {
        "rows": len(rows.shown),
        "held_out": len(rows.held_out),
        "samples": len(samples.shown),
        "tokens": {"shortest": min(lengths), "mean": statistics.fmean(lengths), "longest": max(lengths)},
        "learnt": {"causal": sum(learnt) / sum(lengths), "masked": config.mask_share}.get(config.task, 0.0),
        "labels": rows.labels,
        "columns": rows.columns,
        "remark": samples.remark,
        "example": _marked(samples.shown[0], tokenizer) if config.task == "causal" else
                   tokenizer.decode(samples.shown[0]["input_ids"]),
    }  # fmt: skip


def _marked(sample: Encoded, tokenizer: Any) -> str:
    """The sample as text, runs of learnt tokens in double brackets."""
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    parts = []
    for learnt, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        text = tokenizer.decode([token for token, _ in run])
        parts.append(f"[[{text}]]" if learnt else text)
    return "".join(parts)
