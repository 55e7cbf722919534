"""The reconstruction job: runs pictures through the pipeline and writes the results into the job's folder.

``scene.npz`` is kept, from which every export can be made again without the network (:func:`export`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import files
from adapters.errors import InputError
from adapters.progress import Monitor, Progress
from pipelines.geometry import video
from studio.reconstruction.schema import ADAPTER, ReconstructConfig

if TYPE_CHECKING:
    from pipelines.geometry import Scene
    from pipelines.geometry.exports.written import Written
    from pipelines.geometry.pipeline import Calibration
    from pipelines.geometry.selection import Selection

VIDEOS = video.SUFFIXES
VIEW_FROM = (90, 82, 5.0)
"""Camera of a browser's viewer for ``view.glb``: degrees around, degrees from above, distance."""
EXPORTS = ("glb", "ply", "colmap", "nerfstudio", "npz")


def licence(model: str) -> str:
    """The licence of weights, to show before they are used."""
    from pipelines.geometry.licence import licence_of

    return licence_of(resolve(model))


def restricted(model: str) -> bool:
    """Whether the licence of weights must be accepted before they are used."""
    from pipelines.geometry import licence

    return licence.restricted(resolve(model))


def resolve(model: str) -> str:
    """Where the weights are: shipped ones by name, anything else unchanged."""
    import assets

    if model == "dust3r-tiny":
        try:
            return str(assets.path("models/dust3r-tiny"))
        except FileNotFoundError:
            raise InputError("The embedded model is not in this installation: give your own weights.") from None
    return model


def pictures_in(folder: str | Path) -> list[str]:
    """The pictures of a scene's folder in the order of their names, or its one video.

    Raises:
        InputError: there is no such folder, or neither pictures nor a video in it.
    """
    from pipelines.pictures import SUFFIXES, UNREADABLE

    place = Path(folder)
    if not place.is_dir():
        raise InputError(f"There is no folder '{folder}'.")
    found = sorted(file for file in place.iterdir() if file.is_file() and not file.name.startswith("."))
    for endings in (SUFFIXES | UNREADABLE, VIDEOS):  # unreadable ones are reported when they are opened
        chosen = [str(file.resolve()) for file in found if file.suffix.lower() in endings]
        if chosen:
            return chosen
    raise InputError(
        f"There are neither pictures nor a video in '{folder}' (looked for {', '.join([*sorted(SUFFIXES), *VIDEOS])})."
    )


def run(config: ReconstructConfig, folder: Path, monitor: Monitor, resume: bool = False) -> dict[str, Any]:
    """Reconstruct ``config`` into ``folder``.

    Args:
        resume: a calibration goes on from its newest checkpoint in ``folder``.

    Raises:
        adapters.errors.InputError: pictures, weights or settings cannot be used.
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    from pipelines.geometry import ScenePipeline, previews
    from pipelines.geometry.calibration import Recipe
    from studio import devices
    from studio.training.tasks.scene import trainer

    begun = time.monotonic()
    monitor.report(Progress("loading", message=f"weights {config.model}, licence {licence(config.model)}"))
    _check(config)
    pipeline = ScenePipeline.from_pretrained(
        resolve(config.model), config.adapter, devices.resolve(config.device), config.accept_licence
    )
    recipe = Recipe(config.rank, config.preset, config.epochs, lr=config.lr, seed=config.seed, dtype=config.dtype)
    result: dict[str, Any] = {}

    def keep(learnt: Calibration) -> None:
        previews.write_view(learnt.before, folder / "before.glb", _selection(config), config.mesh, config.cameras)
        result.update(
            before=str(folder / "before.glb"), adapter=str(folder / ADAPTER), labels=learnt.labels[0].kept,
            training_loss=[learnt.losses[0], learnt.losses[-1]],
        )  # fmt: skip

    scene = pipeline(
        config.images, recipe if config.calibrate else False, [pictures_in(other) for other in config.also],
        size=config.size, seconds_per_frame=config.seconds_per_frame, frames=folder / "frames", graph=config.graph,
        many=config.many, verify=config.verify, steps=config.steps, schedule=config.schedule, chunk=config.chunk,
        dtype=config.dtype, mu=config.mu, cutoff=config.cutoff, share=config.share,
        train=trainer(config, pipeline.checkpoint.facts(), folder, resume), on_calibrated=keep, monitor=monitor,
    )  # fmt: skip
    monitor.report(Progress("saving"))
    record = scene.record
    return {
        "estimate": record.estimate, "licence": pipeline.checkpoint.licence, "warnings": list(record.warnings),
        **result, **_save(scene, folder, config), "images": len(scene.names),
        "files": [str(file.resolve()) if file else None for file in scene.files], "pairs": record.pairs,
        "encodings": record.encodings, "loss": record.loss, "seconds": round(time.monotonic() - begun, 2),
    }  # fmt: skip


def _check(config: ReconstructConfig) -> None:
    """Check what can be checked before the weights are opened."""
    from pipelines.geometry import licence

    if not config.images:
        raise InputError("There are no pictures: give three or more of one scene, from different places.")
    licence.must_accept(resolve(config.model), config.accept_licence)
    if config.calibrate and config.adapter:
        raise InputError("Choose calibration or an adapter from an earlier one, not both.")
    if config.also and not config.calibrate:
        raise InputError("More scenes are only for training the adapter: add --calibrate.")


def _selection(config: ReconstructConfig) -> Selection:
    from pipelines.geometry.selection import Selection

    return Selection(config.confidence, config.percentile, limit=config.max_points)


def _write_glb(scene: Scene, file: Path, config: ReconstructConfig) -> int:
    return scene.export(file, "glb", _selection(config), mesh=config.mesh, cameras=config.cameras).points


def _save(scene: Scene, folder: Path, config: ReconstructConfig) -> dict[str, Any]:
    from PIL import Image

    from pipelines.geometry import previews

    scene.save(folder / "scene.npz")
    points = _write_glb(scene, folder / "scene.glb", config)
    previews.write_view(scene, folder / "view.glb", _selection(config), config.mesh, config.cameras)
    previews.write_flight(scene, folder / "flight.gif", _selection(config))
    pictures = []
    for n in range(len(scene.names)):
        row = [scene.images[n], previews.depth_picture(scene.depth[n]), previews.depth_picture(scene.confidence[n])]
        for word, array in zip(("picture", "depth", "confidence"), row, strict=True):
            file = folder / f"{word}-{n:03}.png"
            Image.fromarray(array).save(file)
            pictures.append(str(file))
    cameras = [
        {"picture": name, "focal": round(float(scene.focals[n]), 2), "centre": scene.poses[n][:3, 3].round(4).tolist()}
        for n, name in enumerate(scene.names)
    ]
    files.write_text(folder / "cameras.json", json.dumps(cameras, indent=1))
    return {"scene": str(folder / "scene.npz"), "glb": str(folder / "scene.glb"), "view": str(folder / "view.glb"),
            "flight": str(folder / "flight.gif"), "points": points, "pictures": pictures,
            "cameras": cameras}  # fmt: skip


def export(
    scene: str | Path, target: Path, kind: str = "glb", confidence: float = 1.0, percentile: float = 20.0,
    mesh: bool | None = None, cameras: bool = True, camera_size: float = 5.0, frame: int | None = None,
    hide: Any = "nothing", max_points: int = 500_000, clean: bool = False, originals: Sequence[str | None] = (),
) -> Written:  # fmt: skip
    """Export a kept scene (``scene.npz``) again, without running the network.

    Args:
        kind: one of :data:`EXPORTS`, or "view": the GLB for viewers in a browser.
        mesh: surfaces instead of points; None: if they suit the scene.
        originals: the pictures' files (``files`` of the job's result), to include with COLMAP and nerfstudio.

    Raises:
        InputError: no such scene, unknown kind, or no point left.
    """
    from pipelines.geometry import Scene, previews
    from pipelines.geometry.selection import Selection

    choice = Selection(confidence, percentile, frame, hide, max_points, clean)
    if kind == "view":
        return previews.write_view(Scene.load(Path(scene)), target, choice, mesh, cameras, camera_size)
    looks = {"mesh": mesh, "cameras": cameras, "camera_size": camera_size} if kind == "glb" else {}
    return Scene.load(Path(scene)).export(target, kind, choice, originals, **looks)
