"""Causal language modelling: a model learns to answer, or to continue texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch

from adapters.errors import InputError
from pipelines.language.answer import complete
from pipelines.language.loading import LanguageModel
from studio.datasets.encoding import IGNORED, Encoded, encode_all, pack, unwritten
from studio.training.language.about import About
from studio.training.language.data import Collate, Samples
from studio.training.language.measure import measure, with_perplexity
from studio.training.language.rows import Items
from studio.training.task import Measures
from studio.training.tasks.language import LanguageTask

LANGUAGE = About(
    "causal", "write and answer", "studio.training.tasks.causal:CausalTask", rows="studio.training.language.rows:talks"
)


class CausalTask(LanguageTask):
    """The loss is the next token's; only answers count, unless ``loss_on`` says otherwise."""

    opens = "causal"
    peft_type = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"
    pipeline_tag = "text-generation"
    asking = (
        'inputs = tokenizer("Hello", return_tensors="pt")',
        "made = model.generate(**inputs, max_new_tokens=20)",
        "print(tokenizer.decode(made[0], skip_special_tokens=True))",
    )
    shifted = True

    def encoded(self, tokenizer: Any) -> Samples:
        rows, config = self.read, self.config

        def tokens(items: Items) -> Any:
            return encode_all(
                items, tokenizer, max_length=config.max_length, too_long=config.too_long, loss_on=config.loss_on
            )

        made = tokens(rows.shown)
        held_out = tokens(rows.held_out).samples if rows.held_out else []
        remarks = [*rows.remarks, *unwritten([*rows.shown, *rows.held_out], str(tokenizer.chat_template or ""))]
        if made.ended:
            remarks.append(f"in {len(made.ended)} rows an end token is added, since the chat template writes none")
        if made.skipped:
            remarks.append(f"{len(made.skipped)} rows are longer than {config.max_length} tokens and left out")
        if made.cut:
            remarks.append(f"{len(made.cut)} rows were cut at {config.max_length} tokens")
        if made.silent:
            remarks.append(f"in {len(made.silent)} rows nothing was left to learn")
        shown = made.samples
        if rows.types:
            shown = [
                {**sample, "task_types": [rows.types[number]]}
                for sample, number in zip(shown, made.numbers, strict=True)
            ]
        if config.packing:
            count = len(shown)
            shown, held_out = pack(shown, config.max_length), pack(held_out, config.max_length)
            remarks.append(f"{count} samples are packed into {len(shown)} rows")
        return Samples(shown, held_out, "; ".join(remarks))

    def learnt(self, samples: Sequence[Encoded]) -> float:
        labels = [label for sample in samples for label in sample["labels"]]
        return sum(label != IGNORED for label in labels) / len(labels)

    def example(self, sample: Encoded, tokenizer: Any) -> str:
        return marked(sample, tokenizer)

    def encode(self) -> None:
        super().encode()
        if self.config.packing:
            check_packing(self.base, self.data)

    def measure(self) -> Measures:
        autocast = self.session.accelerator.autocast
        return with_perplexity(measure(self._model, self.held_out(), shifted=True, autocast=autocast)[0])

    def answer(self, prompts: Sequence[str]) -> Iterable[str]:
        config, model = self.config, self._model
        model.config.use_cache = True
        try:
            return complete(model, self.base.tokenizer, prompts, config.sample_tokens, config.system_prompt)
        finally:
            model.config.use_cache = False


def marked(sample: Encoded, tokenizer: Any) -> str:
    """The sample as text, runs of learnt tokens in double brackets."""
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    parts = []
    for learnt, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        text = tokenizer.decode([token for token, _ in run])
        parts.append(f"[[{text}]]" if learnt else text)
    return "".join(parts)


@torch.no_grad()
def check_packing(base: LanguageModel, samples: Samples) -> None:
    """Make sure that this model keeps packed samples apart: the second of two must not see the first.

    Raises:
        InputError: it does not, so packing would train on mixed-up contexts.
    """
    row = max(samples.shown, key=lambda sample: sample["position_ids"].count(0))
    starts = [number for number, position in enumerate(row["position_ids"]) if position == 0]
    if len(starts) < 2:
        return
    first, second = starts[1], starts[2] if len(starts) > 2 else len(row["input_ids"])
    together = Collate(0, packed=True)([{name: values[:second] for name, values in row.items()}])
    alone = torch.tensor([row["input_ids"][first:second]])
    together = {name: value.to(base.device) for name, value in together.items() if name != "labels"}
    try:
        mixed = base.model(**together).logits[0, first:].float()
    except TypeError:
        mixed = None
    apart = base.model(input_ids=alone.to(base.device)).logits[0].float()
    scale = float(apart.abs().max())
    tolerance = 1e-3 if base.model.dtype == torch.float32 else 5e-2
    if mixed is None or float((mixed - apart).abs().max()) > tolerance * scale:
        raise InputError(
            f"A {base.architecture} model does not keep packed samples apart: set packing to false "
            "(or attention to 'sdpa')."
        )
