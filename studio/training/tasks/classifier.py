"""Image classification: a LoRA of a ViT, an MLP-Mixer or another classifier; its head is saved with the adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adapters import files
from adapters.layers.variant import untouched
from adapters.plugin import Answers, Layers, Plugin
from adapters.progress import Progress
from pipelines.vision.loading import Classifier, open_classifier
from studio.datasets.cache import fingerprint
from studio.datasets.labelled_pictures import LabelledPicture
from studio.datasets.seeds import global_seed
from studio.jobs.kinds import Kind
from studio.training.cards import base_lines, base_name, front_matter
from studio.training.drivers import trainer as driver
from studio.training.drivers.trainer import Batch, RunSampler, TrainerTask
from studio.training.export import RECIPE_ENTRY, write_model_adapter
from studio.training.labelled_rows import read, source_of
from studio.training.language.layers import layer_config
from studio.training.language.measure import measure
from studio.training.schemas.classifier import TrainClassifierConfig
from studio.training.session import SILENT, Keep, TrainSession
from studio.training.tasks.language import heads_of
from studio.training.trainer_mixin import COMPONENT

KIND = Kind(
    "train-classifier", "studio.training.schemas.classifier:TrainClassifierConfig",
    "studio.training.tasks.classifier:run", continues=True, federated=True,
    ready="studio.training.ready:classifier", afterwards="studio.library.adopt:trained", title="Classifier",
    train="classifier", help="Train a LoRA of an image classifier (ViT, MLP-Mixer ...) from pictures with labels.",
    example="studio train classifier --data pictures.jsonl --base google/vit-base-patch16-224",
)  # fmt: skip

def run(
    config: TrainClassifierConfig,
    folder: Path,
    monitor: Any = SILENT,
    resume: bool = False,
    plugins: Sequence[Plugin] = (),
    keep: Keep = False,
) -> dict[str, Any]:
    """Train the adapter that ``config`` describes in ``folder``; arguments and result as of a language training.

    Raises:
        InputError: something that cannot be trained, in one sentence.
        Cancelled: stopped on request; a checkpoint to resume from was written.
    """
    return driver.train(TrainSession.of(ClassifierTask(config), folder, monitor, plugins), resume, keep)


class ClassifierTask(TrainerTask):
    """A classifier and rows of labelled pictures; the loss is the cross-entropy of the labels."""

    data_noun = "pictures"
    measures_at_end = True

    config: TrainClassifierConfig
    base: Classifier

    # ---------------------------------------------------------------- before the first step
    def rows(self) -> None:
        self.read = read(self.config)

    def open(self, session: TrainSession) -> None:
        self.session, config = session, self.config
        with global_seed(config.seed, "head"):  # a new head starts at random
            self.base = open_classifier(source_of(config.base), self.read.labels, config.dtype, session.device)
        session.dtype = next(self.base.model.parameters()).dtype

    def digest(self) -> str:
        return fingerprint(self.base.model)

    def encode(self) -> None:
        config = self.config
        self.samples, self.held = self._encoded(self.read.shown), self._encoded(self.read.held_out)
        self.data_digest, self.collator = self.read.digest, collate
        self.total = config.steps
        if config.epochs:
            self.total = math.ceil(config.epochs * len(self.samples) / self.samples_per_step)
        kept = f", {len(self.held)} held out" if self.held else ""
        told = f"{len(self.samples)} pictures{kept}, {len(self.read.labels)} labels"
        self.session.monitor.report(Progress("data", message="; ".join([told, *self.read.remarks])))

    def _encoded(self, rows: Sequence[LabelledPicture]) -> list[dict[str, Any]]:
        number = {label: n for n, label in enumerate(self.read.labels)}
        return [{"pixel_values": self.base.pixels(row.open()), "labels": number[row.label]} for row in rows]

    def inject(self, models: dict[str, Any]) -> dict[str, Any]:
        from peft import get_peft_model

        made = layer_config(models[COMPONENT], self.config, [self.base.head])  # type: ignore[arg-type]  # its fields
        wrapped: Any = get_peft_model(models[COMPONENT], made)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.learner = wrapped
        return {COMPONENT: wrapped}

    # ---------------------------------------------------------------- steps
    def collate(self, start: int, stop: int) -> Iterator[Batch]:
        size = self.config.batch_size
        order = list(RunSampler(len(self.samples), stop * size, self.config.seed))
        for number in range(start, stop):
            yield collate([self.samples[i] for i in order[number * size : (number + 1) * size]])

    def loss(self, batch: Batch) -> tuple[torch.Tensor, Answers]:
        given = {name: value.to(self.session.device) for name, value in batch.items()}
        outputs = self.learner(**given)

        def reference() -> torch.Tensor:
            with torch.no_grad(), untouched(self.session.models[COMPONENT]):
                found: torch.Tensor = self.learner(**given).logits.detach()
            return found

        return outputs.loss, Answers(outputs.logits, given["labels"], reference, shifted=False)

    @property
    def measurable(self) -> bool:
        return bool(self.held)

    def measure(self) -> dict[str, float]:
        size = max(64, self.config.batch_size)
        batches = (collate(self.held[start : start + size]) for start in range(0, len(self.held), size))
        autocast = self.session.accelerator.autocast
        return measure(self.session.models[COMPONENT], batches, autocast=autocast)[0]

    # ---------------------------------------------------------------- saving
    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        data = {
            "source": Path(self.config.data).name, "rows": len(self.read.shown), "held_out": len(self.read.held_out),
            "digest": self.read.digest, "labels": self.read.labels,
        }  # fmt: skip
        return {"family": "classifier", "architecture": self.base.architecture}, data

    def trained(self) -> dict[str, Any]:
        last = self.session.validation[-1] if self.session.validation else {}
        return {"validation": {name: value for name, value in last.items() if name != "step"}}

    def export(self, layers: Layers, folder: Path, name: str, recipe: dict[str, Any]) -> dict[str, str]:
        with self.session.best_weights():
            heads, more = heads_of(self.learner), self.session.plugins.beside()
        beside = {"README.md": card(recipe)}
        return {
            "peft": str(write_model_adapter(
                layers[COMPONENT], folder / name, self.config, recipe, beside, {}, heads, more
            ))
        }  # fmt: skip

    def card(self, recipe: dict[str, Any]) -> Path:
        return files.write_text(self.session.folder / "card.md", card(recipe))

    def result(self, paths: Mapping[str, str]) -> dict[str, Any]:
        return {"labels": self.read.labels}


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Samples as a batch: pixel_values (batch, 3, side, side), labels (batch,)."""
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }


def card(recipe: Mapping[str, Any]) -> str:
    """The adapter's card: what it is, how it was made, how it is loaded."""
    config, training, data, base = recipe["config"], recipe["training"], recipe["data"], recipe["base"]
    measured = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in training["validation"].items())
    mixer = "Mixer" in base["architecture"]
    kind = "MixerForImageClassification" if mixer else "AutoModelForImageClassification"
    module = "pipelines.vision.mixer" if mixer else "transformers"
    lines = [
        *front_matter(base["name"], "peft", ["lora", "peft", "adapter-studio"], pipeline_tag="image-classification"),
        f"# {recipe['name']}",
        "",
        f"A LoRA for **{base_name(base['name'])}** ({base['architecture']}), labels: {', '.join(data['labels'])}.",
        "",
        f"- Rank {config['rank']}, layers: {config['target_regex'] or config['targets']}, start: {config['init']}",
        f"- {training['steps']} steps of {training['batch']} pictures on {data['rows']}, {config['optimizer']} at "
        f"{config['learning_rate']:g}, final loss {training['loss']:.4f}",
        *([f"- On {data['held_out']} held-out pictures: {measured}"] if measured else []),
        f"- Digest of the base weights: `{base['digest']}`",
        f"- Data digest: `{data['digest']}`",
        "",
        "```python",
        "from peft import PeftModel",
        f"from {module} import {kind}",
        *base_lines(base["name"]),
        "",
        f"model = {kind}.from_pretrained(base, num_labels={len(data['labels'])}, ignore_mismatched_sizes=True)",
        'model = PeftModel.from_pretrained(model, ".")',
        "```",
        "",
        f"Made with adapter-studio; the whole recipe is in the weights' metadata (`{RECIPE_ENTRY}`).",
        "",
    ]
    return "\n".join(lines)
