"""From conversations and texts to tokens with labels, cut, skipped or packed to the model's length.

Labels hold the token itself where it is learnt and -100 where it is only read; models shift them by one themselves.
Packing puts several samples into one row; their positions start anew, by which the attention keeps them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters.errors import InputError
from studio.datasets.conversations import Conversation, Message, Text

IGNORED = -100
"""The label of a token that is not learnt."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A chat template for models that have none (chat_template: chatml)."""

Encoded = dict[str, list[int]]
"""``input_ids`` and ``labels`` of one sample, and ``position_ids`` when it is packed."""


@dataclass
class Encodings:
    """Samples as tokens, and what had to be left out or cut.

    Attributes:
        samples: what is trained on.
        cut, skipped: numbers of rows that were too long.
        silent: numbers of rows in which nothing was left to learn.
    """

    samples: list[Encoded] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)


def encode_all(
    items: Sequence[Conversation | Text],
    tokenizer: Any,
    *,
    max_length: int,
    too_long: str = "skip",
    loss_on: str = "completion",
) -> Encodings:
    """Tokens of every item; plain texts longer than ``max_length`` become several samples.

    Args:
        too_long: "cut" the end off, "skip" the sample, or "refuse" it.
        loss_on: "completion" learns the assistant's turns only, "all" learns every token.

    Raises:
        InputError: a row that is too long (refuse), no chat template, or nothing left to learn.
    """
    made = Encodings()
    for item in items:
        if isinstance(item, Text):
            ids = [*tokenizer.encode(item.text, add_special_tokens=True)]
            ids = ids if not ids or ids[-1] == tokenizer.eos_token_id else [*ids, *_end(tokenizer)]
            pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
            made.samples += [{"input_ids": piece, "labels": list(piece)} for piece in pieces if len(piece) > 1]
            continue
        ids, learnt = encode_conversation(item, tokenizer)
        if len(ids) > max_length:
            if too_long == "refuse":
                raise InputError(
                    f"Row {item.number} has {len(ids)} tokens, max_length is {max_length}: raise max_length, "
                    "or set too_long to 'cut' or 'skip'."
                )
            (made.cut if too_long == "cut" else made.skipped).append(item.number)
            if too_long == "skip":
                continue
            ids, learnt = ids[:max_length], learnt[:max_length]
        labels = [token if mine or loss_on == "all" else IGNORED for token, mine in zip(ids, learnt, strict=True)]
        if all(label == IGNORED for label in labels[1:]):
            made.silent.append(item.number)
            continue
        made.samples.append({"input_ids": ids, "labels": labels})
    if not made.samples:
        raise InputError(
            f"No sample is left to train on: {len(made.skipped)} are longer than max_length {max_length}, in "
            f"{len(made.silent)} the cut leaves no answer. Raise max_length, or set too_long to 'cut'."
        )
    return made


def encode_conversation(item: Conversation, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """(tokens, whether each belongs to a turn of the assistant).

    The chat template is applied to growing beginnings of the conversation, so any template works in which a turn
    does not change what stands before it.

    Raises:
        InputError: there is no chat template, or it rewrites earlier turns.
    """
    messages = list(item.messages)
    if not tokenizer.chat_template:
        if not item.pair:
            raise InputError(NO_TEMPLATE)
        return _plain_pair(messages, tokenizer)
    ids: list[int] = []
    learnt: list[bool] = []
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        ids, learnt = _grow(ids, learnt, render(tokenizer, messages[:position], True), False, item)
        ids, learnt = _grow(ids, learnt, render(tokenizer, messages[: position + 1], False), True, item)
    return ids, learnt


NO_TEMPLATE = (
    "The base model has no chat template, so it cannot read conversations: set chat_template to 'chatml' or to a "
    "Jinja file, or give rows with prompt and completion."
)


def render(tokenizer: Any, messages: Sequence[Message], answer_next: bool) -> list[int]:
    """Tokens of a conversation; ``answer_next`` ends it where the assistant begins.

    Raises:
        InputError: the template refuses these roles.
    """
    from jinja2 import TemplateError

    try:
        made = tokenizer.apply_chat_template(list(messages), add_generation_prompt=answer_next, return_dict=True)
    except TemplateError as error:
        raise InputError(f"The chat template cannot write this conversation: {error}") from None
    ids: list[int] = list(made["input_ids"])
    return ids


def _grow(
    ids: list[int], learnt: list[bool], longer: list[int], mine: bool, item: Conversation
) -> tuple[list[int], list[bool]]:
    if longer[: len(ids)] != ids:
        raise InputError(
            f"The chat template writes earlier turns differently when later ones follow (row {item.number}), so the "
            "assistant's part cannot be told apart: set loss_on to 'all' with rows of 'text', or use another template."
        )
    return longer, [*learnt, *[mine] * (len(longer) - len(ids))]


def _plain_pair(messages: Sequence[Message], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Prompt and completion written one after the other, for models without a chat template."""
    *before, answer = [message["content"] for message in messages]
    start: list[int] = tokenizer.encode("\n".join(before), add_special_tokens=True)
    if start and start[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        start = start[:-1]
    gap = "" if before[-1][-1:].isspace() or answer[:1].isspace() else " "
    rest = [*tokenizer.encode(gap + answer, add_special_tokens=False), *_end(tokenizer)]
    return [*start, *rest], [False] * len(start) + [True] * len(rest)


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def pack(samples: Sequence[Encoded], max_length: int) -> list[Encoded]:
    """Samples put together into rows of at most ``max_length``, longest first into the first row with room.

    The first token of every sample is not learnt (nothing stands before it), and positions start at 0 with it.
    """
    order = sorted(range(len(samples)), key=lambda number: -len(samples[number]["input_ids"]))
    rows: list[list[int]] = []
    room: list[int] = []
    for number in order:
        length = len(samples[number]["input_ids"])
        place = next((row for row, left in enumerate(room) if left >= length), None)
        if place is None:
            rows.append([number])
            room.append(max_length - length)
        else:
            rows[place].append(number)
            room[place] -= length
    return [_joined([samples[number] for number in row]) for row in rows]


def _joined(samples: Sequence[Encoded]) -> Encoded:
    made: Encoded = {"input_ids": [], "labels": [], "position_ids": []}
    for sample in samples:
        made["input_ids"] += sample["input_ids"]
        made["labels"] += [IGNORED, *sample["labels"][1:]]
        made["position_ids"] += range(len(sample["input_ids"]))
    return made
