"""Inputs that a model writes from the seeds of a task, until enough of them are kept; a stopped run goes on.

Every batch depends on the seed and its number only. It is one line of a journal: what was written, what became of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters import files
from adapters.errors import InputError
from adapters.generation.trans_lora import HEAD, Synthesis, few_shot, read_input
from adapters.progress import Monitor, Progress, check
from pipelines.language.batches import encoded, sampled
from pipelines.language.loading import LanguageModel
from pipelines.language.tokens import Sampling
from studio.datasets.seeds import derive, rng
from studio.transfer.schema import TransferFields


@dataclass(frozen=True)
class Draw:
    """One kept input with the discriminator's margin and the teacher's answer, where they were asked."""

    text: str
    margin: float | None
    answer: str | None


class Writer:
    """A model that writes inputs.

    Args:
        base: without adapters.
        seeds: shown to it, in another order every time.

    Raises:
        InputError: it has no chat template but is to be asked in a chat, or cannot read the seeds and an input.
    """

    def __init__(self, base: LanguageModel, config: TransferFields, seeds: Sequence[str]) -> None:
        self.base, self.config, self.seeds = base, config, list(seeds)
        has = bool(base.tokenizer.chat_template)
        if config.prompting == "chat" and not has:
            raise InputError(f"'{base.source}' has no chat template: set prompting to 'plain' or 'auto'.")
        self.chat = has and config.prompting != "plain"
        # a base goes on after its input with whatever it likes; where no seed has an empty line, the first one ends it
        blank = () if any("\n\n" in seed for seed in seeds) else ("\n\n",)
        self.stop = (f"\n{HEAD}", *blank)
        shown = [{"role": "user", "content": few_shot(self.seeds, self.chat)}]
        needed = len(encoded(base.tokenizer, [shown], "cpu", self._template)[0]) + config.input_tokens
        if base.longest is not None and needed > base.longest:
            raise InputError(
                f"The seeds and a new input need {needed} tokens, more than the {base.longest} that '{base.source}' "
                "reads: lower input_tokens, or prepare the bundle with fewer or shorter seeds."
            )

    @property
    def _template(self) -> str | None:
        """As :func:`pipelines.language.batches.encoded` takes it: the tokenizer's own, or none."""
        return None if self.chat else ""

    def batch(self, number: int) -> list[str]:
        """The inputs of batch ``number``, as :func:`~adapters.generation.trans_lora.read_input` reads them."""
        config, talks = self.config, []
        for place in range(config.batch):
            order = list(self.seeds)
            rng(config.seed, "order of seeds", number * config.batch + place).shuffle(order)
            talks.append([{"role": "user", "content": few_shot(order, self.chat)}])
        sampling = Sampling(
            config.input_tokens, config.temperature, config.top_p, seed=derive(config.seed, "written inputs", number),
            stop=self.stop,
        )  # fmt: skip
        written = sampled(self.base.model, self.base.tokenizer, talks, sampling, self._template)
        return [read_input(text) for text in written]


def collect(
    synthesis: Synthesis,
    write: Callable[[int], list[str]],
    judge: Callable[[list[str]], list[float]] | None,
    answer: Callable[[list[str]], list[str]] | None,
    journal: Path,
    run: str,
    monitor: Monitor,
) -> list[Draw]:
    """The kept inputs, as many as ``synthesis`` wants.

    Args:
        write: the inputs of a batch by its number.
        judge: margins of inputs; None = no filter.
        answer: the teacher's answers to inputs; None = not asked.
        journal: file of earlier batches, if any; continued.
        run: identity of the run, which the journal must have.
        monitor: told how many are kept; may cancel between batches.

    Raises:
        InputError: the journal is of another run, or too few inputs are kept.
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    kept: list[Draw] = []
    batches = _earlier(journal, run)
    for draws in batches:
        for one in draws:
            synthesis.take(one["text"], one["outcome"])
            if one["outcome"] == "kept":
                kept.append(Draw(one["text"], one["margin"], one["answer"]))
    number = len(batches)
    while not synthesis.full:
        check(monitor)
        draws = _judged(synthesis, write(number), judge, answer)
        with journal.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(draws, ensure_ascii=False) + "\n")
        kept += [Draw(one["text"], one["margin"], one["answer"]) for one in draws if one["outcome"] == "kept"]
        number += 1
        monitor.report(Progress(
            "writing inputs", len(kept), synthesis.wanted, metrics={"acceptance": synthesis.acceptance},
        ))  # fmt: skip
    return kept


def _judged(
    synthesis: Synthesis,
    texts: Sequence[str],
    judge: Callable[[list[str]], list[float]] | None,
    answer: Callable[[list[str]], list[str]] | None,
) -> list[dict[str, Any]]:
    """The batch with its outcomes, up to the one that makes enough."""
    readable = list(dict.fromkeys(text for text in texts if synthesis.template.takes_input(text)))
    margins = dict(zip(readable, judge(readable), strict=True)) if judge is not None and readable else {}
    good = [text for text in readable if synthesis.judge(text, margins.get(text)) == "kept"]
    answers = dict(zip(good, answer(good), strict=True)) if answer is not None and good else {}
    draws: list[dict[str, Any]] = []
    for text in texts:
        if synthesis.full:
            break
        outcome = synthesis.judge(text, margins.get(text), answers.get(text))
        draws.append({"text": text, "outcome": outcome, "margin": margins.get(text), "answer": answers.get(text)})
        synthesis.take(text, outcome)
    return draws


def _earlier(journal: Path, run: str) -> list[list[dict[str, Any]]]:
    """The batches of an earlier run, whole ones only; begins the file if there is none."""
    if not journal.is_file():
        files.write(journal, lambda part: part.write_text(json.dumps({"run": run}) + "\n", "utf-8"), private=True)
        return []
    first, *lines = journal.read_text(encoding="utf-8").splitlines()
    if json.loads(first) != {"run": run}:
        raise InputError(f"'{journal}' belongs to another transfer: start it again instead of resuming it.")
    found, whole = [], [first]
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # a process was killed while it wrote
            break
        whole.append(line)
    text = "".join(f"{line}\n" for line in whole)
    files.write(journal, lambda part: part.write_text(text, "utf-8"), private=True)
    return found
