"""Turns conversations and texts into tokens with labels; long ones are cut or skipped, short ones packed.

Labels hold the token itself where it is learnt and -100 where it is only read; models shift them by one themselves.
Packing puts several samples into one row; each starts again at position 0, which keeps them apart in attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters.errors import InputError
from studio.datasets.conversations import LEARN, PASSED, Conversation, Message, Text

IGNORED = -100
"""Label of a token that is not learnt."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A chat template for models that have none (chat_template: chatml)."""

Encoded = dict[str, list[int]]
"""``input_ids`` and ``labels`` of one sample, ``position_ids`` when it is packed, ``task_types`` where rows have a "
"type."""


@dataclass
class Encodings:
    """Samples as tokens, and what had to be left out or cut.

    Attributes:
        samples: what is trained on; ``numbers``: the row each comes from.
        cut, skipped: numbers of rows that were too long.
        silent: numbers of rows with nothing left to learn.
        ended: numbers of rows that got an end token because the template writes none.
    """

    samples: list[Encoded] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)


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
            ids = _one_start(tokenizer.encode(item.text, add_special_tokens=True), tokenizer)
            ids = _one_end(ids, tokenizer) if ids else ids
            pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
            if len(pieces) > 1 and len(pieces[-1]) == 1:  # the first token of a piece is not learnt
                pieces[-1] = ids[-2:]
            kept = [{"input_ids": piece, "labels": list(piece)} for piece in pieces if len(piece) > 1]
            made.samples += kept
            made.numbers += [item.number] * len(kept)
            continue
        ids, learnt = encode_conversation(item, tokenizer)
        ids, learnt, ended = with_end(item, ids, learnt, tokenizer)
        if ended:
            made.ended.append(item.number)
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
        wanted = (True, False) if loss_on == "all" else (True,)
        labels = [token if mine in wanted else IGNORED for token, mine in zip(ids, learnt, strict=True)]
        if all(label == IGNORED for label in labels[1:]):
            made.silent.append(item.number)
            continue
        made.samples.append({"input_ids": ids, "labels": labels})
        made.numbers.append(item.number)
    if not made.samples:
        raise InputError(
            f"No sample is left to train on: {len(made.skipped)} are longer than max_length {max_length}, in "
            f"{len(made.silent)} the cut leaves no answer. Raise max_length, or set too_long to 'cut'."
        )
    return made


def encode_conversation(item: Conversation, tokenizer: Any) -> tuple[list[int], list[bool | None]]:
    """(tokens, whether each belongs to a turn of the assistant; None = never learnt, by the turn's weight).

    The chat template is applied to growing prefixes of the conversation, so any template works in which a turn does
    not change earlier ones.

    Raises:
        InputError: there is no chat template, it refuses the row or drops part of it, or it rewrites earlier turns.
    """
    template = tokenizer.chat_template
    messages = [_fitted(message, str(template or ""), item) for message in item.messages]
    if not template:
        if not item.pair:
            raise InputError(NO_TEMPLATE)
        return _plain_pair(messages, tokenizer)
    if item.tools and "tools" not in str(template):
        raise InputError(f"Row {item.number} has tools, which the chat template does not write: {_OTHER_TEMPLATE}")
    ids: list[int] = []
    learnt: list[bool | None] = []
    try:
        for position, message in enumerate(item.messages):
            if message["role"] != "assistant":
                continue
            turn = render(tokenizer, messages[: position + 1], False, item.tools)
            if position:
                before = render(tokenizer, messages[:position], True, item.tools)
            else:
                before = _opening(turn, tokenizer, item)
            ids, learnt = grow(ids, learnt, before, False, item)
            ids, learnt = grow(ids, learnt, turn, True if message.get(LEARN, True) else None, item)
    except _TemplateError as error:
        raise InputError(f"The chat template cannot write row {item.number}: {error}") from None
    return ids, learnt


def with_end(
    item: Conversation, ids: list[int], learnt: list[bool | None], tokenizer: Any
) -> tuple[list[int], list[bool | None], bool]:
    """The tokens with an end token after a last answer that the chat template leaves open, and whether it was added."""
    if not (item.messages[-1].get(LEARN, True) and _endless(ids, learnt, tokenizer)):
        return ids, learnt, False
    return [*ids, *_end(tokenizer)], [*learnt, *[True] * len(_end(tokenizer))], True


_OTHER_TEMPLATE = "use a base or chat_template that does, or take them out."


def _fitted(message: Message, template: str, item: Conversation) -> Message:
    """A message as the template expects it; reasoning it does not know becomes a <think> part of the answer."""
    made = {key: value for key, value in message.items() if key != LEARN}
    if "tool_calls" in made and "tool_calls" not in template:
        raise InputError(f"Row {item.number} has tool_calls, which the chat template does not write: {_OTHER_TEMPLATE}")
    if "reasoning_content" in made and "reasoning_content" not in template:
        made["content"] = f"<think>\n{made.pop('reasoning_content')}\n</think>\n\n{made['content']}"
    return made


def _opening(turn: list[int], tokenizer: Any, item: Conversation) -> list[int]:
    """The beginning of a conversation that the assistant opens, up to the answer itself."""
    asked: list[Message] = [{"role": "user", "content": "?"}]
    head = render(tokenizer, asked, True)[len(render(tokenizer, asked, False)) :]
    for start in range(len(turn) - len(head) + 1):
        if head and turn[start : start + len(head)] == head:
            return turn[: start + len(head)]
    raise InputError(
        f"Row {item.number} begins with the assistant, whose part this chat template does not mark there: begin it "
        "with a message from the user."
    )


def unwritten(items: Sequence[Any], template: str) -> list[str]:
    """Sentences on keys of messages that the rows have and the template does not write."""
    keys = {key for item in items if isinstance(item, Conversation) for message in item.messages for key in message}
    lost = [key for key in PASSED if key in keys and key not in template and key not in ("reasoning_content",)]
    said = [f"the chat template does not write '{key}' of messages" for key in lost]
    if "reasoning_content" in keys and "reasoning_content" not in template:
        said.append("reasoning is written as a <think> part of the answer, since the chat template has no place for it")
    return said


NO_TEMPLATE = (
    "The base model has no chat template, so it cannot read conversations: set chat_template to 'chatml' or to a "
    "Jinja file, or give rows with prompt and completion."
)


class _TemplateError(Exception):
    """The template cannot write a conversation."""


def render(tokenizer: Any, messages: Sequence[Message], answer_next: bool, tools: Sequence[Any] = ()) -> list[int]:
    """Tokens of a conversation; ``answer_next`` ends it where the assistant begins."""
    from jinja2 import TemplateError

    try:
        made = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=answer_next, return_dict=True, tools=list(tools) or None
        )
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _TemplateError(str(error)) from None
    ids: list[int] = list(made["input_ids"])
    return ids


def grow(
    ids: list[int], learnt: list[bool | None], longer: list[int], mine: bool | None, item: Conversation
) -> tuple[list[int], list[bool | None]]:
    """Tokens and marks of a longer part of the conversation, whose new tokens are ``mine`` (the assistant's)."""
    if longer[: len(ids)] != ids:
        raise InputError(
            f"The chat template writes earlier turns differently when later ones follow (row {item.number}), so the "
            "assistant's part cannot be told apart: set loss_on to 'all' with rows of 'text', or use another template."
        )
    return longer, [*learnt, *[mine] * (len(longer) - len(ids))]


def _endless(ids: Sequence[int], learnt: Sequence[bool | None], tokenizer: Any) -> bool:
    """Whether the last answer has no special token at its end, so that nothing tells the model to stop."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(token for token, what in added.items() if what.special)}
    for token, mine in zip(reversed(ids), reversed(learnt), strict=True):
        if not mine or token in special:
            return not mine and bool(_end(tokenizer))
        if tokenizer.decode([token]).strip():  # white space may follow the end
            break
    return bool(_end(tokenizer))


def _one_start(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """The tokens without the second start token of a text that has its own."""
    double = len(ids) > 1 and tokenizer.bos_token_id is not None and ids[0] == ids[1] == tokenizer.bos_token_id
    return list(ids[1:] if double else ids)


def _one_end(ids: Sequence[int], tokenizer: Any) -> list[int]:
    return list(ids) if ids and ids[-1] == tokenizer.eos_token_id else [*ids, *_end(tokenizer)]


def _plain_pair(messages: Sequence[Message], tokenizer: Any) -> tuple[list[int], list[bool | None]]:
    """The prompt followed by the completion, for models without a chat template."""
    *before, answer = [message["content"] for message in messages]
    start = _one_start(tokenizer.encode("\n".join(before), add_special_tokens=True), tokenizer)
    if start and start[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        start = start[:-1]
    gap = "" if before[-1][-1:].isspace() or answer[:1].isspace() else " "
    rest = _one_end(tokenizer.encode(gap + answer, add_special_tokens=False), tokenizer)
    return [*start, *rest], [*[False] * len(start), *[True] * len(rest)]


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def pack(samples: Sequence[Encoded], max_length: int) -> list[Encoded]:
    """Put samples together into rows of at most ``max_length`` tokens, longest first into the first row with room.

    The first token of every sample is not learnt (nothing precedes it), and its position is 0.
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
