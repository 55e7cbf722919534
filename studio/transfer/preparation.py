"""The first job: a bundle of an adapter, made while its data are there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapters import files, formats
from adapters.errors import InputError
from adapters.formats.lora import MODEL
from adapters.formats.peft_directory import write_directory
from adapters.generation import trans_lora
from adapters.generation.trans_lora import Synthesis, TaskTemplate
from adapters.progress import Monitor, Progress, check
from pipelines.language.adapters import AdaptedModel
from pipelines.language.loading import LanguageModel, open_tokenizer
from studio import library, privacy, silence
from studio.datasets.seeds import rng
from studio.training.language.rows import template_of
from studio.training.tasks.causal import CausalTask
from studio.transfer import bundle as bundles
from studio.transfer import discriminator, rows
from studio.transfer.schema import PrepareTransferConfig
from studio.transfer.shared import JUDGE, TEACHER, digest, on_seeds, open_base
from studio.transfer.writing import Writer, collect


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
    remarks = on_seeds(len(seeds))
    if unused := len(data.inputs) - len(real):
        remarks.append(f"Of {len(data.inputs)} inputs {unused} are repeated or have another form; they are not used.")
    source = library.resolve_language(config.base)
    measured: dict[str, float] = {}
    opened = open_base(config, source, template.chat_template)
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
    run = digest(config.to_yaml(), *seeds)
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
    opened = open_base(config, source, template.chat_template)
    adapted = AdaptedModel(opened.model, config.base)
    adapted.add(JUDGE, made / bundles.DISCRIMINATOR)
    with adapted.active({JUDGE: 1.0}):
        found = {
            real: discriminator.margins(opened.model, opened.tokenizer, template, texts, config.batch)
            for real, texts in measured.items()
        }
    return trans_lora.judged(found[True], found[False])
