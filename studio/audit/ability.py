"""What a model can do apart from refusing: multiple-choice questions and the perplexity of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import assets
from adapters.errors import InputError
from adapters.progress import Monitor
from studio.datasets import texts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Question:
    """A question, its choices and the place of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int


def shipped() -> Path:
    """The studio's own questions of general knowledge."""
    return assets.path("audit") / "questions.jsonl"


def read(place: str) -> list[Question]:
    """Questions from JSONL (or CSV, Parquet), as exports of MMLU, ARC and HellaSwag have them.

    Raises:
        InputError: no such file, or a row without question, choices and a right answer among them.
    """
    path = Path(place).expanduser()
    if not path.is_file():
        raise InputError(f"There is no file of questions '{place}'.")
    report = texts.scan(str(path))
    if report.broken:
        number, reason = next(iter(report.broken.items()))
        raise InputError(f"'{path.name}', {report.unit} {number}: {reason}.")
    return [_question(path.name, row.number, row.values) for row in report.rows]


def _question(file: str, number: int, values: dict[str, Any]) -> Question:
    text = values.get("question") or values.get("ctx")
    choices: Any = values.get("choices") or values.get("endings")
    labels: Any = None
    if isinstance(choices, dict):  # ARC: {"text": [...], "label": ["A", ...]}
        choices, labels = choices.get("text"), choices.get("label")
    told = next((values[name] for name in ("answer", "answerKey", "label") if values.get(name) is not None), None)
    if not (isinstance(text, str) and text.strip() and isinstance(choices, list) and len(choices) > 1):
        raise InputError(f"'{file}', row {number} needs a question and a list of at least two choices.")
    place = _place(told, [str(choice) for choice in choices], labels)
    if place is None:
        raise InputError(
            f"'{file}', row {number}: the answer '{told}' is none of its choices (a number from 0, a letter, or the "
            "text)."
        )
    return Question(text, tuple(str(choice) for choice in choices), place)


def _place(told: Any, choices: list[str], labels: Any) -> int | None:
    if isinstance(labels, list) and told in labels:
        return labels.index(told)
    if isinstance(told, str) and told in choices:
        return choices.index(told)
    if isinstance(told, str) and len(told) == 1 and told.isalpha():
        number = ord(told.upper()) - ord("A")
    elif isinstance(told, int | str) and not isinstance(told, bool) and str(told).isdigit():
        number = int(told)
    else:
        return None
    return number if number < len(choices) else None


def right(
    model: Any, tokenizer: Any, questions: Sequence[Question], batch: int = 8, monitor: Monitor | None = None
) -> list[bool]:
    """Whether the right choice of each question has the highest log-likelihood per byte (as "acc_norm")."""
    from pipelines.language.batches import likelihoods

    contexts, rests, lengths = [], [], []
    for question in questions:
        context = _ids(tokenizer, f"Question: {question.text}\nAnswer:")
        for choice in question.choices:
            contexts.append(context)
            rests.append(_ids(tokenizer, f" {choice}", special=False))
            lengths.append(len(choice.encode()))
    device = next(model.parameters()).device
    found = likelihoods(model, [c.to(device) for c in contexts], rests, tokenizer.pad_token_id, batch, monitor)
    scores = iter(value / length for value, length in zip(found, lengths, strict=True))
    results = []
    for question in questions:
        own = [next(scores) for _ in question.choices]
        results.append(max(range(len(own)), key=own.__getitem__) == question.answer)
    return results


def token_losses(model: Any, tokenizer: Any, place: str, length: int = 256, most: int = 64) -> list[float]:
    """Mean loss per token of each of the first ``most`` pieces of a text.

    Raises:
        InputError: no such file, or too little text in it.
    """
    from pipelines.language.batches import likelihoods

    path = Path(place).expanduser()
    if not path.is_file():
        raise InputError(f"There is no text file '{place}'.")
    ids = _ids(tokenizer, path.read_text(encoding="utf-8"))
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)][:most]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise InputError(f"'{place}' holds too little text to measure a perplexity on.")
    device = next(model.parameters()).device
    contexts, rests = [piece[:1].to(device) for piece in pieces], [piece[1:] for piece in pieces]
    found = likelihoods(model, contexts, rests, tokenizer.pad_token_id, 4)
    return [-value / len(rest) for value, rest in zip(found, rests, strict=True)]


def perplexity(losses: Sequence[float]) -> float:
    return math.exp(sum(losses) / len(losses))


def _ids(tokenizer: Any, text: str, special: bool = True) -> Tensor:
    found: Tensor = tokenizer(text, add_special_tokens=special, return_tensors="pt").input_ids[0]
    if len(found) == 0:
        raise InputError("A question or choice has no tokens for this model's tokenizer.")
    return found
