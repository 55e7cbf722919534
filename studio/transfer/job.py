"""Both jobs: the bundle while the data are there, and the transfer when they are not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters import files, formats
from adapters.errors import InputError
from adapters.formats.lora import MODEL
from adapters.formats.peft_directory import write_directory
from adapters.generation import trans_lora
from adapters.generation.trans_lora import Synthesis, TaskTemplate
from adapters.progress import Monitor, Progress, check
from pipelines.language.adapters import AdaptedModel
from pipelines.language.batches import answers as batched_answers
from pipelines.language.loading import LanguageModel, open_model, open_tokenizer
from studio import devices, library, privacy, silence
from studio.datasets.conversations import Conversation
from studio.datasets.encoding import encode_conversation, with_end
from studio.datasets.seeds import rng
from studio.library import adopt
from studio.training.drivers import trainer as driver
from studio.training.language.rows import template_of
from studio.training.session import TrainSession
from studio.training.tasks.causal import CausalTask
from studio.transfer import bundle as bundles
from studio.transfer import discriminator, rows
from studio.transfer.bundle import Bundle
from studio.transfer.schema import REPORT, PrepareTransferConfig, TransferConfig, TransferFields
from studio.transfer.student import StudentTask, Teacher
from studio.transfer.writing import Draw, Writer, collect

TEACHER, JUDGE = "teacher", "judge"
"""Names of both adapters on the source."""

FEW_SEEDS = 3

# ------------------------------------------------------------------------------------------------ prepare


def prepare(config: PrepareTransferConfig, folder: Path, monitor: Monitor, resume: bool = False) -> dict[str, Any]:
    """Make the bundle of an adapter while its data are there.

    Returns:
        ``bundle`` (path), ``rows``, ``seeds``, ``discriminator`` (measures on held-out inputs; {} without one),
        ``remarks``.

    Raises:
        InputError: an adapter, base, rows or words that cannot be used, or a discriminator no better than chance.
        adapters.errors.Cancelled: ``monitor`` asked to stop; the job can be resumed.
    """
    silence.library_warnings()
    work = folder / "work"
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    monitor.report(Progress("loading"))
    try:
        result = _prepare(config, folder, work, monitor, resume)
    except InputError:
        shutil.rmtree(work)  # rows of the data are in it; a stopped job needs them to go on
        raise
    shutil.rmtree(work)
    for remark in result["remarks"]:
        monitor.report(Progress("done", message=remark))
    return result


def _prepare(
    config: PrepareTransferConfig, folder: Path, work: Path, monitor: Monitor, resume: bool
) -> dict[str, Any]:  # fmt: skip
    """As :func:`prepare`, with what is not kept in ``work``."""
    reading = config.trained(config.base, config.data, "data", chat_template=config.chat_template)
    data = rows.read(reading)
    template = config.template(_labels(config, data), data.system, template_of(reading))
    real = _real(data.inputs, template)
    seeds = rng(config.seed, "seeds").sample(real, min(config.seeds, len(real)))
    remarks = _remarks(len(data.inputs), len(real), len(seeds))
    source = library.resolve_language(config.base)
    measured: dict[str, float] = {}
    opened = _open(config, source, template.chat_template)
    adapted = AdaptedModel(opened.model, config.base)
    adapted.add(TEACHER, library.resolve_adapter(config.adapter))  # it must fit the base
    made = work / "bundle"
    shutil.rmtree(made, ignore_errors=True)
    _copy(library.resolve_adapter(config.adapter), made / bundles.ADAPTER)
    if config.discriminator:
        discriminator.words(opened.tokenizer, template)
        chosen = _chosen(real, seeds, config)
        written = _written(config, opened, template, seeds, len(chosen), work, monitor)
        del opened, adapted
        found = _discriminator(config, source, template, chosen, seeds, written, made, work, monitor, resume)
        measured = {**asdict(found), "accuracy": found.accuracy, "p_chance": found.p_chance}
        if found.p_chance > 0.05:
            sentence = (
                f"The discriminator is no better than chance: right for {found.accepted + found.rejected} of "
                f"{found.real + found.written} inputs it was not trained on"
            )
            if not config.force:
                raise InputError(
                    f"{sentence}. Train it longer (epochs, samples), give more rows, or keep it all the same with "
                    "--force."
                )
            remarks.append(f"{sentence}.")
    name = str(privacy.names_only(config.base))
    bundles.write(
        made, name, bundles.identity(source), bundles.spelling(open_tokenizer(source, template.chat_template)),
        len(data.inputs), seeds, template, measured,
    )  # fmt: skip
    place = Path(config.out).expanduser().absolute() if config.out else folder / "bundle"
    with files.whole(place) as part:
        shutil.copytree(made, part)
    return {"bundle": str(place), "rows": len(data.inputs), "seeds": len(seeds), "discriminator": measured,
            "remarks": remarks}  # fmt: skip


def _labels(config: PrepareTransferConfig, data: rows.TaskRows) -> tuple[str, ...]:
    """The labels of a classification, which the bundle keeps; of another form, none.

    Raises:
        InputError: so many that they are the rows' own answers.
    """
    if config.form != "classification":
        return ()
    found = tuple(sorted(set(data.answers)))
    if 2 * len(found) > len(data.answers):
        raise InputError(
            f"{len(data.answers)} rows have {len(found)} different answers, which are no labels: choose another form."
        )
    return found


def _real(inputs: Sequence[str], template: TaskTemplate) -> list[str]:
    """The different inputs that fit the template.

    Raises:
        InputError: none does.
    """
    found = [text for text in dict.fromkeys(inputs) if template.takes_input(text)]
    if not found:
        raise InputError(
            f"No input of the data has the form '{template.form}' with these patterns, not even the first: "
            f"'{inputs[0][:80]}'. Correct form and input_pattern."
        )
    return found


def _remarks(rows: int, real: int, seeds: int) -> list[str]:
    found = []
    if real < rows:
        found.append(f"Of {rows} inputs {rows - real} are repeated or have another form; they are not used.")
    if seeds < FEW_SEEDS:
        found.append(f"There are only {seeds} seeds: {FEW_SEEDS} or more make more varied inputs.")
    return found


def _copy(adapter: Path, place: Path) -> None:
    """The adapter as a PEFT directory, without its recipe, card and other files.

    Raises:
        InputError: it is not a LoRA of one model.
    """
    file = formats.read(adapter)
    if set(file.parts) != {MODEL} or file.config.get("modules_to_save"):
        raise InputError(f"The adapter '{adapter.name}' is not a plain LoRA of one language model.")
    kept = {"task_type": file.config.get("task_type") or CausalTask.peft_type,
            "base_model_name_or_path": privacy.names_only(file.config.get("base_model_name_or_path"))}  # fmt: skip
    place.mkdir(parents=True)
    write_directory(place, file.parts[MODEL], {}, kept)


def _chosen(real: Sequence[str], seeds: Sequence[str], config: PrepareTransferConfig) -> list[str]:
    """The real inputs for training and measuring; seeds are trained on only."""
    others = [text for text in real if text not in seeds]
    rng(config.seed, "real inputs").shuffle(others)
    return others[: config.samples]


def _written(
    config: PrepareTransferConfig, opened: LanguageModel, template: TaskTemplate, seeds: Sequence[str], count: int,
    work: Path, monitor: Monitor,
) -> list[str]:  # fmt: skip
    """As many inputs as there are real ones, written by the source without an adapter."""
    if count < 2:
        raise InputError("The discriminator needs two different inputs or more besides the seeds: give more rows.")
    synthesis = Synthesis(count, template, seeds, None, config.tries, config.near)
    run = _digest(config.to_yaml(), *seeds)
    writer = Writer(opened, config, seeds)
    return [draw.text for draw in collect(synthesis, writer.batch, None, None, work / "written.jsonl", run, monitor)]


def _discriminator(
    config: PrepareTransferConfig, source: str, template: TaskTemplate, chosen: Sequence[str], seeds: Sequence[str],
    written: Sequence[str], made: Path, work: Path, monitor: Monitor, resume: bool,
) -> trans_lora.Judged:  # fmt: skip
    """Train it into the bundle; what it says of the inputs held out."""
    least = max(1, round(config.held_out * len(chosen)))
    measured = {True: chosen[:least], False: written[:least]}
    shown = {True: [*seeds, *chosen[least:]], False: written[least:]}
    if not shown[False]:
        raise InputError("Nothing is left to train the discriminator on: lower held_out, or give more rows.")
    lines = [discriminator.row(template, text, real) for real, texts in shown.items() for text in texts]
    data = work / "rows.jsonl"
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    files.write(data, lambda part: part.write_text(text, "utf-8"), private=True)
    tokenizer = open_tokenizer(source, template.chat_template)
    length = discriminator.longest(tokenizer, template, [text for texts in shown.values() for text in texts])
    training = config.trained(
        config.base, str(data), bundles.DISCRIMINATOR, chat_template=config.chat_template,
        max_length=max(8, length), too_long="refuse", save_every=0,
    )  # fmt: skip
    result = discriminator.train(training, template, work / "training", monitor, resume)
    _copy(Path(result["adapter"]), made / bundles.DISCRIMINATOR)
    check(monitor)
    opened = _open(config, source, template.chat_template)
    adapted = AdaptedModel(opened.model, config.base)
    adapted.add(JUDGE, made / bundles.DISCRIMINATOR)
    with adapted.active({JUDGE: 1.0}):
        found = {
            real: discriminator.margins(opened.model, opened.tokenizer, template, texts, config.batch)
            for real, texts in measured.items()
        }
    return trans_lora.judged(found[True], found[False])


# ------------------------------------------------------------------------------------------------ transfer


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
        "remarks": _remarks(0, 0, len(bundle.seeds)),
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
    teacher = _open(config, source, template.chat_template)
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
    identity = _digest(config.to_yaml(), files.sha256(bundle.folder / bundles.MANIFEST))
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
    opened = _open(config, source, bundle.template.chat_template)
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


def _open(config: TransferFields, source: str, chat_template: str) -> LanguageModel:
    return open_model(source, dtype=config.dtype, device=devices.resolve(config.device), chat_template=chat_template)


def _open_target(config: TransferConfig, source: str, chat_template: str) -> LanguageModel:
    """The target in as few bits as it is trained in."""
    return open_model(
        source, dtype=config.dtype, device=devices.resolve(config.device), chat_template=chat_template,
        quantization=config.training.get("quantization", "none"),
    )  # fmt: skip


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
