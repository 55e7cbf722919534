"""LoRA3D (arXiv 2412.07746): a pointmap network learns a scene, or several, from its own aligned predictions.

The mathematics is in :mod:`pipelines.geometry.calibration`. Labels are made once and kept in the run's folder until
the last step, so that a resumed run learns from the same ones to the bit, whatever device made them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters import files
from adapters.errors import InputError
from adapters.formats import LoraFile, read
from adapters.formats.fit import fit
from adapters.formats.lora import MODEL
from adapters.plugin import Layers, Outputs, Plugin
from adapters.progress import Monitor, Progress
from pipelines.geometry import calibration, inference
from pipelines.geometry.calibration import Labels, Recipe, Sample, Train
from pipelines.geometry.images import Photo
from pipelines.geometry.network import Points
from pipelines.geometry.objective import confidence_loss
from pipelines.geometry.pairs import make_pairs
from pipelines.geometry.pipeline import ScenePipeline, warmup
from studio.datasets.cache import key_of
from studio.datasets.seeds import rng
from studio.jobs.kinds import Kind
from studio.reconstruction import job as reconstruction
from studio.reconstruction.schema import ReconstructConfig
from studio.training.cards import base_name, front_matter
from studio.training.device import main_process
from studio.training.drivers import accelerate as driver
from studio.training.export import RECIPE_ENTRY, write_model_adapter
from studio.training.methods import plugins_for
from studio.training.ready import read_scenes
from studio.training.schemas.scene import TrainSceneConfig
from studio.training.session import SILENT, TrainSession
from studio.training.targets import check_ranks, no_match, peft_config
from studio.training.task import Measures, Task

KIND = Kind(
    "train-scene", "studio.training.schemas.scene:TrainSceneConfig", "studio.training.tasks.scene:run",
    continues=True, ready="studio.training.ready:scene", title="Calibrate", train="scene",
    help="Calibrate a pointmap network to scenes with a LoRA (LoRA3D), from folders of photos.",
    example="studio train scene --data photos/ --name my-room",
)  # fmt: skip


def run(
    config: TrainSceneConfig,
    folder: Path,
    monitor: Monitor = SILENT,
    resume: bool = False,
    plugins: Sequence[Plugin] = (),
    keep: bool | int = False,
) -> dict[str, Any]:
    """Calibrate with ``config`` in ``folder``.

    Args:
        folder: gets ``NAME/`` (a PEFT directory with ``scene.json``), ``card.md``, ``config.yaml``, ``loss.csv``,
            ``checkpoints/``.
        resume: go on from the newest checkpoint in ``folder`` (from the beginning if there is none).
        plugins: training methods that join those of the configuration.
        keep: do not train: save the newest checkpoint, or a given step's, as the adapter.

    Returns:
        ``adapter`` (path), ``card``, ``loss`` (mean of the last tenth), ``first_loss``, ``steps``, ``validation``
        (measures by step), ``seconds``, ``steps_per_second``, ``parameters``.

    Raises:
        InputError: something that cannot be trained, in one sentence.
        Cancelled: stopped on request; a checkpoint to resume from was written.
    """
    return driver.train(TrainSession.of(SceneTask(config), folder, monitor, plugins), resume, keep)


def trainer(config: ReconstructConfig, base: Mapping[str, str], folder: Path, resume: bool = False) -> Train:
    """The function with which a reconstruction's pipeline trains the adapter: a session in ``folder``, which exports it
    there as ``adapter/``.

    Args:
        base: name, sha256 and licence of the weights.
        resume: go on from the newest checkpoint in ``folder``.
    """

    def train(
        network: nn.Module, photos: Sequence[Sequence[Photo]], labels: Sequence[Labels], recipe: Recipe,
        monitor: Monitor | None = None,
    ) -> tuple[Any, list[float]]:  # fmt: skip
        task = SceneTask(config, Scenes(network, base, photos, labels))
        session = TrainSession.of(task, folder, monitor or SILENT)
        driver.train(session, resume)
        return session.models[MODEL].eval(), session.losses

    return train


@dataclass(frozen=True)
class Scenes:
    """The network, name, sha256 and licence of its weights, and photos and labels of every scene."""

    network: Any
    base: Mapping[str, str]
    photos: Sequence[Sequence[Photo]]
    labels: Sequence[Labels]


class Pairs(nn.Module):
    """The network for a driver: a batch of labelled pairs in, points and confidence of both views out."""

    def __init__(self, model: nn.Module, scenes: Scenes) -> None:
        super().__init__()
        self.model, self._scenes = model, scenes

    def forward(self, batch: Sequence[Sample]) -> tuple[Points, Points]:
        return calibration.answers(self.model, batch, self._scenes.photos, self._scenes.labels)


class SceneTask(Task):
    """Photos of scenes, and a pointmap network that learns what its predictions agree on.

    Args:
        asked: the training, or the reconstruction it is part of.
        scenes: what to learn; None: read, opened and labelled here.
    """

    data_noun = "pictures"
    measures_at_end = True

    config: TrainSceneConfig
    scenes: Scenes

    def __init__(self, asked: TrainSceneConfig | ReconstructConfig, scenes: Scenes | None = None) -> None:
        super().__init__(asked)
        self.config = asked if isinstance(asked, TrainSceneConfig) else TrainSceneConfig.of(asked)
        self.given = scenes

    # ---------------------------------------------------------------- before the first step
    def methods(self) -> list[Plugin]:
        return plugins_for(self.config)

    def rows(self) -> None:
        if self.given is not None:
            return
        self.places = read_scenes(self.config)

    def open(self, session: TrainSession) -> None:
        self.session, config = session, self.config
        if self.given is not None:
            self.scenes = self.given
            return
        pipeline = ScenePipeline.from_pretrained(
            reconstruction.resolve(config.base), device=session.device, accept_licence=config.accept_licence
        )
        photos = [
            pipeline.read(place, config.size, config.seconds_per_frame, monitor=session.monitor)
            for place in self.places
        ]
        for one in photos:
            calibration.check_photos(one)
        self.scenes = Scenes(pipeline.network, pipeline.checkpoint.facts(), photos, ())

    def digest(self) -> str:
        return self.scenes.base["sha256"]

    def encode(self) -> None:
        config, session = self.config, self.session
        with session.accelerator.main_process_first():
            self.scenes = self._labelled()
        self.samples, self.held_out = _split(self.scenes.labels, config.validation_split, config.seed)
        self.per_epoch = len(next(calibration.epochs(self.samples, self.scenes.labels, config.batch_size)))
        self.total = config.steps
        if config.epochs:
            self.total = math.ceil(config.epochs * self.per_epoch / self._batches_per_step)
        session.monitor.report(Progress("data", message=self._summary()))

    @property
    def _batches_per_step(self) -> int:
        return int(self.config.gradient_accumulation * self.session.accelerator.num_processes)

    def _labelled(self) -> Scenes:
        """The scenes with labels: kept ones for the same pictures, base and settings, else new ones, then kept."""
        config, scenes = self.config, self.scenes
        label_settings = (config.graph, config.mu, config.cutoff, config.share, config.verify, config.align_steps)
        self.data_digest = key_of(
            scenes.base["sha256"], label_settings, *(_digest(photo) for one in scenes.photos for photo in one)
        )
        if all(_key(file) == self.data_digest for file in self._label_files):
            kept = [Labels.load(file) for file in self._label_files]
        else:
            kept = list(scenes.labels) or self._new_labels()
            for labels, file in zip(kept, self._label_files, strict=True) if main_process() else ():
                labels.save(file, key=self.data_digest)
        return replace(scenes, labels=[labels.to("cpu") for labels in kept])

    @property
    def _label_files(self) -> list[Path]:
        return [self.session.folder / f"labels-{n}.safetensors" for n in range(len(self.scenes.photos))]

    def _new_labels(self) -> list[Labels]:
        config, scenes, monitor = self.config, self.scenes, self.session.monitor
        told = [
            inference.predict(
                scenes.network, photos, make_pairs(len(photos), config.graph, many=config.many), config.chunk,
                config.dtype, monitor,
            ).to(self.session.device)
            for photos in scenes.photos
        ]  # fmt: skip
        steps = config.align_steps
        return calibration.labelled(
            scenes.photos, told, config.mu, warmup(steps), config.cutoff, steps, verify=config.verify,
            share=config.share, monitor=monitor,
        )[1]  # fmt: skip

    def _summary(self) -> str:
        pictures = sum(map(len, self.scenes.photos))
        said = [f"{len(self.samples)} labelled pairs of {pictures} pictures"]
        said += [f"{len(self.held_out)} pairs held out"] if self.held_out else []
        return "; ".join([*said, *(text for kept in self.scenes.labels for text in kept.warnings)])

    def components(self) -> dict[str, Any]:
        return {MODEL: self.scenes.network}

    def earlier(self, models: Mapping[str, Any]) -> LoraFile | None:
        if not self.config.continue_from:
            return None
        from studio import library

        return fit(read(library.resolve_adapter(self.config.continue_from)), dict(models), self.config.base)

    def inject(self, models: dict[str, Any]) -> dict[str, Any]:
        config, network = self.config, models[MODEL]
        network.requires_grad_(False)
        chosen = calibration.adapted_layers(network, config.target_regex or calibration.TARGETS[config.targets])
        if config.exclude_regex:
            left_out = set(calibration.adapted_layers(network, config.exclude_regex))
            chosen = [name for name in chosen if name not in left_out]
        if not chosen:
            names = calibration.adapted_layers(network, ".*")
            raise no_match("the network", config.target_regex or config.targets, config, names)
        made = peft_config(config, chosen)
        check_ranks({name: tuple(network.get_parameter(f"{name}.weight").shape) for name in chosen}, made)
        return {MODEL: calibration.injected(network, made, config.seed)}

    def trainee(self) -> nn.Module:
        self.scenes.network.gradient_checkpointing = self.config.gradient_checkpointing
        return Pairs(self.session.models[MODEL], self.scenes)

    # ---------------------------------------------------------------- steps
    def collate(self, start: int, stop: int) -> Iterator[list[Sample]]:
        accelerator = self.session.accelerator
        count, rank = accelerator.num_processes, accelerator.process_index
        batches = itertools.chain.from_iterable(
            calibration.epochs(self.samples, self.scenes.labels, self.config.batch_size, self.config.seed)
        )  # fmt: skip
        return itertools.islice(batches, start * count + rank, stop * count, count)

    def loss(self, batch: list[Sample]) -> tuple[torch.Tensor, Outputs]:
        """DUSt3R's loss on the batch: means over the pixels that count in all of its pairs."""
        predicted = self.learner(batch)
        targets, valid = self._targets(batch)
        loss = confidence_loss(predicted, targets, valid)
        each = loss.detach().expand(len(batch))
        return loss, Outputs(predicted[0].points, targets[0], each, each.new_zeros(len(batch)), len(batch))

    def _targets(self, batch: Sequence[Sample]) -> Any:
        return calibration.targets_of(batch, self.scenes.labels, self.session.device)

    def rose(self, first: float, last: float) -> bool:
        return last > first + 1  # by as much as the points lie from the cameras; the loss itself may be negative

    @property
    def measurable(self) -> bool:
        return bool(self.held_out)

    @torch.no_grad()
    def measure(self) -> Measures:
        self.learner.eval()
        try:
            losses = [confidence_loss(self.learner([pair]), *self._targets([pair])) for pair in self.held_out]
        finally:
            self.learner.train()
        return {"validation_loss": float(torch.stack(losses).mean())}

    def epoch(self, step: int) -> float:
        return step * self._batches_per_step / self.per_epoch

    # ---------------------------------------------------------------- saving
    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        data = {
            "scenes": len(self.scenes.photos),
            "pictures": sum(map(len, self.scenes.photos)),
            "pairs": len(self.samples),
            "digest": self.data_digest,
        }
        return {"family": "pointmap", "licence": self.scenes.base["licence"]}, data

    def trained(self) -> dict[str, Any]:
        last = self.session.validation[-1] if self.session.validation else {}
        return {"validation": {name: value for name, value in last.items() if name != "step"}}

    def export(self, layers: Layers, folder: Path, name: str, recipe: dict[str, Any]) -> dict[str, str]:
        scenes = self.scenes
        about = calibration.facts_of(scenes.base, scenes.photos, scenes.labels, self.session.losses)
        about["settings"] = recipe["config"]
        beside = {calibration.SCENE: json.dumps(about, indent=1), "README.md": card(recipe, self.config)}
        return {"peft": str(write_model_adapter(layers[MODEL], folder / name, self.config, recipe, beside))}

    def card(self, recipe: dict[str, Any]) -> Path:
        return files.write_text(self.session.folder / "card.md", card(recipe, self.config))

    def result(self, paths: Mapping[str, str]) -> dict[str, Any]:
        if self.session.step == self.total:
            for file in self._label_files:
                file.unlink(missing_ok=True)
        return {"validation": self.session.validation}


def card(recipe: Mapping[str, Any], config: TrainSceneConfig) -> str:
    """The adapter's card: what it is, how it was made, how it is loaded."""
    training, data, base = recipe["training"], recipe["data"], recipe["base"]
    measured = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in training["validation"].items())
    tags = ["lora", "peft", "lora3d", "dust3r", "adapter-studio"]
    scenes = f"{data['scenes']} scenes" if data["scenes"] > 1 else "a scene"
    said = f"{scenes}: {data['pictures']} pictures, {data['pairs']} labelled pairs"
    lines = [
        *front_matter(config.base, "peft", tags, pipeline_tag="image-to-3d"),
        f"# {config.name}",
        "",
        f"A LoRA for **{base_name(config.base)}**, calibrated to {said}. LoRA3D, arXiv 2412.07746.",
        "",
        f"- Rank {config.rank}, layers: {config.target_regex or config.targets}, start: {config.init}",
        f"- {training['steps']} steps of {training['batch']} pairs, {config.optimizer} at {config.learning_rate:g}, "
        f"final loss {training['loss']:.4f}",
        *([f"- On held-out pairs: {measured}"] if measured else []),
        f"- Licence of the base: {base['licence']}",
        f"- SHA-256 of the base: `{base['digest']}`",
        f"- Data digest: `{data['digest']}`",
        "",
        "```python",
        "from pipelines.geometry import ScenePipeline",
        "",
        f"base = {base_name(config.base)!r}  # a .pth file, a folder or a hub id",
        'pipeline = ScenePipeline.from_pretrained(base, adapter=".")',
        "```",
        "",
        f"Made with adapter-studio; the whole recipe is in the weights' metadata (`{RECIPE_ENTRY}`), what was seen in "
        f"`{calibration.SCENE}`.",
        "",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ small things


def _digest(photo: Photo) -> str:
    return hashlib.blake2b(photo.pixels.contiguous().numpy().tobytes(), digest_size=20).hexdigest()


def _key(file: Path) -> str:
    """The key of kept labels; empty where there are none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as kept:
            return str((kept.metadata() or {}).get("key", ""))
    except (OSError, SafetensorError):
        return ""


def _split(labels: Sequence[Labels], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(pairs to learn, pairs held out): a share of every scene's, drawn once for a seed.

    Raises:
        InputError: nothing would be left to learn.
    """
    shown: list[Sample] = []
    held_out: list[Sample] = []
    for scene, kept in enumerate(labels):
        every = range(len(kept.pairs))
        count = max(1, round(share * len(every))) if share else 0
        if count >= len(every):
            raise InputError(
                f"{len(every)} labelled pairs are too few to hold {share:.0%} of them out: lower validation_split."
            )
        chosen = set(rng(seed, "validation", scene).sample(every, count))
        shown += [(scene, edge) for edge in every if edge not in chosen]
        held_out += [(scene, edge) for edge in every if edge in chosen]
    return shown, held_out
