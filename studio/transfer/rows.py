"""Rows of a task with one question each: what the inputs and answers of a language adapter's data are."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.errors import InputError
from adapters.generation.trans_lora import normalised
from studio.datasets.conversations import Conversation
from studio.training.language import rows as reading
from studio.training.schemas.language import TrainLanguageConfig


@dataclass(frozen=True)
class TaskRows:
    """Inputs (normalised) and answers, row by row, with the one system prompt that all have (or none)."""

    inputs: tuple[str, ...]
    answers: tuple[str, ...]
    system: str


def read(config: TrainLanguageConfig) -> TaskRows:
    """The rows in ``config.data``.

    Raises:
        InputError: rows that cannot be read, plain texts, several turns, or different system prompts.
    """
    inputs, answers, systems = [], [], []
    for item in reading.read(config).shown:
        if not isinstance(item, Conversation):
            raise InputError(f"'{config.data}' holds plain texts: a transfer needs rows with a prompt and an answer.")
        *system, asked, answered = item.messages
        if [one["role"] for one in item.messages] not in (["user", "assistant"], ["system", "user", "assistant"]):
            raise InputError(
                f"Row {item.number} of '{config.data}' is not one question with one answer: a transfer needs rows of "
                "one turn."
            )
        inputs.append(normalised(asked["content"]))
        answers.append(str(answered["content"]).strip())
        systems.append(str(system[0]["content"]) if system else "")
    if len(set(systems)) > 1:
        raise InputError(f"The rows of '{config.data}' have different system prompts: a transfer takes one for all.")
    return TaskRows(tuple(inputs), tuple(answers), systems[0])
