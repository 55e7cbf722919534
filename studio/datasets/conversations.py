"""From rows to what a language model learns: conversations, plain texts, labelled texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.errors import InputError, nearest
from studio.datasets.texts import Row, TextReport

Message = dict[str, str]

ROLES = ("system", "user", "assistant", "tool")
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
_SHOWN = 5


@dataclass(frozen=True)
class Columns:
    """How the columns are called, empty where the usual names are looked for."""

    messages: str = ""
    prompt: str = ""
    completion: str = ""
    text: str = ""
    label: str = ""


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation; ``pair`` marks a prompt with its completion, which needs no chat template."""

    number: int
    messages: tuple[Message, ...]
    pair: bool = False


@dataclass(frozen=True)
class Text:
    """A plain text, with a label (and a second text) for classification."""

    number: int
    text: str
    label: str | None = None
    second: str | None = None


_MESSAGES = ("messages", "conversations", "conversation")
_PROMPTS = ("prompt", "instruction", "question", "input")
_COMPLETIONS = ("completion", "output", "response", "answer")
_TEXTS = ("text", "sentence", "content")
_LABELS = ("label", "labels", "class", "category")
_SECONDS = ("text_pair", "sentence2", "second_text")


def conversations(report: TextReport, columns: Columns, system: str = "") -> list[Conversation | Text]:
    """Every row as a conversation, or as a plain text when the data has texts only.

    Raises:
        InputError: columns that are missing, or rows that are no conversation, named by number.
    """
    have = report.columns
    messages = _column(report, columns.messages, _MESSAGES)
    if messages:
        return _each(report, lambda row: _conversation(row, messages, system))
    prompt = _column(report, columns.prompt, _PROMPTS)
    completion = _column(report, columns.completion, _COMPLETIONS)
    if prompt and completion:
        extra = "input" if prompt == "instruction" and "input" in have else ""
        return _each(report, lambda row: _pair(row, prompt, completion, extra, system))
    text = _column(report, columns.text, _TEXTS)
    if text:
        return _each(report, lambda row: Text(row.number, _string(row, text)))
    raise InputError(
        f"'{report.source}' has the columns {', '.join(have)}, but training needs 'messages', or 'prompt' and "
        "'completion', or 'text': rename them, or say which is which (prompt_column, completion_column ...)."
    )


def labelled_texts(report: TextReport, columns: Columns) -> list[Text]:
    """Every row as a text with its label.

    Raises:
        InputError: columns that are missing, or rows without a text or label, named by number.
    """
    text = _column(report, columns.text, _TEXTS)
    label = _column(report, columns.label, _LABELS)
    if not text or not label:
        raise InputError(
            f"'{report.source}' has the columns {', '.join(report.columns)}, but classification needs a text and a "
            "label: rename them, or set text_column and label_column."
        )
    second = next((name for name in _SECONDS if name in report.columns), "")
    return _each(
        report,
        lambda row: Text(row.number, _string(row, text), _label(row, label), _string(row, second) if second else None),
    )


def plain_texts(report: TextReport, columns: Columns) -> list[Text]:
    """Every row as a text.

    Raises:
        InputError: there is no such column, or rows without a text.
    """
    text = _column(report, columns.text, _TEXTS)
    if not text:
        raise InputError(
            f"'{report.source}' has the columns {', '.join(report.columns)}, but masked language modelling needs a "
            "'text': rename it, or set text_column."
        )
    return _each(report, lambda row: Text(row.number, _string(row, text)))


# ------------------------------------------------------------------------------------------------ one row


class _Unfit(Exception):
    """Why a row cannot be used."""


def _each(report: TextReport, make: Any) -> list[Any]:
    """``make`` of every row; all rows it refuses become one error."""
    made, wrong = [], []
    for row in report.rows:
        try:
            made.append(make(row))
        except _Unfit as reason:
            wrong.append(f"{report.place(row.number)}: {reason}")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise InputError(
            f"'{report.source}' has {len(wrong)} rows that cannot be used ({'; '.join(wrong[:_SHOWN])}{more}): "
            "mend or remove them."
        )
    return made


def _column(report: TextReport, given: str, usual: Sequence[str]) -> str:
    have = report.columns
    if given and given not in have:
        raise InputError(f"'{report.source}' has no column '{given}'{nearest(given, have)}: it has {', '.join(have)}.")
    return given or next((name for name in usual if name in have), "")


def _string(row: Row, column: str, empty: bool = False) -> str:
    value = row.values.get(column)
    if value is None or (isinstance(value, str) and not value.strip() and not empty):
        raise _Unfit(f"'{column}' is empty")
    if not isinstance(value, str):
        raise _Unfit(f"'{column}' is no text but {type(value).__name__}")
    return value


def _label(row: Row, column: str) -> str:
    value = row.values.get(column)
    if value is None or not str(value).strip():
        raise _Unfit(f"'{column}' is empty")
    if isinstance(value, list | dict):
        raise _Unfit(f"'{column}' is no single label")
    return str(value).strip()


def _pair(row: Row, prompt: str, completion: str, extra: str, system: str) -> Conversation:
    asked = row.values.get(prompt)
    answered = row.values.get(completion)
    if isinstance(asked, list) and isinstance(answered, list):  # both halves as messages
        messages = _messages([*asked, *answered])
    else:
        question = _string(row, prompt)
        if extra and str(row.values.get(extra) or "").strip():
            question = f"{question}\n\n{row.values[extra]}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _string(row, completion)}]
    return Conversation(row.number, tuple(_with_system(messages, system)), pair=True)


def _conversation(row: Row, column: str, system: str) -> Conversation:
    turns = row.values.get(column)
    if not isinstance(turns, list) or not turns:
        raise _Unfit(f"'{column}' is no list of messages")
    messages = _messages(turns)
    if not any(message["role"] == "assistant" for message in messages):
        raise _Unfit("no message of the assistant, so there is nothing to learn")
    return Conversation(row.number, tuple(_with_system(messages, system)))


def _messages(turns: Sequence[Any]) -> list[Message]:
    messages = []
    for position, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise _Unfit(f"message {position} is no object with role and content")
        role = str(turn.get("role", turn.get("from", ""))).lower()
        role = _OTHER_ROLES.get(role, role)
        content = turn.get("content", turn.get("value"))
        if role not in ROLES:
            raise _Unfit(f"message {position} has the role '{role}' (known: {', '.join(ROLES)})")
        if not isinstance(content, str) or not content.strip():
            raise _Unfit(f"message {position} has no content")
        messages.append({"role": role, "content": content})
    return messages


def _with_system(messages: list[Message], system: str) -> list[Message]:
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]
