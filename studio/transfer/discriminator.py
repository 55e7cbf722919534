"""The discriminator of a transfer: a LoRA of the source that says whether a text is an input of the task.

It is a language training whose samples are the question and one word; only that word's token is learnt. Training and
judging make their tokens with the same function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.errors import InputError
from adapters.generation.trans_lora import TaskTemplate, margin
from adapters.progress import Monitor
from pipelines.language.batches import next_logits
from studio.datasets.conversations import Conversation
from studio.datasets.encoding import IGNORED, encode_conversation
from studio.training.drivers import trainer as driver
from studio.training.language.data import Samples
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.session import TrainSession
from studio.training.tasks.causal import CausalTask


@dataclass(frozen=True)
class Words:
    """Where and how yes and no differ.

    Attributes:
        yes, no: their tokens.
        offset: place of that token, from the first token of the answer.
    """

    yes: int
    no: int
    offset: int


def words(tokenizer: Any, template: TaskTemplate) -> Words:
    """The tokens of yes and no as they stand after a question.

    Raises:
        InputError: one of them is several tokens, or both begin with the same one; or there is no chat template.
    """
    found = []
    for word in (template.yes, template.no):
        ids, learnt = _asked(tokenizer, template, "x", word)
        found.append(ids[learnt.index(True) :])
    yes, no = found
    places = [place for place, (one, other) in enumerate(zip(yes, no, strict=False)) if one != other]
    if len(yes) != len(no) or len(places) != 1:
        raise InputError(
            f"The answers '{template.yes}' and '{template.no}' must be one token each for this model's tokenizer: "
            "choose other words (yes, no)."
        )
    return Words(yes[places[0]], no[places[0]], places[0])


def row(template: TaskTemplate, text: str, real: bool) -> dict[str, str]:
    """The row of one input for training."""
    return {"prompt": template.asked(text), "completion": template.yes if real else template.no}


def longest(tokenizer: Any, template: TaskTemplate, texts: Sequence[str]) -> int:
    """Tokens of the longest question with its answer, and room for an end."""
    return 2 + max(len(_asked(tokenizer, template, text, template.yes)[0]) for text in texts)


def margins(
    model: Any, tokenizer: Any, template: TaskTemplate, texts: Sequence[str], batch: int
) -> list[float]:  # fmt: skip
    """logit(Yes) - logit(No) of each text, by the model as it is now.

    Raises:
        InputError: a question that does not fit the model's context, or as :func:`words`.
    """
    if not texts:
        return []
    found = words(tokenizer, template)
    device = next(model.parameters()).device
    ids = []
    for text in texts:
        tokens, learnt = _asked(tokenizer, template, text, template.yes)
        ids.append(torch.tensor(tokens[: learnt.index(True) + found.offset], device=device))
    logits = next_logits(model, ids, tokenizer.pad_token_id, (found.yes, found.no), batch)
    return [float(one) for one in margin(logits, 0, 1)]


def train(
    config: TrainLanguageConfig, template: TaskTemplate, folder: Path, monitor: Monitor, resume: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Train it on rows of :func:`row`; as :func:`studio.training.tasks.language.run`."""
    return driver.train(TrainSession.of(JudgeTask(config, template), folder, monitor), resume)


class JudgeTask(CausalTask):
    """A causal training whose loss is that of the one token at which yes and no differ.

    Args:
        template: with the question and both answers.
    """

    learner_noun = "discriminator"

    def __init__(self, asked: TrainLanguageConfig, template: TaskTemplate) -> None:
        super().__init__(asked)
        self.task_template = template

    def encoded(self, tokenizer: Any) -> Samples:
        made, place = super().encoded(tokenizer), words(tokenizer, self.task_template).offset
        for sample in made.shown:
            labels = sample["labels"]
            only = next(at for at, label in enumerate(labels) if label != IGNORED) + place
            sample["labels"] = [label if at == only else IGNORED for at, label in enumerate(labels)]
        return made


def _asked(tokenizer: Any, template: TaskTemplate, text: str, word: str) -> tuple[list[int], list[bool | None]]:
    messages = ({"role": "user", "content": template.asked(text)}, {"role": "assistant", "content": word})
    return encode_conversation(Conversation(0, messages, pair=True), tokenizer)
