"""Masked language modelling: a BERT-like model learns to predict masked tokens (arXiv 1810.04805)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from adapters.errors import InputError
from studio.datasets.encoding import IGNORED, Encoded
from studio.datasets.seeds import derive
from studio.training.drivers.trainer import Batch
from studio.training.language.about import About
from studio.training.language.measure import measure, with_perplexity
from studio.training.session import TrainSession
from studio.training.task import Measures
from studio.training.tasks.language import LanguageTask

LANGUAGE = About("masked", "predict hidden words (BERT)", "studio.training.tasks.masked:MaskedTask")


class MaskedTask(LanguageTask):
    """The loss is the masked tokens'; masks are new in every pass over the data."""

    opens = "masked"
    auto_class = "AutoModelForMaskedLM"
    pipeline_tag = "fill-mask"

    def learnt(self, samples: Sequence[Encoded]) -> float:
        return self.config.mask_share

    def open(self, session: TrainSession) -> None:
        super().open(session)
        if self.base.tokenizer.mask_token_id is None:
            raise InputError(
                f"The tokenizer of '{self.config.base}' has no mask token: choose a base of the BERT family."
            )

    def change(self, batch: Batch, stream: str, number: int) -> Batch:
        return masked(batch, self.base.tokenizer, self.config.mask_share, self.config.seed, stream, number)

    def measure(self) -> Measures:
        autocast = self.session.accelerator.autocast
        return with_perplexity(measure(self._model, self.held_out(), autocast=autocast)[0])

    def answer(self, prompts: Sequence[str]) -> Iterator[str]:
        tokenizer = self.base.tokenizer
        for text in prompts:
            tokens, logits = self.logits(text)
            gaps = tokens == tokenizer.mask_token_id
            yield " ".join(tokenizer.decode([token]) for token in logits[gaps].argmax(-1).tolist())


def masked(batch: Batch, tokenizer: Any, share: float, seed: int, stream: str, number: int) -> Batch:
    """A batch of whole texts with masked tokens, as for BERT (arXiv 1810.04805): of the chosen tokens 80 % become the
    mask, 10 % a random token, 10 % stay. At least one token of every text is chosen."""
    generator = torch.Generator().manual_seed(derive(seed, stream, number))
    ids = batch["input_ids"].cpu().clone()
    special = torch.tensor(
        [tokenizer.get_special_tokens_mask(row.tolist(), already_has_special_tokens=True) for row in ids]
    ).bool()
    dice = torch.rand(ids.shape, generator=generator).masked_fill(special, 2.0)
    least = dice.min(dim=1, keepdim=True).values
    chosen = (dice < share) | ((dice == least) & ~special)
    labels = ids.masked_fill(~chosen, IGNORED)
    kind = torch.rand(ids.shape, generator=generator)
    ids[chosen & (kind < 0.8)] = tokenizer.mask_token_id
    strange = chosen & (kind >= 0.8) & (kind < 0.9)
    ids[strange] = torch.randint(len(tokenizer), ids.shape, generator=generator)[strange]
    device = batch["input_ids"].device
    return {**batch, "input_ids": ids.to(device), "labels": labels.to(device)}
