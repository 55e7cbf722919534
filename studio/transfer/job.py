"""The second job: the transfer, when the data are gone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters import files
from adapters.errors import InputError
from adapters.generation import trans_lora
from adapters.generation.trans_lora import Synthesis
from adapters.progress import Monitor, Progress, check
from pipelines.language.adapters import AdaptedModel
from pipelines.language.batches import answers as batched_answers
from pipelines.language.loading import LanguageModel, open_tokenizer
from studio import library, privacy, silence
from studio.datasets.conversations import Conversation
from studio.datasets.encoding import encode_conversation, with_end
from studio.library import adopt
from studio.training.drivers import trainer as driver
from studio.training.language.rows import template_of
from studio.training.session import TrainSession
from studio.transfer import bundle as bundles
from studio.transfer import discriminator, rows
from studio.transfer.bundle import Bundle
from studio.transfer.schema import REPORT, TransferConfig
from studio.transfer.shared import JUDGE, TEACHER, digest, on_seeds, open_base
from studio.transfer.student import StudentTask, Teacher
from studio.transfer.writing import Draw, Writer, collect


def run(config: TransferConfig, folder: Path, monitor: Monitor, resume: bool = False) -> dict[str, Any]:
    """Move the adapter of a bundle to another base.

    Returns:
        ``adapter`` (path), ``examples`` (path of what it learnt from), ``kept``, ``drawn``, ``acceptance``,
        ``outcomes``, ``distinct_1``, ``distinct_2``, loss, steps and validation of the training, ``test`` (shares of
        exact answers; {} without test rows), ``remarks``; ``report.json`` in ``folder`` has the same.

    Raises:
        InputError: a bundle, base or rows that cannot be used, or too few inputs that are kept.
        FamilyError: the source is another base than the bundle's.
        adapters.errors.Cancelled: ``monitor`` asked to stop; the job can be resumed.
    """
    silence.library_warnings()
    folder.mkdir(parents=True, exist_ok=True)
    monitor.report(Progress("loading"))
    bundle = bundles.read(config.bundle)
    if config.filter:
        bundles.check_discriminator(bundle)
    source, target = library.resolve_language(config.base or bundle.base), library.resolve_language(config.to)
    bundles.check_base(bundle, source, config.base or bundle.base)
    journal = folder / "written.jsonl"
    if not resume:
        journal.unlink(missing_ok=True)
    test = _test_rows(config, bundle)
    own = template_of(config.trained(config.to, "data.jsonl", "data", chat_template=config.chat_template))
    if config.teacher == "kl" and bundles.spelling(open_tokenizer(target, own)) != bundle.tokenizer_sha256:
        raise InputError(
            f"'{config.to}' has another tokenizer or chat template than '{bundle.base}', so their probabilities are of "
            "different tokens: set teacher to 'hard'."
        )
    synthesis, draws, before = _synthetic(config, bundle, source, target, own, test, journal, monitor)
    examples = _examples(folder / "synthetic.jsonl", draws)
    tokenizer = open_tokenizer(target, own)
    training = config.trained(
        config.to, str(examples), config.name, system_prompt=bundle.template.system,
        chat_template=config.chat_template, use_dora=config.peft == "dora", validation_split=config.validation_split,
        max_length=_longest(tokenizer, bundle.template.system, draws), too_long="refuse",
    )  # fmt: skip
    told = {"method": trans_lora.METHOD.name, "source": bundle.base, "inputs": len(draws),
            "acceptance": round(synthesis.acceptance, 4), "filtered": config.filter}  # fmt: skip
    tokens = config.virtual_tokens if config.peft == "prompt" else 0
    teacher = _soft_teacher(config, bundle, source) if config.teacher == "kl" else None
    student = StudentTask(training, told, tokens, teacher)
    session = TrainSession.of(student, folder / "training", monitor)
    trained = driver.train(session, resume)
    tested = _after(config, target, own, bundle, test, Path(trained["adapter"]), before, monitor)
    texts = [draw.text for draw in draws]
    kept = ("adapter", "card", "loss", "first_loss", "steps", "seconds", "parameters", "validation", "warning")
    result = {
        **{name: trained[name] for name in kept if name in trained},
        "examples": str(examples), "kept": len(draws), "drawn": synthesis.drawn, "acceptance": synthesis.acceptance,
        "outcomes": dict(synthesis.counts), "distinct_1": trans_lora.distinct(texts, 1),
        "distinct_2": trans_lora.distinct(texts, 2), "test": tested,
        "remarks": on_seeds(len(bundle.seeds)),
    }  # fmt: skip
    files.write_text(folder / REPORT, json.dumps(privacy.names_only(result), indent=1) + "\n")
    return result


def kept(config: TransferConfig, result: dict[str, Any]) -> dict[str, Any]:
    """Copy the new adapter into the library, which holds no learnt tokens; returns the result with its name there."""
    return result if config.peft == "prompt" else adopt.trained(config, result)


@dataclass(frozen=True)
class _Test:
    """Test rows: inputs and the right answers."""

    inputs: Sequence[str]
    answers: Sequence[str]


def _synthetic(
    config: TransferConfig, bundle: Bundle, source: str, target: str, own: str, test: _Test, journal: Path,
    monitor: Monitor,
) -> tuple[Synthesis, list[Draw], dict[str, float]]:  # fmt: skip
    """The examples, and the shares of test rows that the source with its adapter and the target alone answer."""
    template = bundle.template
    student = _open_target(config, target, own)
    if student.tokenizer.eos_token_id is None:
        raise InputError(f"The target '{config.to}' has no end token, so it could not learn where an answer ends.")
    teacher = open_base(config, source, template.chat_template)
    bundles.check_tokenizer(bundle, teacher.tokenizer, config.base or bundle.base)
    adapted = AdaptedModel(teacher.model, config.base or bundle.base)
    adapted.add(TEACHER, bundle.adapter)
    if config.filter:
        adapted.add(JUDGE, bundle.folder / bundles.DISCRIMINATOR)

    def judge(texts: list[str]) -> list[float]:
        with adapted.active({JUDGE: 1.0}):
            return discriminator.margins(teacher.model, teacher.tokenizer, template, texts, config.batch)

    def answer(texts: list[str]) -> list[str]:
        with adapted.active({TEACHER: 1.0}):
            return _answered(teacher, template.system, texts, config)

    synthesis = Synthesis(
        config.count or bundle.rows, template, bundle.seeds, config.tau if config.filter else None, config.tries,
        config.near,
    )  # fmt: skip
    identity = digest(config.to_yaml(), files.sha256(bundle.folder / bundles.MANIFEST))
    writer = Writer(student, config, bundle.seeds)
    draws = collect(synthesis, writer.batch, judge if config.filter else None, answer, journal, identity, monitor)
    before = {}
    if test.inputs:
        before["source"] = _right(answer, test, monitor, config.batch)
        before["target base"] = _right(
            lambda texts: _answered(student, template.system, texts, config), test, monitor, config.batch
        )
    return synthesis, draws, before


def _answered(base: LanguageModel, system: str, texts: Sequence[str], config: TransferConfig) -> list[str]:
    """Greedy answers; one that does not end within ``answer_tokens`` is empty."""
    first = [{"role": "system", "content": system}] if system else []
    talks = [[*first, {"role": "user", "content": text}] for text in texts]
    found = batched_answers(base.model, base.tokenizer, talks, config.answer_tokens, config.batch)
    # an answer of several end tokens (a template's mark) is shorter than its tokens
    return [
        one.text if len(one.ids) < config.answer_tokens or _cut(base.tokenizer, one.ids, one.text) else ""
        for one in found
    ]


def _cut(tokenizer: Any, ids: Any, text: str) -> bool:
    return len(tokenizer.decode(ids, skip_special_tokens=True).strip()) > len(text)


def _soft_teacher(config: TransferConfig, bundle: Bundle, source: str) -> Teacher:
    """The logits of the source with its adapter."""
    opened = open_base(config, source, bundle.template.chat_template)
    adapted = AdaptedModel(opened.model, bundle.base)
    adapted.add(TEACHER, bundle.adapter)

    def logits(given: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad(), adapted.active({TEACHER: 1.0}):
            found: Tensor = opened.model(**given).logits
        return found

    return logits


def _examples(place: Path, draws: Sequence[Draw]) -> Path:
    lines = [{"prompt": draw.text, "completion": draw.answer, **({} if draw.margin is None else
              {"margin": draw.margin})} for draw in draws]  # fmt: skip
    return files.write_text(place, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _longest(tokenizer: Any, system: str, draws: Sequence[Draw]) -> int:
    """Tokens of the longest example for the target."""
    first = ({"role": "system", "content": system},) if system else ()
    lengths = []
    for number, draw in enumerate(draws, 1):
        messages = (*first, {"role": "user", "content": draw.text}, {"role": "assistant", "content": draw.answer})
        item = Conversation(number, messages, pair=True)
        lengths.append(len(with_end(item, *encode_conversation(item, tokenizer), tokenizer)[0]))
    return max(lengths)


def _test_rows(config: TransferConfig, bundle: Bundle) -> _Test:
    """Rows to measure on, without the seeds."""
    if not config.test_data:
        return _Test((), ())
    found = rows.read(config.trained(config.to, config.test_data, "data"))
    pairs = [pair for pair in zip(found.inputs, found.answers, strict=True) if pair[0] not in bundle.seeds]
    if not pairs:
        raise InputError(f"'{config.test_data}' has no row besides the seeds of the bundle.")
    chosen = pairs[: config.test_limit]
    return _Test([text for text, _ in chosen], [answer for _, answer in chosen])


def _right(
    answer: Callable[[list[str]], list[str]], test: _Test, monitor: Monitor, batch: int
) -> float:  # fmt: skip
    """Share of the test rows that are answered exactly."""
    right = 0
    for start in range(0, len(test.inputs), batch):
        check(monitor)
        made = answer(list(test.inputs[start : start + batch]))
        right += sum(one == other for one, other in zip(made, test.answers[start : start + batch], strict=True))
        monitor.report(Progress("testing", start + len(made), len(test.inputs)))
    return right / len(test.inputs)


def _after(
    config: TransferConfig, target: str, own: str, bundle: Bundle, test: _Test, adapter: Path,
    before: dict[str, float], monitor: Monitor,
) -> dict[str, float]:  # fmt: skip
    """The shares of exact answers with that of the new adapter; {} without test rows."""
    if not test.inputs:
        return {}
    opened = _open_target(config, target, own)

    def answer(texts: list[str]) -> list[str]:
        return _answered(opened, bundle.template.system, texts, config)

    if config.peft == "prompt":
        from peft import PeftModel

        opened.model = PeftModel.from_pretrained(opened.model, adapter).eval()
        share = _right(answer, test, monitor, config.batch)
    else:
        adapted = AdaptedModel(opened.model, config.to)
        adapted.add(config.name, adapter)
        with adapted.active({config.name: 1.0}):
            share = _right(answer, test, monitor, config.batch)
    return {"rows": len(test.inputs), **before, "transferred": share}


def _open_target(config: TransferConfig, source: str, chat_template: str) -> LanguageModel:
    """The target in as few bits as it is trained in."""
    return open_base(config, source, chat_template, config.training.get("quantization", "none"))
