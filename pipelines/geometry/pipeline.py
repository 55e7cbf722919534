"""Reconstruction of a scene from photos.

    pipeline = ScenePipeline.from_pretrained("path/to/weights")
    scene = pipeline(["a.jpg", "b.jpg", "c.jpg"], calibrate=True)
    scene.export("room.glb")

The network predicts pointmaps for ordered pairs of photos (:mod:`~pipelines.geometry.inference`), pairs whose photos
contradict each other are left out (:mod:`~pipelines.geometry.verification`), and global alignment finds the cameras
(:mod:`~pipelines.geometry.alignment`). With calibration, the network first learns a LoRA from its own aligned
predictions (:mod:`~pipelines.geometry.calibration`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from adapters.errors import InputError
from adapters.progress import Monitor, Progress, Silent, check
from pipelines.geometry import (
    alignment,
    calibration,
    cameras,
    checkpoints,
    images,
    inference,
    initialise,
    verification,
    video,
)  # fmt: skip
from pipelines.geometry.alignment import Alignment
from pipelines.geometry.calibration import Labels, Recipe, Train
from pipelines.geometry.estimate import estimate
from pipelines.geometry.images import Photo
from pipelines.geometry.inference import Predictions
from pipelines.geometry.licence import must_accept
from pipelines.geometry.pairs import make_pairs
from pipelines.geometry.scene import Record, Scene

Photos = str | Path | Sequence[str | Path | Photo]
"""Picture files, one video, or photos from :meth:`ScenePipeline.read`."""


@dataclass(frozen=True)
class Calibration:
    """An adapter calibrated on one or more scenes.

    Attributes:
        model: the PEFT model.
        before: the first scene, reconstructed without the adapter.
        labels: pseudo labels, per scene.
        losses: of every training step.
        facts: contents of ``scene.json``.
    """

    model: Any
    before: Scene
    labels: tuple[Labels, ...]
    losses: tuple[float, ...]
    facts: dict[str, Any]

    def save(self, folder: Path, settings: dict[str, Any] | None = None) -> Path:
        """Write an ordinary PEFT adapter with ``scene.json``, which also records ``settings``; returns ``folder``."""
        base, rest = {"base": self.facts["base"]}, {k: v for k, v in self.facts.items() if k != "base"}
        return calibration.save_adapter(self.model, folder, {**base, "settings": settings or {}, **rest})


class ScenePipeline:
    """Reconstruction of scenes with a pointmap network.

    Attributes:
        network: the network, wrapped with an adapter if one was loaded or calibrated.
        checkpoint: the loaded weights: name, hash, licence.
        device: device of network and alignment.
    """

    def __init__(self, checkpoint: checkpoints.Checkpoint, adapter: str | Path = "") -> None:
        self.checkpoint = checkpoint
        self.network: nn.Module = checkpoint.network
        self.device = next(checkpoint.network.parameters()).device
        self._known: dict[str, Any] = {}  # facts of the adapter that the network carries
        if adapter:
            self.network, scene = calibration.load_adapter(self.network, Path(adapter), checkpoint.sha256)
            self._known = scene or {"images": []}

    @classmethod
    def from_pretrained(
        cls, source: str | Path, adapter: str | Path = "", device: str | torch.device = "cpu",
        accept_licence: bool = False,
    ) -> ScenePipeline:  # fmt: skip
        """Load weights of the DUSt3R family.

        Args:
            source: a ``.pth`` file, a folder with ``config.json`` and ``model.safetensors``, or a hub id.
            adapter: folder of an adapter calibrated on these weights.
            device: "cpu", "cuda", "cuda:1".
            accept_licence: accept the licence of the weights; needed if it forbids commercial use.

        Raises:
            InputError: weights that do not exist or cannot be read, a licence that is not accepted, or an adapter for
                another base.
        """
        must_accept(source, accept_licence)
        return cls(checkpoints.open_checkpoint(source, torch.device(device)), adapter)

    def read(
        self, photos: Photos, size: int | None = None, seconds_per_frame: float = 1.0, frames: Path | None = None,
        monitor: Monitor | None = None,
    ) -> list[Photo]:  # fmt: skip
        """Read photos and prepare them for this network.

        Args:
            photos: picture files, one video, or photos read before.
            size: longer side in pixels; None = the network's training size.
            seconds_per_frame: time between the frames taken from a video.
            frames: folder to save these frames to, for exports that include the pictures.
            monitor: may cancel.

        Raises:
            InputError: a file that cannot be read, or a video together with other files.
        """
        config = self.checkpoint.network.config
        options = (size or max(config.img_size), config.patch_size, config.img_size[0] == config.img_size[1])
        several = [photos] if isinstance(photos, str | Path) else photos
        given = [photo if isinstance(photo, Photo) else Path(photo) for photo in several]
        if any(isinstance(one, Path) and one.suffix.lower() in video.SUFFIXES for one in given):
            if len(given) > 1:
                raise InputError("Give either pictures or one video.")
            assert isinstance(given[0], Path)
            return _frames(video.read_video(given[0], seconds_per_frame), frames, options)
        out = []
        for one in given:
            check(monitor or Silent())
            out.append(one if isinstance(one, Photo) else images.read_photo(one, *options))
        return out

    def __call__(
        self, photos: Photos, calibrate: bool | Recipe = False, also: Sequence[Photos] = (), size: int | None = None,
        seconds_per_frame: float = 1.0, frames: Path | None = None, graph: str = "complete", many: bool = False,
        verify: bool = True, steps: int = 300, schedule: Literal["cosine", "linear"] = "cosine", chunk: int = 8,
        dtype: str = "auto", mu: float = 0.03, cutoff: float = 1.5, share: bool = True,
        train: Train = calibration.train_adapter, on_calibrated: Callable[[Calibration], None] | None = None,
        monitor: Monitor | None = None,
    ) -> Scene:  # fmt: skip
        """Reconstruct a scene.

        Args:
            photos: three or more of one scene from different places; one gives only depth, two a relative pose.
            calibrate: first train an adapter on this scene (LoRA3D), optionally by a given :class:`Recipe`; needs three
                or more photos. The pipeline's network keeps the adapter.
            also: further scenes to train the same adapter on.
            size, seconds_per_frame, frames: see :meth:`read`.
            graph: pairs to predict: "complete", "swin-3", "logwin-2", "oneref-0" (:mod:`pipelines.geometry.pairs`).
            many: allow a complete graph over more than 30 photos.
            verify: leave out pairs whose photos differ in colour where their points coincide.
            steps, schedule: of the alignment.
            chunk: pairs decoded together.
            dtype: precision of encoder and decoders.
            mu, cutoff, share: of the labels, see :func:`pipelines.geometry.calibration.calibrate`.
            train: trains the adapter; the studio's function keeps checkpoints.
            on_calibrated: receives the adapter once it is trained, before the scene is reconstructed with it.
            monitor: receives progress and may cancel.

        Returns:
            The scene; ``scene.record`` says how it was made, with warnings and the adapter.

        Raises:
            InputError: photos or settings that cannot be used.
            adapters.errors.Cancelled: ``monitor`` asked to stop.
        """
        monitor = monitor or Silent()
        if not photos:
            raise InputError("There are no pictures: give three or more of one scene, from different places.")
        if calibrate and self._known:
            raise InputError("Calibrate or use an existing adapter, not both: to calibrate, load no adapter.")
        if also and not calibrate:
            raise InputError("Further scenes are only for training an adapter: set calibrate=True, or leave them out.")
        scenes = [
            self.read(one, size, seconds_per_frame, frames if number == 0 else None, monitor)
            for number, one in enumerate((photos, *also))
        ]
        if calibrate:
            for one in scenes:
                calibration.check_photos(one)
        shots = scenes[0]
        graphs = [make_pairs(len(one), graph, many=many) for one in scenes]
        recipe = calibrate if isinstance(calibrate, Recipe) else Recipe(dtype=dtype)
        rounds = 3 if calibrate else 1  # plain, robust, with the adapter
        cost = estimate(
            self.checkpoint.network.config, sum(map(len, scenes)), sum(map(len, graphs)), *shots[0].size,
            self.device, chunk, recipe.epochs if calibrate else 0, steps * rounds if len(shots) > 2 else 0,
        )  # fmt: skip
        monitor.report(Progress("loading", message=f"expected: {cost}"))
        check(monitor)

        def predict(network: nn.Module, number: int) -> Predictions:
            return inference.predict(network, scenes[number], graphs[number], chunk, dtype, monitor)

        def solve(predictions: Predictions) -> tuple[Alignment, list[str]]:
            return aligned(predictions, shots, verify, steps, schedule, self.device, monitor)

        warnings = [text for one in scenes for photo in one for text in photo.remarks]
        warnings += [*_repeated(shots), *_changed(self._known, shots)]
        predictions = predict(self.network, 0)
        found, doubts = solve(predictions)
        learnt = None
        if calibrate:
            before = Scene.of(found, shots)
            every = [predictions, *(predict(self.network, number) for number in range(1, len(scenes)))]
            model, _, labels, losses = calibration.calibrate(
                self.network, scenes, [one.to(self.device) for one in every], recipe, mu, warmup(steps),
                cutoff, steps, verify=verify, share=share, train=train, monitor=monitor,
            )  # fmt: skip
            facts = calibration.facts_of(self.checkpoint.facts(), scenes, labels, losses)
            self.network, self._known = model, facts
            learnt = Calibration(model, before, tuple(labels), tuple(losses), facts)
            if on_calibrated is not None:
                on_calibrated(learnt)
            warnings += [text for kept in labels for text in kept.warnings]
            predictions = predict(self.network, 0)
            found, doubts = solve(predictions)
        warnings += doubts
        if len(shots) > 2 and calibration.still(found):
            warnings.append("The cameras hardly move: depth and poses are unreliable.")
        loss = found.losses[-1] if found.losses else None
        record = Record(tuple(warnings), str(cost), len(graphs[0]), predictions.encodings, loss, learnt)
        return Scene.of(found, shots, record)


def warmup(steps: int) -> int:
    """Steps of a robust alignment before it is reweighted: the paper's 100, but at most a third of ``steps``."""
    return min(100, steps // 3)


def aligned(
    predictions: Predictions, photos: Sequence[Photo], verify: bool = True, steps: int = 300,
    schedule: Literal["cosine", "linear"] = "cosine", device: torch.device | str = "cpu",
    monitor: Monitor | None = None,
) -> tuple[Alignment, list[str]]:  # fmt: skip
    """The alignment of one, two or more photos from the network's predictions, and warnings about it."""
    sizes = predictions.sizes
    if len(sizes) == 1:
        focals = initialise.own_focals(predictions)
        ones = cameras.Similarity(torch.ones(1), torch.eye(3)[None], torch.zeros(1, 3))
        flat = torch.zeros(2, 1, predictions.points1.shape[1])
        return Alignment(sizes, torch.eye(4)[None], focals, predictions.points1[..., 2].clamp_min(1e-4),
                         initialise.strongest(predictions), flat, flat, ones), []  # fmt: skip
    if len(sizes) == 2:
        return alignment.view_pair(predictions), []
    warnings: list[str] = []
    if verify:
        seen = verification.verified(predictions, photos)
        predictions, warnings = seen.predictions, seen.warnings
    return alignment.align(predictions.to(device), steps, schedule=schedule, monitor=monitor), warnings


def _frames(taken: video.Frames, folder: Path | None, options: tuple[int, int, bool]) -> list[Photo]:
    """Photos of a video's frames, which are saved in ``folder``; the first one's remark describes the selection."""
    out = []
    for n, frame in enumerate(taken.images):
        name = f"frame-{n:04}.png"
        photo = images.prepare(frame, name, hashlib.sha256(frame.tobytes()).hexdigest(), *options)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            frame.save(folder / name, compress_level=1)
            photo = replace(photo, file=folder / name)
        out.append(replace(photo, remarks=(f"Taken: {taken}",)) if n == 0 else photo)
    return out


def _repeated(photos: Sequence[Photo]) -> list[str]:
    seen = [photo.sha256 for photo in photos]
    return ["Some pictures are the same file."] if len(set(seen)) < len(seen) else []


def _changed(adapter: dict[str, Any], photos: Sequence[Photo]) -> list[str]:
    """A warning if pictures differ from those of the same name that the adapter was calibrated on."""
    scenes = (adapter, *adapter.get("also", ()))
    known = {image["name"]: image["sha256"] for scene in scenes for image in scene.get("images", ())}
    other = [photo.name for photo in photos if known.get(photo.name, photo.sha256) != photo.sha256]
    if not other:
        return []
    return [
        f"{len(other)} picture(s) differ from those of the same name that the adapter was calibrated on "
        f"({', '.join(other[:3])}): the adapter only helps if they show the same scene."
    ]
