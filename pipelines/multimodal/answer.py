"""Answering questions about pictures: a conversation with pictures in, pieces of text out as they are generated."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch

from adapters.errors import InputError
from pipelines.language.answer import generated, text_after, written
from pipelines.language.tokens import Sampling
from pipelines.multimodal.loading import VisionLanguageModel
from pipelines.multimodal.messages import PLACE, with_pictures

Message = Mapping[str, Any]


def inputs_of(
    base: VisionLanguageModel, messages: Sequence[Message], answer_next: bool = True
) -> dict[str, torch.Tensor]:
    """The model's inputs (batch of one, on its device and in its precision) for a conversation.

    Args:
        messages: with contents as lists of parts (:func:`~pipelines.multimodal.messages.with_pictures`).
        answer_next: the conversation ends where the answer begins.

    Raises:
        InputError: the chat template or the processor refuses the conversation.
    """
    made = processed(base.processor, [messages], answer_next)
    return {name: onto(value, base) for name, value in made.items()}


def onto(value: torch.Tensor, base: VisionLanguageModel) -> torch.Tensor:
    """An input on the model's device; pixels in its precision."""
    return value.to(base.device, base.model.dtype if value.is_floating_point() else None)


def processed(processor: Any, talks: Sequence[Sequence[Message]], answer_next: bool) -> dict[str, torch.Tensor]:
    """The processor's tensors for conversations of equal or unequal length (padded on the right).

    Raises:
        InputError: the chat template or the processor refuses a conversation.
    """
    from jinja2 import TemplateError

    try:
        made = processor.apply_chat_template(
            [[dict(message) for message in talk] for talk in talks], add_generation_prompt=answer_next, tokenize=True,
            return_dict=True, processor_kwargs={"return_tensors": "pt", "padding": True},
        )  # fmt: skip
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        raise InputError(f"The processor cannot read this conversation: {error}") from None
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}


def end_of_turn(base: VisionLanguageModel, messages: Sequence[Message]) -> str:
    """The text that the chat template writes after an answer; empty if none, or only the end token."""
    from jinja2 import TemplateError

    answered = [*messages, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
    try:
        before, after = (
            base.processor.apply_chat_template(
                [dict(message) for message in talk], tokenize=False, add_generation_prompt=asked
            )
            for talk, asked in ((messages, True), (answered, False))
        )
    except TemplateError:
        return ""
    return text_after(before, after, "x", base.tokenizer.eos_token)


def stream(
    base: VisionLanguageModel, model: Any, messages: Sequence[Message], pictures: Sequence[Any], sampling: Sampling
) -> Generator[str, None, None]:
    """The answer in pieces; closing the generator stops the model.

    Args:
        model: the base's model, with or without adapters.
        messages: ``role`` and ``content`` each, with a place for every picture.
        pictures: PIL images.

    Raises:
        InputError: the last message is empty, pictures and places do not match, or the conversation and its answer
            exceed the model's context.
    """
    if not messages or not str(messages[-1]["content"]).replace(PLACE, "").strip():
        raise InputError("There is nothing to answer: write a question first.")
    talk = with_pictures(messages, pictures)
    yield from generated(model, base.tokenizer, inputs_of(base, talk), sampling, end_of_turn(base, talk))


def answer(
    base: VisionLanguageModel, model: Any, messages: Sequence[Message], pictures: Sequence[Any], max_tokens: int
) -> str:
    """The greedy answer, without surrounding white space."""
    talk = with_pictures(messages, pictures)
    return written(model, base.tokenizer, inputs_of(base, talk), max_tokens, end_of_turn(base, talk))
