"""The reconstruction job: read pictures, ask the network, align, calibrate if asked, write the scene.

The result keeps ``scene.npz``, from which every export is made again without asking the network (:func:`export`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters import files
from adapters.errors import InputError
from adapters.progress import Monitor, Progress, check
from studio.reconstruction.schema import ReconstructConfig

VIDEOS = (".mp4", ".mov", ".webm", ".avi", ".mkv", ".m4v")
EXPORTS = ("glb", "ply", "colmap", "nerfstudio", "npz")


def licence(model: str) -> str:
    """The licence of weights, to be shown before they are used."""
    from pipelines.geometry.licence import licence_of

    return licence_of(resolve(model))


def resolve(model: str) -> str:
    """The place of weights: shipped ones by their name, everything else as it is."""
    import assets

    if model == "dust3r-tiny":
        try:
            return str(assets.path("models/dust3r-tiny"))
        except FileNotFoundError:
            raise InputError("The embedded model is not in this installation: give weights of your own.") from None
    return model


def pictures_in(folder: str | Path) -> list[str]:
    """The pictures of a scene's folder in the order of their names, or its one video.

    Raises:
        InputError: no folder, or neither pictures nor a video in it.
    """
    from pipelines.pictures import SUFFIXES, UNREADABLE

    place = Path(folder)
    if not place.is_dir():
        raise InputError(f"There is no folder '{folder}'.")
    found = sorted(file for file in place.iterdir() if file.is_file() and not file.name.startswith("."))
    for endings in (SUFFIXES | UNREADABLE, VIDEOS):  # those that cannot be read are named when they are opened
        chosen = [str(file.resolve()) for file in found if file.suffix.lower() in endings]
        if chosen:
            return chosen
    raise InputError(
        f"There are neither pictures nor a video in '{folder}' (looked for {', '.join([*sorted(SUFFIXES), *VIDEOS])})."
    )


def run(config: ReconstructConfig, folder: Path, monitor: Monitor) -> dict[str, Any]:
    """Reconstruct ``config`` into ``folder``.

    Raises:
        adapters.errors.InputError: pictures, weights or settings cannot be used.
        adapters.errors.Cancelled: ``monitor`` said so.
    """
    from pipelines.geometry import calibration, checkpoints, estimate, inference, pairs
    from studio import devices

    begun = time.monotonic()
    monitor.report(Progress("loading", message=f"weights {config.model}, licence {licence(config.model)}"))
    _check(config)
    import torch

    device = torch.device(devices.resolve(config.device))
    opened = checkpoints.open_checkpoint(resolve(config.model), device)
    network: Any = opened.network
    known: dict[str, Any] = {}
    if config.adapter:
        network, known = calibration.load_adapter(network, Path(config.adapter), opened.sha256)
    photos = _photos(config.images, config, opened.network.config, monitor)
    also = [_photos(pictures_in(folder), config, opened.network.config, monitor) for folder in config.also]
    warnings = [*_warnings(photos), *_changed(known, photos)]
    graph, *graphs = (pairs.make_pairs(len(scene), config.graph, many=config.many) for scene in (photos, *also))
    height, width = photos[0].size
    cost = estimate.estimate(
        opened.network.config, sum(map(len, (photos, *also))), sum(map(len, (graph, *graphs))), height, width, device,
        config.chunk, config.epochs if config.calibrate else 0,
        config.steps * (3 if config.calibrate else 1) if len(photos) > 2 else 0,  # plain, robust, with the adapter
    )  # fmt: skip
    monitor.report(Progress("loading", message=f"expected: {cost}"))
    check(monitor)
    told = inference.predict(network, photos, graph, config.chunk, config.dtype, monitor)
    scene, said = _aligned(told, photos, config, monitor)
    result: dict[str, Any] = {"estimate": str(cost), "licence": opened.licence, "warnings": warnings}
    if config.calibrate:
        _write_glb(scene, photos, folder / "before.glb", config)
        result |= {"before": str(folder / "before.glb")}
        scenes, answers = [photos, *also], [told]
        for others, between in zip(also, graphs, strict=True):
            answers.append(inference.predict(network, others, between, config.chunk, config.dtype, monitor))
        kept = _calibrated(config, opened, network, scenes, answers, folder, monitor)
        warnings += kept.pop("warnings")
        network = kept.pop("network")
        result |= kept
        told = inference.predict(network, photos, graph, config.chunk, config.dtype, monitor)
        scene, said = _aligned(told, photos, config, monitor)
    warnings += said
    if len(photos) > 2 and calibration.still(scene):
        warnings.append("The cameras hardly move: depth and poses mean little.")
    monitor.report(Progress("saving"))
    made = _save(scene, photos, folder, config)
    return {**result, **made, "images": len(photos), "pairs": len(graph), "encodings": told.encodings,
            "loss": scene.losses[-1] if scene.losses else None,
            "seconds": round(time.monotonic() - begun, 2)}  # fmt: skip


def _check(config: ReconstructConfig) -> None:
    if not config.images:
        raise InputError("There are no pictures: give three or more of one scene, from different places.")
    said = licence(config.model)
    if "not for commercial" in said and not config.accept_licence:
        raise InputError(
            f"The weights '{config.model}' come under {said}. If that suits you, say so: --accept-licence."
        )
    if config.calibrate and config.adapter:
        raise InputError("Calibrate anew or use an adapter of earlier, not both.")
    if config.also and not config.calibrate:
        raise InputError("Further scenes serve the adapter's training: they go with --calibrate.")


def _photos(paths: Sequence[str], config: ReconstructConfig, network: Any, monitor: Monitor) -> list[Any]:
    from pipelines.geometry import images

    size, patch = config.size or max(network.img_size), network.patch_size
    square = network.img_size[0] == network.img_size[1]
    given = [Path(path) for path in paths]
    videos = [path for path in given if path.suffix.lower() in VIDEOS]
    if videos and len(given) > 1:
        raise InputError("Give either pictures or one video.")
    if videos:
        frames = images.read_video(videos[0], config.seconds_per_frame)
        photos = []
        for n, frame in enumerate(frames):
            digest = hashlib.sha256(frame.tobytes()).hexdigest()
            photos.append(images.prepare(frame, f"frame-{n:04}.png", digest, size, patch, square))
    else:
        photos = []
        for path in given:
            check(monitor)
            photos.append(images.read_photo(path, size, patch, square))
    different = len({photo.sha256 for photo in photos})
    if config.calibrate and different < 3:
        raise InputError(f"Calibrating needs three pictures or more of a scene that differ, got {different}.")
    return photos


def _warnings(photos: Sequence[Any]) -> list[str]:
    seen = [photo.sha256 for photo in photos]
    return ["Some pictures are the same file."] if len(set(seen)) < len(seen) else []


def _changed(adapter: dict[str, Any], photos: Sequence[Any]) -> list[str]:
    """What is to be said when pictures are not those of the same name that the adapter learnt from."""
    scenes = (adapter, *adapter.get("also", ()))
    known = {image["name"]: image["sha256"] for scene in scenes for image in scene.get("images", ())}
    other = [photo.name for photo in photos if known.get(photo.name, photo.sha256) != photo.sha256]
    if not other:
        return []
    return [
        f"{len(other)} picture(s) differ from those of the same name that the adapter was calibrated on "
        f"({', '.join(other[:3])}): it helps if they show the same scene."
    ]


def _aligned(
    told: Any, photos: Sequence[Any], config: ReconstructConfig, monitor: Monitor
) -> tuple[Any, list[str]]:
    """The scene of what the network says, and what a person should know about it."""
    import torch

    from pipelines.geometry import alignment, cameras, initialise, verification
    from studio import devices

    if len(told.sizes) == 1:
        focals = initialise.own_focals(told)
        ones = cameras.Similarity(torch.ones(1), torch.eye(3)[None], torch.zeros(1, 3))
        flat = torch.zeros(2, 1, told.points1.shape[1])
        return alignment.Alignment(told.sizes, torch.eye(4)[None], focals, told.points1[..., 2].clamp_min(1e-4),
                                   initialise.strongest(told), flat, flat, ones), []  # fmt: skip
    if len(told.sizes) == 2:
        return alignment.view_pair(told), []
    said: list[str] = []
    if config.verify:
        seen = verification.verified(told, photos)
        told, said = seen.predictions, seen.said
    found = alignment.align(
        told.to(devices.resolve(config.device)), config.steps, schedule=config.schedule, monitor=monitor
    )
    return found, said


def _calibrated(
    config: ReconstructConfig,
    opened: Any,
    network: Any,
    scenes: Sequence[Sequence[Any]],
    told: Sequence[Any],
    folder: Path,
    monitor: Monitor,
) -> dict[str, Any]:
    """Train one adapter on all ``scenes`` and keep it; the first scene is the one that is reconstructed."""
    from pipelines.geometry import calibration
    from studio import devices

    recipe = calibration.Recipe(
        config.rank, config.preset, config.epochs, lr=config.lr, seed=config.seed, dtype=config.dtype
    )
    answers = [one.to(devices.resolve(config.device)) for one in told]
    model, robust, labels, losses = calibration.calibrate(
        network, scenes, answers, recipe, config.mu, min(100, config.steps // 3), config.cutoff, config.steps,
        verify=config.verify, share=config.share, monitor=monitor,
    )  # fmt: skip
    facts = [
        {"images": [photo.facts() for photo in photos], "cutoff": kept.cutoff, "kept": kept.kept,
         "warnings": kept.warnings, "poses": found.poses.tolist(), "focals": found.focals.tolist()}
        for photos, found, kept in zip(scenes, robust, labels, strict=True)
    ]  # fmt: skip
    about = {
        "base": {"name": opened.name, "sha256": opened.sha256, "licence": opened.licence},
        "settings": config.model_dump(mode="json"), "transform": "log", "losses": losses, **facts[0], "also": facts[1:],
    }  # fmt: skip
    place = calibration.save_adapter(model, folder / "adapter", about)
    warnings = [text for kept in labels for text in kept.warnings]
    return {"network": model, "adapter": str(place), "warnings": warnings, "labels": labels[0].kept,
            "training_loss": [losses[0], losses[-1]]}  # fmt: skip


def _selection(config: ReconstructConfig) -> Any:
    from pipelines.geometry.reconstruction import Selection

    return Selection(config.confidence, config.percentile, limit=config.max_points)


def _write_glb(scene: Any, photos: Sequence[Any], file: Path, config: ReconstructConfig) -> None:
    from pipelines.geometry.reconstruction import Reconstruction, write_glb

    write_glb(Reconstruction.of(scene, photos), file, _selection(config), config.mesh, config.cameras)


def _save(scene: Any, photos: Sequence[Any], folder: Path, config: ReconstructConfig) -> dict[str, Any]:
    from PIL import Image

    from pipelines.geometry import reconstruction

    kept = reconstruction.Reconstruction.of(scene, photos)
    kept.save(folder / "scene.npz")
    points = reconstruction.write_glb(kept, folder / "scene.glb", _selection(config), config.mesh, config.cameras)
    pictures = []
    for n in range(len(photos)):
        row = [
            kept.images[n],
            reconstruction.depth_picture(kept.depth[n]),
            reconstruction.depth_picture(kept.confidence[n]),
        ]
        for word, array in zip(("picture", "depth", "confidence"), row, strict=True):
            file = folder / f"{word}-{n:03}.png"
            Image.fromarray(array).save(file)
            pictures.append(str(file))
    cameras = [
        {"picture": name, "focal": round(float(kept.focals[n]), 2), "centre": kept.poses[n][:3, 3].round(4).tolist()}
        for n, name in enumerate(kept.names)
    ]
    files.write_text(folder / "cameras.json", json.dumps(cameras, indent=1))
    return {"scene": str(folder / "scene.npz"), "glb": str(folder / "scene.glb"), "points": points,
            "pictures": pictures, "cameras": cameras}  # fmt: skip


def export(
    scene: str | Path, target: Path, kind: str = "glb", confidence: float = 1.0, percentile: float = 20.0,
    mesh: bool = False, cameras: bool = True, camera_size: float = 5.0, frame: int | None = None, hide: Any = "nothing",
    max_points: int = 500_000, clean: bool = False,
) -> tuple[Path, int]:  # fmt: skip
    """Write a kept scene (``scene.npz``) in another way; the network is not asked. Returns the place and the points.

    Raises:
        InputError: no such scene, unknown kind, or no point left.
    """
    from pipelines.geometry import reconstruction

    if kind not in EXPORTS:
        raise InputError(f"Unknown export '{kind}': known are {', '.join(EXPORTS)}.")
    kept = reconstruction.Reconstruction.load(Path(scene))
    choice = reconstruction.Selection(confidence, percentile, frame, hide, max_points, clean)
    if kind == "glb":
        return target, reconstruction.write_glb(kept, target, choice, mesh, cameras, camera_size)
    if kind == "ply":
        return target, reconstruction.write_ply(kept, target, choice)
    if kind == "npz":
        return kept.save(target), sum(mask.size for mask in kept.confidence)
    write = reconstruction.write_colmap if kind == "colmap" else reconstruction.write_nerfstudio
    return write(kept, target, choice), len(reconstruction.cloud(kept, choice)[0])
