"""Causal language modelling: a model learns to answer, or to go on as its texts do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from adapters.errors import InputError
from pipelines.language.answer import complete
from pipelines.language.loading import LanguageModel
from studio.training.language_data import Collate, Samples
from studio.training.language_measure import measure, with_perplexity
from studio.training.task import Measures
from studio.training.tasks.language import LanguageTask


class CausalTask(LanguageTask):
    """The loss is that of the next token; only answers count, unless ``loss_on`` says otherwise."""

    name = "causal"
    peft_type = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"

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
