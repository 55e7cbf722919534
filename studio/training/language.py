"""The language training job: rows of text in, one ordinary PEFT adapter out, on transformers' Trainer.

The loop is the Trainer's with :class:`~studio.training.trainer_mixin.StudioTrainerMixin`; this module prepares model
and data, follows the run (loss, measures, answers to sample prompts, checkpoints, stopping) and saves the adapter.
Random numbers and the order of samples are functions of seed and step, so a resumed run is the uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from adapters import files
from adapters.errors import Cancelled, InputError
from adapters.formats import LoraFile
from adapters.formats.lora import MODEL
from adapters.plugin import Plugin, Plugins
from adapters.progress import Monitor, Progress, Silent
from pipelines.language.adapters import read_fitting
from pipelines.language.answer import complete
from pipelines.language.loading import LanguageModel, open_model
from studio import devices
from studio.datasets.cache import fingerprint
from studio.datasets.seeds import global_seed
from studio.training import checkpoint as checkpoints
from studio.training.device import fresh_state, own_device
from studio.training.export import make_recipe
from studio.training.inject import lora_layers, start_from, trainable
from studio.training.language_data import (
    Collate,
    Rows,
    RunSampler,
    Samples,
    SampleSet,
    encode,
    masked,
    read_rows,
    spoken,
)
from studio.training.language_data import template_of as chat_template_of
from studio.training.language_export import card, write_adapter
from studio.training.language_layers import add_adapter
from studio.training.language_measure import Measures, measure
from studio.training.methods import plugins_for
from studio.training.optimizers import averaged, lr_factor, make_optimizer, parameter_groups, running_average
from studio.training.records import LossCurve, check_tracker, due, recent
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.trainer_mixin import COMPONENT, StudioTrainerMixin

SILENT = Silent()
MARK = "studio.json"
"""File that makes a checkpoint complete; it is written last."""
AVERAGE = "ema.pt"


def run(
    config: TrainLanguageConfig,
    folder: Path,
    monitor: Monitor = SILENT,
    resume: bool = False,
    plugins: Sequence[Plugin] | None = None,
) -> dict[str, Any]:
    """Train the adapter that ``config`` describes in ``folder``.

    Args:
        folder: gets ``NAME/`` (a PEFT directory), ``card.md``, ``config.yaml``, ``loss.csv``, ``answers.jsonl``,
            ``checkpoints/``.
        resume: go on from the newest checkpoint in ``folder`` (from the beginning if there is none).
        plugins: training methods instead of those the configuration asks for.

    Returns:
        ``adapter`` (path), ``card``, ``loss`` (mean of the last tenth), ``first_loss``, ``steps``, ``validation``
        (measures by step), ``seconds``, ``steps_per_second``, ``parameters``, ``labels``, and ``answers`` (path) when
        prompts were answered.

    Raises:
        InputError: something that cannot be trained, in one sentence.
        Cancelled: stopped on request; a checkpoint to resume from was written.
    """
    folder = Path(folder)
    check_tracker(config.tracker)
    rows = read_rows(config)  # before anything large is loaded
    chat_template = chat_template_of(config)
    monitor.report(Progress("loading", message=f"Loading the language model {config.base}"))
    device = own_device(devices.resolve(config.device))
    base = _open(config, rows.labels, device, chat_template)
    samples = encode(rows, base.tokenizer, config, base.longest)
    monitor.report(Progress("data", message=_summary(rows, samples)))
    chosen = Plugins(plugins_for(config) if plugins is None else plugins)
    training = LanguageTraining(config, folder, monitor, base, rows, samples, chosen)
    with fresh_state(device), global_seed(config.seed, "run"):
        training.prepare(device, resume)
        return training.train()


def _open(config: TrainLanguageConfig, labels: Sequence[str], device: str, chat_template: str) -> LanguageModel:
    from studio import library

    with global_seed(config.seed, "head"):  # a new classification head starts at random
        base = open_model(
            library.resolve_base(config.base), config.task, labels=labels, dtype=config.dtype, device=device,
            attention=config.attention, quantization=config.quantization, chat_template=chat_template,
        )  # fmt: skip
    if config.task == "masked" and base.tokenizer.mask_token_id is None:
        raise InputError(f"The tokenizer of '{config.base}' has no mask token: choose a base of the BERT family.")
    return base


def _summary(rows: Rows, samples: Samples) -> str:
    lengths = sorted(len(sample["input_ids"]) for sample in samples.shown)
    parts = [f"{len(rows.shown)} rows as {len(samples.shown)} samples of {lengths[0]} to {lengths[-1]} tokens"]
    if rows.held_out:
        parts.append(f"{len(rows.held_out)} rows kept out")
    return "; ".join([*parts, *filter(None, [samples.remark])])


class LanguageTrainer(StudioTrainerMixin, Trainer):  # type: ignore[misc]  # the mixin takes what any trainer takes
    """Transformers' trainer with the methods of the studio, its order of samples and its optimisers."""

    def __init__(self, *, training: LanguageTraining, **options: Any) -> None:
        self.training = training
        super().__init__(**options)

    def _get_train_sampler(self, *args: Any, **options: Any) -> RunSampler:
        config = self.training.config
        size = config.batch_size * config.gradient_accumulation * self.args.world_size
        return RunSampler(len(self.training.samples.shown), self.training.total * size, config.seed)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The configured learning rate over the run."""
        if self.lr_scheduler is None:
            total, config = self.training.total, self.training.config
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: lr_factor(step, total, config)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        """The batches of one optimiser step; masked language models get their gaps here."""
        batches, count = super().get_batch_samples(*args, **options)
        if self.training.config.task != "masked":
            return batches, count
        first = int(self.state.global_step) * self.args.gradient_accumulation_steps
        batches = [self.training.with_gaps(batch, "mask", first + number) for number, batch in enumerate(batches)]
        return batches, self._get_num_items_in_batch(batches, self.args.device)

    def calibration_batch(self, batch: Any, number: int) -> Any:
        return self.training.with_gaps(batch, "calibration", number) if self.training.config.task == "masked" else batch

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        """The trainer's files, then the mark that they are whole; a full disk is said in one sentence."""
        place = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(*args, **options)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            shutil.rmtree(place, ignore_errors=True)
            raise InputError(
                f"The checkpoint '{place}' could not be written ({error}): free some space and resume; what was saved "
                "before is kept."
            ) from None
        self.training.complete_checkpoint(place)


@dataclass
class LanguageTraining:
    """One run: what is loaded, how far it is."""

    config: TrainLanguageConfig
    folder: Path
    monitor: Monitor
    base: LanguageModel
    rows: Rows
    samples: Samples
    plugins: Plugins

    losses: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    average: Any = None

    # ---------------------------------------------------------------- preparation
    def prepare(self, device: str, resume: bool) -> None:
        """Adapter, trainer, and what an earlier run left behind."""
        config, tokenizer = self.config, self.base.tokenizer
        self.plugins.configure(config)
        self.base.model.config.use_cache = False
        if config.packing:
            check_packing(self.base, self.samples)
        self.base_digest = fingerprint(self.base.model)
        self.plugins.before_inject({COMPONENT: self.base.model})
        earlier = self._earlier_adapter()
        with global_seed(config.seed, "init"):
            self.model: Any = add_adapter(self.base.model, config, self.base.fresh)
        if earlier is not None:
            bare: Any = self.model.base_model.model
            start_from({MODEL: bare}, earlier)
        self.collate = Collate(tokenizer.pad_token_id, config.packing, config.task == "classification")
        self.total = config.steps
        if config.epochs:
            self.total = math.ceil(config.epochs * len(self.samples.shown) / self._samples_per_step)
        self.checkpoint = self._restore(resume)
        self.trainer = LanguageTrainer(
            training=self, model=self.model, args=self._arguments(device), data_collator=self.collate,
            train_dataset=SampleSet(self.samples.shown), plugins=self.plugins, optimizer_of=self._optimizer,
            first_rate=config.learning_rate * lr_factor(0, self.total, config), callbacks=[_Follow(self)],
        )  # fmt: skip
        self.trainer.remove_callback(PrinterCallback)  # it would print a table of its own
        self.trainer.args._n_gpu = min(1, self.trainer.args.n_gpu)  # several GPUs: accelerate launch, not DataParallel

    @property
    def _samples_per_step(self) -> int:
        return self.config.batch_size * self.config.gradient_accumulation * int(os.environ.get("WORLD_SIZE", "1"))

    def _earlier_adapter(self) -> LoraFile | None:
        """The adapter to continue from, checked against the base before anything is changed."""
        if not self.config.continue_from:
            return None
        from studio import library

        return read_fitting(library.resolve_adapter(self.config.continue_from), self.base.model, self.config.base)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(parameter_groups({COMPONENT: model}, COMPONENT, self.config), self.config)

    def _arguments(self, device: str) -> TrainingArguments:
        config = self.config
        dtype = next(p.dtype for p in self.base.model.parameters() if p.is_floating_point() and not p.requires_grad)
        options: dict[str, Any] = {"tf32": config.tf32} if device.startswith("cuda") else {}
        if config.gradient_checkpointing:
            options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        return TrainingArguments(
            output_dir=str(self.folder / "checkpoints"),
            run_name=config.name,
            max_steps=self.total,
            seed=config.seed,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            max_grad_norm=config.max_grad_norm,
            learning_rate=config.learning_rate,
            use_cpu=device == "cpu",
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            dataloader_num_workers=config.workers,
            neftune_noise_alpha=config.neftune_alpha,
            remove_unused_columns=False,
            label_names=["labels"],
            save_strategy="no",
            logging_strategy="no",
            eval_strategy="no",
            report_to=[] if config.tracker == "none" else [config.tracker],
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
            **options,
        )

    # ---------------------------------------------------------------- start and resume
    def _restore(self, resume: bool) -> Path | None:
        """The checkpoint to go on from, or None after clearing what an earlier run left behind."""
        found = existing(self.folder / "checkpoints") if resume else []
        step = 0
        if found:
            mark = _read_mark(found[-1])
            checkpoints.check_same_run(
                checkpoints.Checkpoint(mark["step"], {}, {}, mark["config"], mark["data"], [], 0.0, {}), self.config,
                self.rows.digest, "rows",
            )  # fmt: skip
            step, self.losses, self.seconds = mark["step"], mark["losses"], mark["seconds"]
            self.validation = mark["validation"]
        if not self._main:
            return found[-1] if found else None
        if not found:
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
            (self.folder / "answers.jsonl").unlink(missing_ok=True)
        files.write_text(self.folder / "config.yaml", self.config.to_yaml())
        self.curve = LossCurve(self.folder / "loss.csv", step)
        self._drop_later_answers(step)
        return found[-1] if found else None

    @property
    def _main(self) -> bool:
        return os.environ.get("RANK", "0") == "0"

    def complete_checkpoint(self, place: Path) -> None:
        """Write the mark of a checkpoint, then delete all but the newest ones."""
        if not self._main:
            return
        mark = {
            "step": int(self.trainer.state.global_step), "config": self.config.model_dump(mode="json"),
            "data": self.rows.digest, "losses": self.losses, "seconds": self.seconds, "validation": self.validation,
        }  # fmt: skip
        if (average := self._average()) is not None:
            files.write(place / AVERAGE, lambda part: torch.save(average.state_dict(), part))
        files.write_text(place / MARK, json.dumps(mark), sync=True)
        kept = existing(place.parent)[-self.config.keep_checkpoints :]
        for old in place.parent.glob("checkpoint-*"):  # also what a crash left unfinished
            if old not in kept:
                shutil.rmtree(old)

    # ---------------------------------------------------------------- the run
    def train(self) -> dict[str, Any]:
        """Run to the end; see :func:`run` for the result."""
        self.stopped = False
        if self.checkpoint is None and self.config.sample_at_start:
            self.answer(0)
        if len(self.losses) < self.total:
            self.trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        else:  # everything was learnt before the stop; only the end is missing
            self.trainer.plugins.initialise(self.trainer._handles())
            self.trainer._load_from_checkpoint(str(self.checkpoint))
            self.trainer.create_optimizer()
        if self.stopped:
            raise Cancelled(f"Stopped at step {self.step} of {self.total}; the run can be resumed.")
        return self._finish()

    @property
    def step(self) -> int:
        return len(self.losses)

    def after_step(self, control: Any, took: float) -> None:
        """What follows an optimiser step: report, measure, answer, and ask the trainer to save or stop."""
        config, trainer = self.config, self.trainer
        self.seconds += took
        self.losses.append(trainer.mean_loss())
        if (average := self._average()) is not None:
            average.step(trainable(self.model))
        found = self.measure() if due(self.step, config.validation_every) and self.samples.held_out else {}
        self._record(took, found)
        if due(self.step, config.sample_every):
            self.answer(self.step)
        if due(self.step, config.checkpoint_every) and self.step < self.total:
            control.should_save = True
        if self.step < self.total and self._stop_asked():
            self.stopped = control.should_training_stop = control.should_save = True

    def _stop_asked(self) -> bool:
        asked = torch.tensor(float(self.monitor.cancelled()), device=self.trainer.accelerator.device)
        return bool(self.trainer.accelerator.reduce(asked, "sum"))

    def with_gaps(self, batch: Any, stream: str, number: int) -> Any:
        """A batch of whole texts as a masked language model learns them."""
        return masked(batch, self.base.tokenizer, self.config.mask_share, self.config.seed, stream, number)

    def measure(self) -> Measures:
        """Measures on the rows kept out, with the weights that would be saved."""
        loader = DataLoader(SampleSet(self.samples.held_out), self.config.batch_size, collate_fn=self.collate)
        batches: Any = loader
        if self.config.task == "masked":
            batches = (self.with_gaps(batch, "mask-validation", number) for number, batch in enumerate(loader))
        with self._best_weights():
            found = measure(self.model, batches, self.config.task, self.trainer.accelerator.autocast)
        self.validation.append({"step": self.step, **found})
        return found

    def _best_weights(self) -> AbstractContextManager[None]:
        """Inside, the model holds the weights that are saved."""
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        return averaged(optimizer, trainable(self.model), self._average() if self.step else None)

    def _average(self) -> Any:
        """The running average, if one is asked for; made when all parameters exist, from the checkpoint if resumed."""
        if self.average is None:
            self.average = running_average(trainable(self.model), self.config)
            if self.average is not None and self.checkpoint is not None:
                self.average.load_state_dict(_read_average(self.checkpoint))
                self.average.to(self.base.device)
        return self.average

    # ---------------------------------------------------------------- looking and saving
    def answer(self, step: int) -> list[str]:
        """Answer the sample prompts with the weights that would be saved; written to ``answers.jsonl``."""
        if not (self._main and self.config.sample_prompts):
            return []
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            autocast = self.trainer.accelerator.autocast()
            with self._best_weights(), global_seed(self.config.seed, "answers"), torch.no_grad(), autocast:
                answers = self._answers()
        finally:
            for module, training in modes.items():
                module.training = training
        with (self.folder / "answers.jsonl").open("a", encoding="utf-8") as handle:
            for prompt, text in zip(self.config.sample_prompts, answers, strict=True):
                handle.write(json.dumps({"step": step, "prompt": prompt, "answer": text}, ensure_ascii=False) + "\n")
                self.monitor.report(Progress("answering", step, self.total, message=f"{prompt} → {text}"))
        return answers

    def _answers(self) -> list[str]:
        config, tokenizer, model = self.config, self.base.tokenizer, self.model
        if config.task == "causal":
            model.config.use_cache = True
            try:
                return complete(model, tokenizer, config.sample_prompts, config.sample_tokens, config.system_prompt)
            finally:
                model.config.use_cache = False
        answers = []
        for text in config.sample_prompts:
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=config.max_length)
            logits = model(**inputs.to(self.base.device)).logits
            if config.task == "classification":
                shares = logits[0].float().softmax(-1)
                answers.append(f"{self.rows.labels[int(shares.argmax())]} ({float(shares.max()):.0%})")
            else:
                gaps = inputs["input_ids"][0] == tokenizer.mask_token_id
                answers.append(" ".join(tokenizer.decode([token]) for token in logits[0][gaps].argmax(-1).tolist()))
        return answers

    def _drop_later_answers(self, step: int) -> None:
        """Answers that a resumed run will give again."""
        file = self.folder / "answers.jsonl"
        if file.is_file():
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
            files.write_text(file, "".join(f"{line}\n" for line in lines))

    def _record(self, took: float, found: Measures) -> None:
        if not self._main:
            return
        trainer, loss = self.trainer, self.losses[-1]
        values = {"learning_rate": trainer.used_rate, "grad_norm": trainer.last_norm}
        self.curve.add(
            step=self.step, loss=loss, seconds=round(took, 4), validation_loss=found.get("validation_loss"), **values
        )
        epoch = self.step * self._samples_per_step / len(self.samples.shown)
        shown = values | trainer.step_logs | {"steps_per_second": 1 / took, "epoch": epoch} | found
        if self.config.tracker != "none":
            trainer.log({"loss": loss, **shown})
        self.monitor.report(Progress("training", self.step, self.total, loss=loss, metrics=shown))

    def _recipe(self) -> dict[str, Any]:
        config = self.config
        last = self.validation[-1] if self.validation else {}
        return make_recipe(
            config,
            base={"name": config.base, "family": "language", "architecture": self.base.architecture,
                  "digest": self.base_digest},
            data={"source": Path(config.data).name if Path(config.data).suffix else config.data,
                  "rows": len(self.rows.shown), "held_out": len(self.rows.held_out), "digest": self.rows.digest,
                  "labels": self.rows.labels, "chat": spoken(self.rows, self.base.tokenizer)},
            training={"steps": self.step, "batch": self._samples_per_step, "loss": recent(self.losses),
                      "seconds": round(self.seconds, 2),
                      "validation": {name: value for name, value in last.items() if name != "step"}},
        )  # fmt: skip

    def _finish(self) -> dict[str, Any]:
        """Measure, answer, save the adapter with its card."""
        self.trainer.accelerator.wait_for_everyone()
        measured = bool(self.validation) and self.validation[-1]["step"] == self.step
        if self.samples.held_out and not measured:
            self.measure()
        if not self._main:
            return {}
        if not due(self.step, self.config.sample_every):
            self.answer(self.step)
        recipe = self._recipe()
        with self._best_weights():
            layers = {COMPONENT: lora_layers(self.model)}
            heads = _heads(self.model)
        layers = self.plugins.finalize(layers)
        transposed = bool(self.model.peft_config["default"].fan_in_fan_out)
        adapter = write_adapter(layers[COMPONENT], heads, self.folder, self.config, recipe, transposed)
        files.write_text(self.folder / "card.md", card(recipe))
        answers = self.folder / "answers.jsonl"
        return {
            "adapter": str(adapter),
            "card": str(self.folder / "card.md"),
            "loss": recent(self.losses),
            "first_loss": self.losses[0],
            "steps": self.step,
            "validation": self.validation,
            "seconds": round(self.seconds, 3),
            "steps_per_second": self.step / self.seconds if self.seconds else 0.0,
            "parameters": sum(parameter.numel() for parameter in trainable(self.model)),
            "labels": self.rows.labels,
            "triggers": [],
            **({"answers": str(answers)} if answers.is_file() else {}),
        }


class _Follow(TrainerCallback):
    """Hands every optimiser step over to the training."""

    def __init__(self, training: LanguageTraining) -> None:
        self.training = training
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.training.after_step(control, time.perf_counter() - self._began)


def existing(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / MARK).is_file()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def _read_mark(place: Path) -> dict[str, Any]:
    try:
        mark: dict[str, Any] = json.loads((place / MARK).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"The checkpoint '{place}' is damaged ({error}): delete it and resume again.") from None
    return mark


def _read_average(place: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(place / AVERAGE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"The checkpoint '{place}' is damaged ({error}): delete it and resume again.") from None
    return state


def _heads(model: Any) -> dict[str, torch.Tensor]:
    """Whole modules that learnt besides the LoRA (a classification head), as PEFT names their tensors."""
    from peft import get_peft_model_state_dict

    if not model.peft_config["default"].modules_to_save:
        return {}
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor for name, tensor in state.items() if "lora_" not in name}


@torch.no_grad()
def check_packing(base: LanguageModel, samples: Samples) -> None:
    """Make sure that this model keeps packed samples apart: the second of two must not see the first.

    Raises:
        InputError: it does not, so packing would train on mixed-up contexts.
    """
    row = max(samples.shown, key=lambda sample: sample["position_ids"].count(0))
    starts = [number for number, position in enumerate(row["position_ids"]) if position == 0]
    if len(starts) < 2:
        return
    first, second = starts[1], starts[2] if len(starts) > 2 else len(row["input_ids"])
    together = Collate(0, packed=True)([{name: values[:second] for name, values in row.items()}])
    alone = torch.tensor([row["input_ids"][first:second]])
    together = {name: value.to(base.device) for name, value in together.items() if name != "labels"}
    try:
        mixed = base.model(**together).logits[0, first:].float()
    except TypeError:
        mixed = None
    apart = base.model(input_ids=alone.to(base.device)).logits[0].float()
    scale = float(apart.abs().max())
    tolerance = 1e-3 if base.model.dtype == torch.float32 else 5e-2
    if mixed is None or float((mixed - apart).abs().max()) > tolerance * scale:
        raise InputError(
            f"A {base.architecture} model does not keep packed samples apart: set packing to false "
            "(or attention to 'sdpa')."
        )
