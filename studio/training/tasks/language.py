"""Shared by the language tasks: a base with one adapter, rows as tokens, an ordinary PEFT directory.

A task is one module beside this one: it declares itself (``LANGUAGE = About(...)``) and says how its rows are read
and become tokens, what its model is called in other programs, how it is measured and how it answers.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.utils.data import DataLoader

from adapters import files
from adapters.compression.structure import read_pruning
from adapters.errors import InputError
from adapters.layers.variant import untouched
from adapters.plugin import Answers, Layers, Plugin
from adapters.progress import Monitor, Progress
from pipelines.language.loading import LanguageModel, open_model
from pipelines.language.loading import Task as ModelTask
from pipelines.precision import DTYPES
from studio.datasets.cache import fingerprint
from studio.datasets.encoding import Encoded
from studio.datasets.seeds import global_seed
from studio.jobs.kinds import Kind
from studio.training.cards import base_name
from studio.training.drivers import trainer as driver
from studio.training.drivers.trainer import Batch, RunSampler, SampleSet, TrainerTask
from studio.training.export import RECIPE_ENTRY, write_model_adapter
from studio.training.language import rows
from studio.training.language.about import known
from studio.training.language.card import card
from studio.training.language.data import Collate, Samples, spoken, whole_texts
from studio.training.language.layers import add_adapter
from studio.training.language.measure import resting
from studio.training.language.rows import Rows, template_of
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.session import SILENT, Keep, TrainSession
from studio.training.trainer_mixin import COMPONENT

if TYPE_CHECKING:
    from studio.training.drivers.packed import Member

KIND = Kind(
    "train-language", "studio.training.schemas.language:TrainLanguageConfig", "studio.training.tasks.language:run",
    continues=True, federated=True, ready="studio.training.ready:language", together="studio.training.together",
    estimate="studio.training.estimate:look_at_language",
    afterwards="studio.library.adopt:trained", title="Language", train="language",
    help="Train a LoRA of a language model from rows of text.",
    example="studio train language --data facts.jsonl --name facts",
    command="studio.training.commands.language",
)  # fmt: skip


def run(
    config: TrainLanguageConfig,
    folder: Path,
    monitor: Monitor = SILENT,
    resume: bool = False,
    plugins: Sequence[Plugin] = (),
    keep: Keep = False,
    member: Member | None = None,
) -> dict[str, Any]:
    """Train the adapter that ``config`` describes in ``folder``.

    Args:
        folder: gets ``NAME/`` (a PEFT directory), ``card.md``, ``config.yaml``, ``loss.csv``, ``answers.jsonl``,
            ``checkpoints/``.
        resume: go on from the newest checkpoint in ``folder`` (from the beginning if there is none).
        plugins: training methods that join those of the configuration.
        keep: do not train: save the newest checkpoint, a given step's, or the start, as the adapter.
        member: its place among trainings that share the base (:mod:`studio.training.drivers.packed`).

    Returns:
        ``adapter`` (path), ``card``, ``loss`` (mean of the last tenth), ``first_loss``, ``steps``, ``validation``
        (measures by step), ``seconds``, ``steps_per_second``, ``parameters``, ``labels``, and ``answers`` (path) when
        prompts were answered.

    Raises:
        InputError: something that cannot be trained, in one sentence.
        Cancelled: stopped on request; a checkpoint to resume from was written.
    """
    session = TrainSession.of(task_for(config), folder, monitor, plugins)
    session.member = member
    return driver.train(session, resume, keep)


def task_for(config: TrainLanguageConfig) -> LanguageTask:
    """The task that ``config`` names."""
    module, _, name = known()[config.task].entry.partition(":")
    kind: type[LanguageTask] = getattr(importlib.import_module(module), name)
    return kind(config)


class LanguageTask(TrainerTask):
    """A language model and rows of text.

    Attributes:
        opens: the kind of model, as :func:`pipelines.language.loading.open_model` calls it.
        peft_type: PEFT's name for it, if there is one.
        auto_class: the class of transformers that loads such a model.
        pipeline_tag: what a hub calls the task.
        asking: lines of the card that use the loaded model once.
        shifted: logit t belongs to label t + 1.
        one_label: a sample has one label, not one per token.
    """

    data_noun = "rows"
    measures_at_end = True
    leftovers: ClassVar[tuple[str, ...]] = ("checkpoints", "answers.jsonl", "saved")

    opens: ClassVar[ModelTask]
    peft_type: ClassVar[str | None] = None
    auto_class: ClassVar[str]
    pipeline_tag: ClassVar[str]
    asking: ClassVar[tuple[str, ...]] = ('print(model(**tokenizer("Hello", return_tensors="pt")).logits)',)
    shifted: ClassVar[bool] = False
    one_label: ClassVar[bool] = False

    config: TrainLanguageConfig
    base: LanguageModel
    data: Samples

    # ---------------------------------------------------------------- what a task may do in its own way
    def encoded(self, tokenizer: Any) -> Samples:
        """The rows as tokens; here every text is one sample."""
        return whole_texts(self.read, tokenizer, self.config)

    def learnt(self, samples: Sequence[Encoded]) -> float:
        """Share of the tokens that are learnt, for the check before training."""
        return 0.0

    def example(self, sample: Encoded, tokenizer: Any) -> str:
        """A sample as readable text."""
        return str(tokenizer.decode(sample["input_ids"]))

    def answer(self, prompts: Sequence[str]) -> Iterable[str]:
        """The model's answers to ``prompts``; it is in evaluation mode, without gradients."""
        raise NotImplementedError

    # ---------------------------------------------------------------- before the first step
    def rows(self) -> None:
        self.read: Rows = rows.read(self.config)
        self.template = template_of(self.config)

    def open(self, session: TrainSession) -> None:
        from studio import library

        self.session, config = session, self.config
        with global_seed(config.seed, "head"):  # a new classification head starts at random
            self.base = (open_model if session.member is None else session.member.open)(
                library.resolve_language(config.base), self.opens, labels=self.read.labels, dtype=config.dtype,
                device=session.device, attention=config.attention, quantization=config.quantization,
                chat_template=self.template,
            )  # fmt: skip
        self.base.model.config.use_cache = False

    def digest(self) -> str:
        return fingerprint(self.base.model)

    def tokens(self, tokenizer: Any, longest: int | None = None) -> Samples:
        """Tokens of every row, for a model that reads ``longest`` of them.

        Raises:
            InputError: max_length above that, no chat template, or nothing left to learn.
        """
        if longest is not None and self.config.max_length > longest:
            raise InputError(
                f"max_length {self.config.max_length} is more than the {longest} tokens this model reads: lower it."
            )
        return self.encoded(tokenizer)

    def encode(self) -> None:
        config = self.config
        self.data = self.tokens(self.base.tokenizer, self.base.longest)
        self.samples, self.data_digest = self.data.shown, self.read.digest
        self.collator = Collate(self.base.tokenizer.pad_token_id, config.packing, self.one_label)
        self.total = config.steps
        if config.epochs:
            self.total = math.ceil(config.epochs * len(self.samples) / self.samples_per_step)
        self.session.monitor.report(Progress("data", message=self._summary()))

    def _summary(self) -> str:
        lengths = sorted(len(sample["input_ids"]) for sample in self.samples)
        shown = f"{len(self.read.shown)} rows as {len(lengths)} samples of {lengths[0]} to {lengths[-1]} tokens"
        kept = f"{len(self.read.held_out)} rows held out" if self.read.held_out else ""
        return "; ".join(filter(None, [shown, kept, self.data.remark]))

    def inject(self, models: dict[str, Any]) -> dict[str, Any]:
        self.learner = add_adapter(models[COMPONENT], self.config, self.base.fresh, self.peft_type)
        frozen = (p for p in models[COMPONENT].parameters() if not p.requires_grad)
        self.session.dtype = next(p.dtype for p in frozen if p.is_floating_point())
        if self.config.method != "lora":
            self._tell_size()
        return {COMPONENT: self.learner}

    def _tell_size(self) -> None:
        """Say how large the mixture is: a fair comparison is with a LoRA of as many parameters."""
        from adapters.layers.experts.size import size

        found = size(self.learner)
        self.session.monitor.report(Progress("data", message=str(found)))

    # ---------------------------------------------------------------- steps
    def collate(self, start: int, stop: int) -> Iterator[Batch]:
        size = self.config.batch_size
        order = list(RunSampler(len(self.samples), stop * size, self.config.seed))
        for number in range(start, stop):
            batch = self.collator([self.samples[i] for i in order[number * size : (number + 1) * size]])
            yield self.change(batch, "mask", number)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, Answers]:
        given = {name: value.to(self.session.device) for name, value in batch.items()}
        outputs = self.learner(**given)

        def reference() -> torch.Tensor:
            with torch.no_grad(), untouched(self.session.models[COMPONENT]):
                found: torch.Tensor = self.learner(**given).logits.detach()
            return found

        return outputs.loss, Answers(outputs.logits, given["labels"], reference, shifted=self.shifted)

    @property
    def measurable(self) -> bool:
        return bool(self.data.held_out)

    def held_out(self) -> Iterator[Batch]:
        """Batches of the held-out rows."""
        loader = DataLoader(SampleSet(self.data.held_out), self.config.batch_size, collate_fn=self.collator)
        for number, batch in enumerate(loader):
            yield self.change(batch, "mask-validation", number)

    # ---------------------------------------------------------------- looking and saving
    @property
    def samples_wanted(self) -> bool:
        return bool(self.config.sample_prompts)

    def logits(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, logits) of one text."""
        tokenizer, length = self.base.tokenizer, self.config.max_length
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=length)
        return inputs["input_ids"][0], self._model(**inputs.to(self.base.device)).logits[0]

    @property
    def _model(self) -> Any:
        return self.session.models[COMPONENT]

    def sample(self, step: int) -> None:
        """Answers to the sample prompts, added to ``answers.jsonl``."""
        session, prompts = self.session, self.config.sample_prompts
        autocast = session.accelerator.autocast()
        with resting(self._model), global_seed(self.config.seed, "answers"), torch.no_grad(), autocast:
            answers = list(self.answer(prompts))
        with self._answers.open("a", encoding="utf-8") as handle:
            for prompt, text in zip(prompts, answers, strict=True):
                handle.write(json.dumps({"step": step, "prompt": prompt, "answer": text}, ensure_ascii=False) + "\n")
                session.monitor.report(Progress("answering", step, self.total, message=f"{prompt} → {text}"))

    @property
    def _answers(self) -> Path:
        return self.session.folder / "answers.jsonl"

    def rewind(self, step: int) -> None:
        """Drop the answers that a resumed run will give again."""
        if self._answers.is_file():
            lines = self._answers.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            files.write_text(self._answers, "".join(f"{line}\n" for line in kept))

    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        source, read = Path(self.config.data), self.read
        data = {
            "source": source.name if source.suffix else self.config.data,
            "rows": len(read.shown),
            "held_out": len(read.held_out),
            "digest": read.digest,
            "labels": read.labels,
            "chat": spoken(read, self.base.tokenizer),
        }
        pruning = read_pruning(Path(self.base.source))
        kept = {} if pruning is None else {"pruning": pruning.identity}
        return {"family": "language", "architecture": self.base.architecture, **kept}, data

    def trained(self) -> dict[str, Any]:
        last = self.session.validation[-1] if self.session.validation else {}
        return {"validation": {name: value for name, value in last.items() if name != "step"}}

    def export(self, layers: Layers, folder: Path, name: str, recipe: dict[str, Any]) -> dict[str, str]:
        if getattr(self.config, "method", "lora") != "lora":
            return self._export_experts(folder / name, recipe)
        with self.session.best_weights():
            heads, more = heads_of(self._model), self.session.plugins.beside()
        options = {"task_type": self.peft_type, "fan_in_fan_out": self._model.peft_config["default"].fan_in_fan_out}
        beside = {"README.md": self._card(recipe), **self.session.plugins.texts_beside()}
        place = write_model_adapter(
            layers[COMPONENT], folder / name, self.config, recipe, beside, options, heads, more
        )  # fmt: skip
        return {"peft": str(place)}

    def _export_experts(self, place: Path, recipe: dict[str, Any]) -> dict[str, str]:
        from adapters.layers.experts.files import write

        with self.session.best_weights(), files.whole(place) as part:
            write(
                self._model, part, DTYPES[self.config.save_dtype], base_name(self.config.base),
                {RECIPE_ENTRY: json.dumps(recipe, ensure_ascii=False)},
            )  # fmt: skip
            files.write_text(part / "README.md", self._card(recipe))
        return {"peft": str(place)}

    def card(self, recipe: dict[str, Any]) -> Path:
        return files.write_text(self.session.folder / "card.md", self._card(recipe))

    def _card(self, recipe: dict[str, Any]) -> str:
        return card(recipe, self.auto_class, self.pipeline_tag, self.asking)

    def result(self, paths: Mapping[str, str]) -> dict[str, Any]:
        answered = {"answers": str(self._answers)} if self._answers.is_file() else {}
        return {"validation": self.session.validation, "labels": self.read.labels, **answered}


def heads_of(model: Any) -> dict[str, torch.Tensor]:
    """Whole modules trained besides the LoRA (a classification head), tensors by PEFT's names."""
    from peft import get_peft_model_state_dict

    if not model.peft_config["default"].modules_to_save:
        return {}
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor for name, tensor in state.items() if "lora_" not in name}
