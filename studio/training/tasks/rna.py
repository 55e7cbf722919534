"""RNA: a k-mer model learns to tell long non-coding from messenger RNA, or to predict hidden k-mers.

LoRA-BERT (arXiv 2411.08073) trains every weight of a BERT over 3-mers on whole transcripts and their longest ORFs: mode
``full``. Mode ``lora`` is this studio's own: the base stays frozen, a LoRA with pooler and classifier learns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from adapters import files
from adapters.errors import InputError
from adapters.formats import LoraFile
from adapters.formats.coverage import Coverage, coverage
from adapters.plugin import Layers, Plugin
from adapters.progress import Monitor, Progress
from pipelines.genomics import model as models
from pipelines.genomics import scoring
from pipelines.genomics.fasta import Record, dna
from pipelines.genomics.kmers import Kmers
from pipelines.genomics.masking import mask_spans
from pipelines.genomics.model import Head, RnaModel
from pipelines.genomics.task_file import RnaTask
from pipelines.precision import DTYPES, choose_dtype
from studio.datasets.seeds import generator, global_seed
from studio.jobs.kinds import Kind
from studio.training.drivers import trainer as driver
from studio.training.drivers.trainer import Batch
from studio.training.language.data import Collate, Samples
from studio.training.language.layers import HEADS, add_adapter
from studio.training.language.measure import measure, resting, with_perplexity
from studio.training.rna import rows, samples
from studio.training.rna.card import RECIPE_FILE, card
from studio.training.rna.report import Judged
from studio.training.rna.take_up import take_up
from studio.training.schemas.rna import NEW, TrainRnaConfig
from studio.training.session import SILENT, TrainSession
from studio.training.task import Measures
from studio.training.tasks.language import LanguageTask
from studio.training.trainer_mixin import COMPONENT

KIND = Kind(
    "train-rna", "studio.training.schemas.rna:TrainRnaConfig", "studio.training.tasks.rna:run", continues=True,
    ready="studio.training.ready:rna", estimate="studio.training.rna.cost:look",
    afterwards="studio.library.adopt:trained", title="RNA", train="rna",
    help="Train a k-mer model of RNA, or a LoRA of one, from FASTA files.",
    example="studio train rna --data lncRNA=nc.fa.gz --data mRNA=coding.fa.gz --validation-split 0.2 --name lncrna",
)  # fmt: skip

PAPER_LENGTH = 1536
"""Tokens of a new model, as in the paper."""

REPORT = "validation.json"


def run(
    config: TrainRnaConfig,
    folder: Path,
    monitor: Monitor = SILENT,
    resume: bool = False,
    plugins: Sequence[Plugin] = (),
    keep: bool | int = False,
) -> dict[str, Any]:
    """Train what ``config`` describes in ``folder``; arguments and result as of a language training.

    Mode full writes ``NAME/`` as a transformers directory instead of an adapter. With held-out transcripts,
    ``validation.json`` says more (``report`` in the result).

    Raises:
        InputError: something that cannot be trained, in one sentence.
        Cancelled: stopped on request; a checkpoint to resume from was written.
    """
    return driver.train(TrainSession.of(task_for(config), folder, monitor, plugins), resume, keep)


def task_for(config: TrainRnaConfig) -> RnaTraining:
    """The task that ``config`` names."""
    return Classification(config) if config.task == "classification" else Masked(config)


class RnaTraining(LanguageTask):
    """A k-mer model and transcripts; either a LoRA of it learns, or all of it."""

    data_noun = "transcripts"
    leftovers = ("checkpoints", "answers.jsonl", "saved", REPORT)

    opens: ClassVar[Head]
    config: Any  # the language tasks' fields that are used here have the same names
    base: RnaModel

    @property
    def kmers(self) -> Kmers:
        return self.base.kmers

    @property
    def _full(self) -> bool:
        return bool(self.config.mode == "full")

    # ---------------------------------------------------------------- before the first step
    def rows(self) -> None:
        self.read: rows.RnaRows = rows.read(self.config)

    def open(self, session: TrainSession) -> None:
        self.session, config = session, self.config
        self.learner_noun = "training" if self._full else "adapter"
        with global_seed(config.seed, "head"):  # a new head, new positions and new models start at random
            self.base = self._new() if config.base == NEW else self._opened()

    def _new(self) -> RnaModel:
        config = self.config
        kmers = Kmers.new(config.k, config.stride, config.max_length or PAPER_LENGTH)
        made = models.new_model(
            kmers, self.opens, width=config.width, depth=config.depth, heads=config.heads, labels=self.read.labels
        )
        made.model.to(self.session.device)
        self.base_weights = models.encoder_digest(made.model)
        return made

    def _opened(self) -> RnaModel:
        from studio import library

        config = self.config
        place = library.resolve_rna(config.base)
        found = models.open_base(
            place, self.opens, labels=self.read.labels, dtype="fp32" if self._full else config.dtype,
            device=self.session.device, attention=config.attention,
        )  # fmt: skip
        self.base_weights = models.encoder_digest(found.model)
        wanted = config.max_length or found.kmers.longest
        if wanted > found.kmers.longest:
            if not (self._full or config.train_positions):
                raise InputError(
                    f"max_length {wanted} is more than the {found.kmers.longest} positions the base has learnt: lower "
                    "it, read windows (long), train_positions, or choose mode full."
                )
            models.longer_positions(found.model, wanted)
            found.model.requires_grad_(False)
        found.tokenizer = Kmers(found.kmers.k, found.kmers.stride, found.kmers.vocabulary, wanted)
        return found

    def digest(self) -> str:
        return self.base_weights

    def check(self) -> None:
        if not self.config.continue_from:
            return
        from studio import library

        place = library.resolve_adapter(self.config.continue_from)
        told = RnaTask.read(place)
        if told is not None:
            told.check(self.kmers, self.base_weights, place.name, self.config.base)

    def encode(self) -> None:
        config = self.config
        shown, remarks = samples.rows(self.read.shown, self.kmers, config)
        if not shown:
            raise InputError("No transcript has anything to learn from: choose another view.")
        self.data = Samples(shown, self.read.held_out, "; ".join([*self.read.remarks, *remarks]))
        self.samples, self.data_digest = self.arranged(shown), self.read.digest
        self.collator = Collate(self.kmers.number("[PAD]"), classes=self.one_label)
        self.total = config.steps
        if config.epochs:
            self.total = math.ceil(config.epochs * len(self.samples) / self.samples_per_step)
        self.session.monitor.report(Progress("data", message=self._summary()))

    def arranged(self, shown: list[Any]) -> list[Any]:
        """The samples as they are drawn."""
        return shown

    def _summary(self) -> str:
        return super()._summary().replace(" rows ", " transcripts ")

    def earlier(self, models: Mapping[str, Any]) -> LoraFile | None:
        return None  # :meth:`inject` reads it, with its pooler and classifier

    def inject(self, models: dict[str, Any]) -> dict[str, Any]:
        model, session = models[COMPONENT], self.session
        session.dtype = choose_dtype(self.config.dtype, session.device) if self._full else model.dtype
        self.learner = self.put(model)
        if self.config.method != "lora":
            self._tell_size()
        if self.config.continue_from:
            from studio import library

            take_up(self.learner, library.resolve_adapter(self.config.continue_from))
        return {COMPONENT: self.learner}

    def put(self, model: Any) -> Any:
        """The model that learns: with an adapter, or all of it."""
        if self._full:
            return model.float().requires_grad_(True)
        return add_adapter(model, self._where(), self._whole_modules(model), self.peft_type)

    def _where(self) -> Any:
        """The configuration with the layers named; what learns as a whole gets no adapter besides."""
        config = self.config
        changes: dict[str, Any] = {"exclude_regex": f"({config.exclude_regex or '(?!)'})|({HEADS})"}
        if config.targets == "query-value" and not config.target_regex:
            changes["target_regex"] = r".*\.(query|value)"
        return config.model_copy(update=changes)

    def _whole_modules(self, model: Any) -> list[str]:
        """Names of the modules that learn as a whole."""
        found = [path.rpartition(".")[2] for path in models.head_modules(model)] if self.one_label else []
        longer = self.config.train_positions and models.positions(model)
        return [*found, *(["position_embeddings"] if longer else [])]

    def reach(self) -> dict[str, Coverage]:
        if not self._full:
            return super().reach()
        everything = [name for name, module in self.learner.named_modules() if hasattr(module, "weight")]
        return {COMPONENT: coverage(self.learner, everything)}

    @property
    def measurable(self) -> bool:
        return bool(self.read.held_out)

    # ---------------------------------------------------------------- saving
    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        read = self.read
        data = {
            "source": read.source, "rows": len(read.shown), "held_out": len(read.held_out), "digest": read.digest,
            "labels": read.labels, "k": self.kmers.k, "stride": self.kmers.stride, "max_length": self.kmers.longest,
            "remarks": read.remarks,
        }  # fmt: skip
        return {"family": "rna", "architecture": self.base.architecture}, data

    def export(self, layers: Layers, folder: Path, name: str, recipe: dict[str, Any]) -> dict[str, str]:
        if not self._full:
            found = super().export(layers, folder, name, recipe)
            self._beside(Path(found["peft"]))
            return found
        place = folder / name
        dtype = DTYPES[self.config.save_dtype]
        with self.session.best_weights(), files.whole(place) as part:
            state = {key: value.detach().cpu() for key, value in self.learner.state_dict().items()}
            wrong = next((k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()), None)
            if wrong:
                raise InputError(f"The model holds numbers that are not finite in '{wrong}': not saved.")
            part.mkdir()
            cast_state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
            self.learner.save_pretrained(part, state_dict=cast_state)
            self.kmers.write(part)
            self._beside(part)
            files.write_text(part / RECIPE_FILE, json.dumps(recipe, ensure_ascii=False, indent=1))
            files.write_text(part / "README.md", self._card(recipe))
        return {"model": str(place)}

    def _beside(self, place: Path) -> None:
        """More files of the saved folder."""

    def _card(self, recipe: dict[str, Any]) -> str:
        return card(recipe, self.auto_class, self.pipeline_tag)


class Masked(RnaTraining):
    """Pre-training: hidden k-mers are predicted; the loss is that of the hidden ones."""

    opens = "masked"
    auto_class = "AutoModelForMaskedLM"
    pipeline_tag = "fill-mask"

    def change(self, batch: Batch, stream: str, number: int) -> Batch:
        draws = generator(self.config.seed, stream, number)
        ids, labels = mask_spans(batch["input_ids"].cpu(), self.kmers, self.config.mask_share, draws)
        device = batch["input_ids"].device
        return {**batch, "input_ids": ids.to(device), "labels": labels.to(device)}

    def held_out(self) -> Iterator[Batch]:
        rows, _ = samples.rows(self.read.held_out, self.kmers, self.config)
        size = self.config.batch_size
        for number, start in enumerate(range(0, len(rows), size)):
            yield self.change(self.collator(rows[start : start + size]), "mask-validation", number)

    def measure(self) -> Measures:
        autocast = self.session.accelerator.autocast
        return with_perplexity(measure(self._model, self.held_out(), autocast=autocast)[0])


class Classification(RnaTraining):
    """The loss is the cross-entropy of the two labels, over whole transcripts and ORFs as rows of their own."""

    opens = "classification"
    peft_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    pipeline_tag = "text-classification"
    one_label = True

    judged: Judged | None = None

    def arranged(self, shown: list[Any]) -> list[Any]:
        return samples.balanced(shown) if self.config.balance else shown

    @property
    def how(self) -> RnaTask:
        """What is stored beside the weights."""
        config, kmers = self.config, self.kmers
        return RnaTask(
            kmers.k, kmers.stride, kmers.longest, (config.labels[0], config.labels[1]), config.view, config.long,
            config.strands, config.threshold, "" if self._full else self.base_weights,
        )  # fmt: skip

    def _scores(self, records: Sequence[Record]) -> list[scoring.Score]:
        autocast = self.session.accelerator.autocast
        with resting(self._model):
            return scoring.score(self._model, self.kmers, self.how, records, autocast=autocast)

    def measure(self) -> Measures:
        scores = self._scores([item.record for item in self.read.held_out])
        self.judged = Judged.of(scores, [item.label for item in self.read.held_out])
        return self.judged.measures(self.config.threshold)

    def answer(self, prompts: Sequence[str]) -> Iterable[str]:
        records = [Record(str(number), "", dna(text), number) for number, text in enumerate(prompts, 1)]
        for score in self._scores(records):
            found = score.probability
            nothing = "no ORF" if score.margin is None else "—"
            yield nothing if found is None else f"{self.config.labels[1]} {found:.0%}"

    def _beside(self, place: Path) -> None:
        self.how.write(place)

    def result(self, paths: Mapping[str, str]) -> dict[str, Any]:
        found = super().result(paths)
        if self.judged is None:
            return found
        report = self.judged.report(self.config.labels, self.config.threshold, self.config.seed)
        place = files.write_text(self.session.folder / REPORT, json.dumps(report, indent=1) + "\n")
        return {**found, "report": str(place)}
