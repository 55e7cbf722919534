"""Masked language modelling: a model of the BERT family learns to fill gaps (arXiv 1810.04805)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from adapters.errors import InputError
from studio.training.drivers.trainer import Batch
from studio.training.language_data import masked
from studio.training.language_measure import measure, with_perplexity
from studio.training.session import TrainSession
from studio.training.task import Measures
from studio.training.tasks.language import LanguageTask


class MaskedTask(LanguageTask):
    """The loss is that of the tokens behind the gaps, which are new in every pass over the data."""

    name = "masked"
    auto_class = "AutoModelForMaskedLM"

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
