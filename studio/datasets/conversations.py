"""Turns rows into what a language model learns: conversations, plain texts, labelled texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.errors import InputError, nearest
from studio.datasets.texts import Row, TextReport, left_out

Message = dict[str, Any]
"""``role`` and ``content``, and the other keys a chat template may write (:data:`PASSED`)."""

LEARN = "learn"
"""Key of an assistant's message that says whether it is learnt (absent = yes); templates do not see it."""

PASSED = ("reasoning_content", "tool_calls", "tool_call_id", "name")
"""Other keys of a message that chat templates know."""

ROLES = ("system", "user", "assistant", "tool")
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
_SHOWN = 5


@dataclass(frozen=True)
class Columns:
    """Names of the columns; empty = look for the usual names. ``kind`` is read by others, and no name is usual."""

    messages: str = ""
    prompt: str = ""
    completion: str = ""
    text: str = ""
    label: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation; ``pair`` marks a prompt with its completion, which needs no chat template; ``tools`` are
    the functions that the assistant may call, in the form chat templates expect."""

    number: int
    messages: tuple[Message, ...]
    pair: bool = False
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Text:
    """A plain text, with a label (and a second text) for classification."""

    number: int
    text: str
    label: str | None = None
    second: str | None = None


MESSAGES = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "instruction", "question", "input")
_COMPLETIONS = ("completion", "output", "response", "answer")
_TEXTS = ("text", "sentence", "content")
_LABELS = ("label", "labels", "class", "category")
_SYSTEMS = ("system", "system_prompt")
_HISTORY, _TOOLS = "history", "tools"
_WEIGHTS = ("weight", "train", "training")
_REASONS = ("reasoning_content", "reasoning", "thinking")
_SECONDS = ("text_pair", "sentence2", "second_text")


def conversations(
    report: TextReport, columns: Columns, system: str = "", skip_broken: bool = False
) -> list[Conversation | Text]:
    """Every row as a conversation, or as a plain text if the data has only texts.

    A ``system`` column, a ``history`` (pairs, or messages) and ``tools`` become parts of the conversation. Columns and
    keys of messages that are not used are named in ``report.remarks``.

    Raises:
        InputError: missing columns, or (unless ``skip_broken``) rows that are not conversations, by number.
    """
    have = report.columns
    also = [name for name in (*_SYSTEMS, _HISTORY, _TOOLS, columns.kind) if name in have]
    messages = column_of(report, columns.messages, MESSAGES)
    if messages:
        _name_unused(report, [messages, *also])
        return each(report, lambda row: _conversation(row, messages, system, report), skip_broken)
    prompt = column_of(report, columns.prompt, PROMPTS)
    completion = column_of(report, columns.completion, _COMPLETIONS)
    if prompt and completion:
        extra = "input" if prompt == "instruction" and "input" in have else ""
        _name_unused(report, [prompt, completion, extra, *also])
        return each(report, lambda row: _pair(row, prompt, completion, extra, system, report), skip_broken)
    text = column_of(report, columns.text, _TEXTS)
    if text:
        _name_unused(report, [text, columns.kind])
        return each(report, lambda row: Text(row.number, _string(row, text)), skip_broken)
    raise InputError(
        f"'{report.source}' has the columns {', '.join(have)}, but training needs 'messages', or 'prompt' and "
        "'completion', or 'text': rename them, or say which is which (prompt_column, completion_column ...)."
    )


def _name_unused(report: TextReport, used: Sequence[str]) -> None:
    unused = [name for name in report.columns if name not in used]
    if unused:
        report.remarks.append(f"columns that are not used: {', '.join(unused)}")


def labelled_texts(report: TextReport, columns: Columns, skip_broken: bool = False) -> list[Text]:
    """Every row as a text with its label.

    Raises:
        InputError: missing columns, or rows without a text or label, by number.
    """
    text = column_of(report, columns.text, _TEXTS)
    label = column_of(report, columns.label, _LABELS)
    if not text or not label:
        raise InputError(
            f"'{report.source}' has the columns {', '.join(report.columns)}, but classification needs a text and a "
            "label: rename them, or set text_column and label_column."
        )
    second = next((name for name in _SECONDS if name in report.columns), "")
    _name_unused(report, [text, label, second])
    return each(
        report,
        lambda row: Text(row.number, _string(row, text), _label(row, label), _string(row, second) if second else None),
        skip_broken,
    )


def plain_texts(report: TextReport, columns: Columns, skip_broken: bool = False) -> list[Text]:
    """Every row as a text.

    Raises:
        InputError: there is no text column, or rows without a text.
    """
    text = column_of(report, columns.text, _TEXTS)
    if not text:
        raise InputError(
            f"'{report.source}' has the columns {', '.join(report.columns)}, but masked language modelling needs a "
            "'text': rename it, or set text_column."
        )
    _name_unused(report, [text])
    return each(report, lambda row: Text(row.number, _string(row, text)), skip_broken)


# ------------------------------------------------------------------------------------------------ one row


class Unfit(Exception):
    """Why a row cannot be used."""


def each(report: TextReport, make: Any, skip_broken: bool = False) -> list[Any]:
    """``make`` of every row; the rows it refuses become one error, or a remark with ``skip_broken``."""
    made, wrong = [], []
    for row in report.rows:
        try:
            made.append(make(row))
        except Unfit as reason:
            wrong.append(f"{report.place(row.number)}: {reason}")
    if wrong and skip_broken and made:
        report.remarks.append(f"{left_out(len(wrong))} ({'; '.join(wrong[:_SHOWN])})")
    elif wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise InputError(
            f"'{report.source}' has {len(wrong)} rows that cannot be used ({'; '.join(wrong[:_SHOWN])}{more}): "
            "correct or remove them, or set skip_broken to true to leave them out."
        )
    return made


def column_of(report: TextReport, given: str, usual: Sequence[str]) -> str:
    have = report.columns
    if given and given not in have:
        raise InputError(f"'{report.source}' has no column '{given}'{nearest(given, have)}: it has {', '.join(have)}.")
    return given or next((name for name in usual if name in have), "")


def _string(row: Row, column: str, empty: bool = False) -> str:
    value = row.values.get(column)
    if value is None or (isinstance(value, str) and not value.strip() and not empty):
        raise Unfit(f"'{column}' is empty")
    if not isinstance(value, str):
        raise Unfit(f"'{column}' is not text but {type(value).__name__}")
    return value


def _label(row: Row, column: str) -> str:
    value = row.values.get(column)
    if value is None or not str(value).strip():
        raise Unfit(f"'{column}' is empty")
    if isinstance(value, list | dict):
        raise Unfit(f"'{column}' is not a single label")
    return str(value).strip()


def _pair(row: Row, prompt: str, completion: str, extra: str, system: str, report: TextReport) -> Conversation:
    asked = row.values.get(prompt)
    answered = row.values.get(completion)
    if isinstance(asked, list) and isinstance(answered, list):  # both halves as messages
        messages = _messages([*asked, *answered], report)
    else:
        question = _string(row, prompt)
        if extra and str(row.values.get(extra) or "").strip():
            question = f"{question}\n\n{row.values[extra]}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _string(row, completion)}]
    messages = [*_history(row, report), *messages]
    return Conversation(row.number, _whole(messages, row, system), pair=True, tools=_tools(row))


def _conversation(row: Row, column: str, system: str, report: TextReport) -> Conversation:
    turns = row.values.get(column)
    if not isinstance(turns, list) or not turns:
        raise Unfit(f"'{column}' is not a list of messages")
    messages = _messages(turns, report)
    if not any(message["role"] == "assistant" and message.get(LEARN, True) for message in messages):
        raise Unfit("no message from the assistant, so there is nothing to learn")
    messages = [*_history(row, report), *messages]
    return Conversation(row.number, _whole(messages, row, system), tools=_tools(row))


def _messages(turns: Sequence[Any], report: TextReport) -> list[Message]:
    messages = []
    for position, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise Unfit(f"message {position} is not an object with role and content")
        messages.append(_message(turn, position, report))
    return messages


def _message(turn: Mapping[str, Any], position: int, report: TextReport) -> Message:
    role = str(turn.get("role", turn.get("from", ""))).lower()
    role = _OTHER_ROLES.get(role, role)
    if role not in ROLES:
        raise Unfit(f"message {position} has the role '{role}' (known: {', '.join(ROLES)})")
    calls = turn.get("tool_calls")
    made: Message = {"role": role, "content": _content(turn.get("content", turn.get("value")), position, bool(calls))}
    made |= {key: turn[key] for key in PASSED if turn.get(key)}
    if calls:
        made["tool_calls"] = _calls(calls, position)
    reason = next((turn[key] for key in _REASONS if turn.get(key)), None)
    if reason is not None:
        if not isinstance(reason, str):
            raise Unfit(f"the reasoning of message {position} is not text but {type(reason).__name__}")
        made["reasoning_content"] = reason
    if role == "assistant" and not _learnt(turn, position):
        made[LEARN] = False
    _name_keys(turn, role, report)
    return made


def _content(value: Any, position: int, calls: bool) -> str:
    if isinstance(value, list):
        kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in value]
        strange = next((kind for kind in kinds if kind != "text"), None)
        if strange is not None:
            raise Unfit(f"message {position} has a part of type '{strange}': only text is read")
        value = "".join(str(part.get("text") or "") for part in value)
    if value is None and calls:
        return ""
    if value is not None and not isinstance(value, str):
        raise Unfit(f"the content of message {position} is not text but {type(value).__name__}")
    if not calls and not (value or "").strip():
        raise Unfit(f"message {position} has no content")
    return str(value)


def _calls(calls: Any, position: int) -> list[Any]:
    """Tool calls with their arguments as objects, as chat templates expect; files often hold them as JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise Unfit(f"the tool_calls of message {position} are not a list of objects")
    made = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            arguments = _json(function["arguments"], f"the arguments of a tool call in message {position}")
            call = {**call, "function": {**function, "arguments": arguments}}
        made.append(call)
    return made


def _learnt(turn: Mapping[str, Any], position: int) -> bool:
    """Whether a message is learnt, by its ``weight`` (0 or 1), ``train`` or ``training``."""
    marks = [turn[key] for key in _WEIGHTS if turn.get(key) is not None]
    if any(isinstance(mark, str) or mark not in (0, 1) for mark in marks):
        raise Unfit(f"message {position} has the weight {marks}: use 0 (read only) or 1 (learn)")
    return all(marks)


def _name_keys(turn: Mapping[str, Any], role: str, report: TextReport) -> None:
    known = {"role", "from", "content", "value", *PASSED, *_REASONS, *(_WEIGHTS if role == "assistant" else ())}
    for key in turn:
        if key not in known and turn[key] not in (None, "", [], {}):
            remark = f"the key '{key}' of messages from the {role} is not used"
            if remark not in report.remarks:
                report.remarks.append(remark)


def _history(row: Row, report: TextReport) -> list[Message]:
    """Earlier turns: pairs of question and answer, or messages."""
    value = row.values.get(_HISTORY)
    if isinstance(value, str) and value.strip():
        value = _json(value, f"'{_HISTORY}'")
    if not value:
        return []
    if not isinstance(value, list):
        raise Unfit(f"'{_HISTORY}' is not a list")
    turns: list[Any] = []
    for part in value:
        if isinstance(part, list | tuple) and len(part) == 2:
            turns += [{"role": "user", "content": part[0]}, {"role": "assistant", "content": part[1]}]
        else:
            turns.append(part)
    return _messages(turns, report)


def _tools(row: Row) -> tuple[Any, ...]:
    value = row.values.get(_TOOLS)
    if isinstance(value, str) and value.strip():
        value = _json(value, f"'{_TOOLS}'")
    if not value:
        return ()
    if not isinstance(value, list):
        raise Unfit(f"'{_TOOLS}' is not a list of functions")
    return tuple(value)


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise Unfit(f"{what} is not JSON") from None


def _whole(messages: list[Message], row: Row, system: str) -> tuple[Message, ...]:
    """The conversation, with the row's system message (else the configured one) in front unless it begins with one."""
    own = next((row.values[name] for name in _SYSTEMS if row.values.get(name)), None)
    if own is not None and not isinstance(own, str):
        raise Unfit(f"the system message is not text but {type(own).__name__}")
    if messages[0]["role"] == "system":
        if own and own.strip() and own.strip() != messages[0]["content"].strip():
            raise Unfit("the row has a system column and another system message in its conversation")
        return tuple(messages)
    text = own if own and own.strip() else system
    return ({"role": "system", "content": text}, *messages) if text else tuple(messages)
