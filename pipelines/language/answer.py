"""Generating an answer: a conversation in, pieces of text out as they are generated."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from queue import Queue
from typing import Any

import torch

from adapters.errors import InputError
from pipelines.language.loading import longest_input
from pipelines.language.tokens import Sampling


def generated(
    model: Any, tokenizer: Any, inputs: dict[str, torch.Tensor], sampling: Sampling, mark: str = ""
) -> Generator[str, None, None]:
    """What the model writes after ``inputs`` (a batch of one), in pieces, up to the text ``mark``.

    Raises:
        InputError: the inputs and the answer exceed the model's context.
    """
    yield from _until(_pieces(model, tokenizer, inputs, sampling, mark), mark)


def _pieces(
    model: Any, tokenizer: Any, inputs: dict[str, torch.Tensor], sampling: Sampling, mark: str
) -> Generator[str, None, None]:
    _check_room(model, inputs["input_ids"].shape[1], sampling)
    pieces: Queue[Any] = Queue()
    asked_to_stop = threading.Event()
    options = generate_options(model, tokenizer, sampling, mark)
    worker = threading.Thread(
        target=_generate, name="answer", daemon=True,
        args=(model, inputs, tokenizer, options, sampling.seed or 0, pieces, asked_to_stop),
    )  # fmt: skip
    worker.start()
    try:
        while True:
            piece = pieces.get()
            if piece is None:
                return
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        asked_to_stop.set()
        worker.join()


def _until(pieces: Generator[str, None, None], mark: str) -> Generator[str, None, None]:
    """The text before ``mark``; text that may be the start of ``mark`` is held back until that is decided."""
    held = ""
    with closing(pieces):
        for piece in pieces:
            held += piece
            if mark and mark in held:
                held = held[: held.index(mark)]
                break
            begun = next((size for size in range(min(len(mark), len(held)), 0, -1) if held.endswith(mark[:size])), 0)
            if ready := held[: len(held) - begun]:
                yield ready
            held = held[len(held) - begun :]
    if held:
        yield held


def end_of_turn(tokenizer: Any, messages: Sequence[dict[str, str]], template: str | None = None) -> str:
    """The text that the chat template writes after an answer; empty if none, or only the end token."""
    from jinja2 import TemplateError

    chosen = tokenizer.chat_template if template is None else template
    if not chosen:
        return ""
    answered = [*messages, {"role": "assistant", "content": "x"}]
    try:
        before, after = (
            tokenizer.apply_chat_template(talk, chat_template=chosen, tokenize=False, add_generation_prompt=asked)
            for talk, asked in ((list(messages), True), (answered, False))
        )
    except TemplateError:
        return ""
    return text_after(before, after, "x", tokenizer.eos_token)


def text_after(before: str, after: str, answer: str, end: str | None) -> str:
    """What stands after ``answer`` where ``after`` is ``before`` with an answer; empty if that is only ``end``."""
    rest = after.removeprefix(before).partition(answer)[2] if after.startswith(before) else ""
    return "" if rest.strip() == (end or "") else rest.strip()


def prompt(
    tokenizer: Any, messages: Sequence[dict[str, str]], device: Any, template: str | None = None
) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` (1, length) of the conversation, up to the start of the answer.

    Raises:
        InputError: there is no message, or the last one is empty.
    """
    if not messages or not messages[-1]["content"].strip():
        raise InputError("There is nothing to answer: write a message first.")
    chosen = tokenizer.chat_template if template is None else template
    if chosen:
        made = tokenizer.apply_chat_template(
            list(messages), chat_template=chosen, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        made = tokenizer("\n".join(message["content"] for message in messages), return_tensors="pt")
    return {name: made[name].to(device) for name in ("input_ids", "attention_mask")}


def complete(model: Any, tokenizer: Any, prompts: Sequence[str], max_tokens: int, system: str = "") -> list[str]:
    """Greedy answers to single questions, one per prompt, without surrounding white space."""
    answers = []
    for question in prompts:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        inputs = prompt(tokenizer, messages, next(model.parameters()).device)
        mark = end_of_turn(tokenizer, messages)
        answers.append(written(model, tokenizer, inputs, max_tokens, mark))
    return answers


@torch.no_grad()
def written(model: Any, tokenizer: Any, inputs: dict[str, torch.Tensor], max_tokens: int, mark: str = "") -> str:
    """The greedy continuation of ``inputs`` (a batch of one) up to the text ``mark``, without surrounding space."""
    made = model.generate(**inputs, **generate_options(model, tokenizer, Sampling(max_tokens=max_tokens), mark))
    text = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text.partition(mark)[0] if mark else text).strip()


def _check_room(model: Any, length: int, sampling: Sampling) -> None:
    longest = longest_input(model.config)
    if longest is not None and length + sampling.max_tokens > longest:
        raise InputError(
            f"The conversation has {length} tokens; with {sampling.max_tokens} new ones that is more than the "
            f"{longest} this model can read: clear the conversation, or ask for fewer tokens."
        )


def generate_options(model: Any, tokenizer: Any, sampling: Sampling, mark: str = "") -> dict[str, Any]:
    """The arguments of transformers' ``generate``, which ends at the model's end tokens, and at a short ``mark``."""
    options: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens, "do_sample": sampling.temperature > 0,
        "pad_token_id": tokenizer.pad_token_id, "repetition_penalty": sampling.repetition_penalty, "use_cache": True,
    }  # fmt: skip
    if sampling.temperature > 0:
        options |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
    if ends := end_tokens(model, tokenizer, mark):
        options["eos_token_id"] = sorted(ends)
    return options


def end_tokens(model: Any, tokenizer: Any, mark: str = "") -> set[int]:
    """The tokens that end an answer: the tokenizer's, the model's, and ``mark`` if it is one token."""
    ends = {tokenizer.eos_token_id, *_as_list(getattr(model.generation_config, "eos_token_id", None))} - {None}
    if mark and len(one := tokenizer.encode(mark, add_special_tokens=False)) == 1:
        ends.add(one[0])
    return ends


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _generate(
    model: Any,
    inputs: dict[str, Any],
    tokenizer: Any,
    options: dict[str, Any],
    seed: int,
    pieces: Queue[Any],
    stop: threading.Event,
) -> None:
    """Generate in this thread; put pieces of text, an error if there is one, and finally None into ``pieces``."""
    from transformers import StoppingCriteriaList, TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                pieces.put(text)

    streamer: Any = Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopping: Any = StoppingCriteriaList([lambda ids, scores, **_: torch.full((len(ids),), stop.is_set())])
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            model.generate(**inputs, **options, streamer=streamer, stopping_criteria=stopping)
    except BaseException as error:
        pieces.put(error)
    finally:
        pieces.put(None)
