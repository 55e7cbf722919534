"""Many conversations through one model at a time, padded on the left: answers, likelihoods, hidden states.

The padding is masked and never counted in positions, so a conversation's result does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters.errors import InputError
from adapters.progress import Monitor, Progress, Silent, check
from pipelines.language.answer import end_of_turn, generate_options, prompt
from pipelines.language.loading import longest_input
from pipelines.language.tokens import Sampling, generator

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        text: up to the end of the turn.
        ids: its tokens (n,).
        first: log-probabilities of its first token (vocabulary,), fp32.
    """

    text: str
    ids: Tensor
    first: Tensor


def encoded(tokenizer: Any, conversations: Sequence[Messages], device: Any, template: str | None = None) -> list[Any]:
    """Token ids (n,) of each conversation up to the start of the answer."""
    return [prompt(tokenizer, talk, device, template)["input_ids"][0] for talk in conversations]


def padded(ids: Sequence[Tensor], pad: int) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``position_ids`` (batch, longest), padded on the left."""
    longest = max(len(one) for one in ids)
    rows = torch.full((len(ids), longest), pad, dtype=torch.long, device=ids[0].device)
    mask = torch.zeros_like(rows)
    for row, one in enumerate(ids):
        rows[row, longest - len(one) :], mask[row, longest - len(one) :] = one, 1
    return {"input_ids": rows, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Messages],
    max_tokens: int = 128,
    batch: int = 8,
    template: str | None = None,
    monitor: Monitor | None = None,
) -> list[Answer]:
    """Greedy answers, in the order of ``conversations``; similar lengths are batched together.

    Args:
        template: as for :func:`pipelines.language.answer.stream`.
        monitor: told "answering"; may cancel.

    Raises:
        InputError: a conversation that does not fit the model's context, or a model that computes no numbers (NaN).
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    ids = encoded(tokenizer, conversations, next(model.parameters()).device, template)
    _check_lengths(model, ids, max_tokens)
    made: dict[int, Answer] = {}
    for places in _batches(ids, batch, "answering", monitor):
        mark = end_of_turn(tokenizer, conversations[places[0]], template)
        options = generate_options(model, tokenizer, Sampling(max_tokens=max_tokens), mark)
        inputs = padded([ids[place] for place in places], tokenizer.pad_token_id)
        inputs.pop("position_ids")  # generate makes its own from the mask
        out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
        first = torch.log_softmax(out.logits[0].float(), dim=-1).cpu()
        if not bool(first.isfinite().any(dim=-1).all()):
            raise InputError("The model computes no numbers (NaN): the adapter or the base is damaged.")
        for row, place in enumerate(places):
            written = _written(out.sequences[row, inputs["input_ids"].shape[1] :], options.get("eos_token_id", []))
            text = tokenizer.decode(written, skip_special_tokens=True)
            made[place] = Answer((text.partition(mark)[0] if mark else text).strip(), written.cpu(), first[row])
    return [made[place] for place in range(len(ids))]


@torch.no_grad()
def sampled(
    model: Any, tokenizer: Any, conversations: Sequence[Messages], sampling: Sampling, template: str | None = None
) -> list[str]:
    """Random answers as one batch, up to the first of ``sampling.stop``; one seed gives the same on one machine.

    Of ``sampling`` count max_tokens, temperature, top_p, top_k, repetition_penalty, seed and stop.

    Raises:
        InputError: a conversation that does not fit the model's context, or a model that computes no numbers (NaN).
    """
    from transformers import StoppingCriteriaList

    device = next(model.parameters()).device
    ids = encoded(tokenizer, conversations, device, template)
    _check_lengths(model, ids, sampling.max_tokens)
    mark = end_of_turn(tokenizer, conversations[0], template)
    stops = [*filter(None, [mark]), *sampling.stop]
    inputs = padded(ids, tokenizer.pad_token_id)
    inputs.pop("position_ids")  # generate makes its own from the mask
    start = inputs["input_ids"].shape[1]

    def text(row: Tensor) -> str:
        return str(tokenizer.decode(row[start:], skip_special_tokens=True))

    def ended(rows: Tensor, scores: Any, **more: Any) -> Tensor:
        return torch.tensor([any(stop in text(row) for stop in stops) for row in rows], device=device)

    options = generate_options(model, tokenizer, sampling, mark)
    if sampling.temperature > 0:
        options["top_k"] = sampling.top_k
    criteria: Any = StoppingCriteriaList([ended] if stops else [])
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(generator(sampling.seed).initial_seed())
        try:
            rows = model.generate(**inputs, **options, stopping_criteria=criteria)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise InputError("The model computes no numbers (NaN): the adapter or the base is damaged.") from None
    found = []
    for row in rows:
        written = text(row)
        found.append(written[: min((written.index(stop) for stop in stops if stop in written), default=len(written))])
    return found


@torch.no_grad()
def next_logits(
    model: Any, ids: Sequence[Tensor], pad: int, tokens: Sequence[int], batch: int = 8, monitor: Monitor | None = None
) -> Tensor:  # fmt: skip
    """Logits of ``tokens`` after each of ``ids`` (n,), as (len(ids), len(tokens)), fp32 on the CPU.

    Raises:
        InputError: one of ``ids`` is longer than the model's context.
    """
    _check_lengths(model, ids, 0)
    found: dict[int, Tensor] = {}
    for places in _batches(ids, batch, "reading", monitor):
        logits = model(**padded([ids[place] for place in places], pad)).logits[:, -1, list(tokens)]
        found |= dict(zip(places, logits.float().cpu(), strict=True))
    return torch.stack([found[place] for place in range(len(ids))])


@torch.no_grad()
def likelihoods(
    model: Any,
    contexts: Sequence[Tensor],
    continuations: Sequence[Tensor],
    pad: int,
    batch: int = 8,
    monitor: Monitor | None = None,
) -> list[float]:
    """Sum of log p of each continuation's tokens (m,) after its context (n,), m and n at least 1."""
    ids = [torch.cat([context, rest.to(context)]) for context, rest in zip(contexts, continuations, strict=True)]
    _check_lengths(model, ids, 0)
    found: dict[int, float] = {}
    for places in _batches(ids, batch, "reading", monitor):
        inputs = padded([ids[place] for place in places], pad)
        longest = max(len(continuations[place]) for place in places)
        logits = model(**inputs).logits[:, -longest - 1 : -1].float()
        scores = torch.log_softmax(logits, -1).gather(2, inputs["input_ids"][:, -longest:, None])[..., 0]
        for row, place in enumerate(places):
            found[place] = float(scores[row, longest - len(continuations[place]) :].sum())
    return [found[place] for place in range(len(ids))]


@torch.no_grad()
def last_states(
    model: Any, ids: Sequence[Tensor], pad: int, batch: int = 8, monitor: Monitor | None = None
) -> Tensor:  # fmt: skip
    """Hidden states after each block at the last token, (len(ids), layers, width), fp32 on the CPU."""
    found: dict[int, Tensor] = {}
    for places in _batches(ids, batch, "reading", monitor):
        states = model(**padded([ids[place] for place in places], pad), output_hidden_states=True).hidden_states
        stacked = torch.stack([state[:, -1].float().cpu() for state in states[1:]], dim=1)
        found |= dict(zip(places, stacked, strict=True))
    return torch.stack([found[place] for place in range(len(ids))])


def _batches(ids: Sequence[Tensor], size: int, stage: str, monitor: Monitor | None) -> Iterator[list[int]]:
    """Places of the items of each batch, longest first."""
    monitor = monitor or Silent()
    order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
    for start in range(0, len(order), size):
        check(monitor)
        yield order[start : start + size]
        monitor.report(Progress(stage, min(start + size, len(order)), len(order)))


def _written(ids: Tensor, ends: Sequence[int]) -> Tensor:
    """The tokens before the first end token."""
    stops = torch.isin(ids, torch.as_tensor(list(ends), device=ids.device)).nonzero()
    return ids[: int(stops[0])] if len(stops) else ids


def _check_lengths(model: Any, ids: Sequence[Tensor], new: int) -> None:
    most = longest_input(model.config)
    longest = max((len(one) for one in ids), default=0) + new
    if most is not None and longest > most:
        raise InputError(
            f"The longest prompt and its answer have {longest} tokens, more than the {most} this model can read: "
            "shorten it, or ask for fewer new tokens."
        )
