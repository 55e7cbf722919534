"""Does self-calibration help on unseen views?  ``python -m benchmarks.lora3d --write``

First the gates: the base must be decent on the family it was trained on and clearly worse under the shift (wide
baselines). If not, the claim is void, the result says so, and the scenes are not run (``--anyway`` runs them).

Then, per unseen scene: ten calibration views over 180 degrees train an adapter; ten other views of the scene are judged
through the same plain aligner, and through the one that leaves out pairs whose pictures contradict each other, as
``studio reconstruct`` does. "self" are the studio's labels; "paper" are LoRA3D's own (all pairs aligned, each labelled
where it confirms itself). Controls with the same budget: labels gated by raw confidence; another scene's labels; LoRA
on fresh pairs of the pre-training family; true labels (the upper bound).

Besides: the alignment alone on spoilt pointmaps (no network), and how often the encoder is called.

Every finished piece is kept under the build folder, by base, settings and the code that makes it: the same command goes
on where it was stopped, a change of the code begins anew, and ``--minutes`` stops it in time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

import assets
from adapters import files
from assets.build.common import build_dir, write_json
from assets.build.dust3r import GATE_NEAR, GATE_SHIFT, pair_error
from assets.build.scenes3d import PRETRAINING, SHIFTS, Views, sample_views
from benchmarks.lora3d_report import ARMS, report
from pipelines.geometry import alignment, calibration, checkpoints, inference, metrics, verification
from pipelines.geometry.calibration import Labels, Recipe
from pipelines.geometry.images import Affine, Photo
from pipelines.geometry.inference import Predictions
from pipelines.geometry.pairs import Pair, make_pairs
from pipelines.geometry.verification import verified
from tests.geometry.rooms import Room, room, spoil_narrow

RESULTS = Path(__file__).parent / "results"
NEAR_DEGREES = 40
FIRST_SCENE = 8_100_009
FIRST_ROOM = 1100
"""Neither the scenes nor the rooms from here on were looked at while the method was made (those were 8,000,009 and 100
onwards)."""
REPEATS = 5
"""Every room of the alignment alone is aligned so many times, all but the first from pointmaps that are changed in
their seventh digit: what rounding on another machine does."""
SPREAD = 150
"""Degrees of azimuth of the rooms in the test of the alignment alone."""
RIGHT = 0.5
"""A pair is right when its points err by less than this, in metres (the rooms are 6 to 8 m wide)."""
UNUSED = ("__init__", "estimate", "licence", "pipeline", "previews", "scene", "selection", "video")
"""Modules of the geometry that make none of the numbers."""


@dataclass(frozen=True)
class Plan:
    """What every scene is given.

    Attributes:
        views: pictures for calibration, and as many for the judgement.
        steps: of every alignment.
        stride: for the judgement only every so many pixels per axis are aligned.
    """

    views: int = 10
    steps: int = 300
    stride: int = 2
    rank: int = 8
    epochs: int = 10
    batch: int = 6
    dtype: str = "fp32"

    def recipe(self) -> Recipe:
        return Recipe(rank=self.rank, epochs=self.epochs, batch=self.batch, dtype=self.dtype)


def code_version() -> str:
    """Hash of the code that makes the pieces, and of the libraries that calculate."""
    root = Path(__file__).parents[1]
    places = ("assets/build/dust3r.py", "assets/build/scenes3d.py", "tests/geometry/rooms.py")
    sources = [root / place for place in places]
    sources += [file for file in (root / "pipelines/geometry").glob("*.py") if file.stem not in UNUSED]
    digest = hashlib.sha256()
    for file in [Path(__file__), *sorted(sources)]:
        digest.update(file.name.encode() + file.read_bytes())
    digest.update(json.dumps([metadata.version(name) for name in ("torch", "numpy", "scipy", "peft")]).encode())
    digest.update(cv2.__version__.encode())
    return digest.hexdigest()[:12]


class Kept:
    """Finished pieces, one JSON file each."""

    def __init__(self, folder: Path, end: float = float("inf")) -> None:
        self.folder, self.end = folder, end
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> Any:
        """A piece, or None."""
        file = self.folder / f"{name.replace(' ', '-')}.json"
        return json.loads(file.read_text("utf-8")) if file.is_file() else None

    def make(self, name: str, work: Callable[[], dict[str, Any]]) -> Any:
        """A piece, made now if there is time and it is not there; None when time is up."""
        found = self.get(name)
        if found is None and time.monotonic() < self.end:
            wall, cpu = time.monotonic(), time.process_time()
            found = work()
            found |= {"seconds": round(time.monotonic() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
            files.write_text(self.folder / f"{name.replace(' ', '-')}.json", json.dumps(found))
            print(name, json.dumps(found), flush=True)
        return found


# ------------------------------------------------------------------------------------------------ one scene


def photos_of(views: Views) -> list[Photo]:
    """The pictures of one rendered scene."""
    return [Photo(image, Affine(), f"{n}.png") for n, image in enumerate(views.image[0])]


def take(views: Views, index: Sequence[int]) -> Views:
    """Some views of a scene."""
    return Views(*(getattr(views, name)[:, list(index)] for name in ("image", "depth", "pose", "focal", "azimuth")))


def scene(number: int, views: int) -> tuple[Views, Views]:
    """Calibration views and test views of an unseen scene."""
    _, seen = sample_views(1, 2 * views, SHIFTS["overlap"], torch.Generator().manual_seed(FIRST_SCENE + number))
    return take(seen, range(views)), take(seen, range(views, 2 * views))


def true_labels(views: Views, pairs: Sequence[Pair]) -> Labels:
    """What an oracle would teach."""
    height, width = views.image.shape[-2:]
    world = views.points()[0].flatten(1, 2)
    everywhere = torch.ones(2, len(pairs), world.shape[1], dtype=torch.bool)
    sizes = ((height, width),) * views.image.shape[1]
    return Labels(sizes, tuple(pairs), world, views.pose[0], views.focal[0], everywhere, 0.0)


def thinned(told: Predictions, stride: int) -> Predictions:
    """Every ``stride``-th row and column of all pointmaps (one picture size); the focal shrinks alike."""
    height, width = told.sizes[0]
    keep = torch.arange(height * width).reshape(height, width)[::stride, ::stride]
    names = ("points1", "points2", "confidence1", "confidence2")
    fewer = {name: getattr(told, name)[:, keep.flatten()] for name in names}
    return replace(told, sizes=((keep.shape[0], keep.shape[1]),) * len(told.sizes), **fewer)


def judge(network: Any, views: Views, plan: Plan) -> dict[str, float]:
    """Errors on a scene's held-out views: pairs (all, near ones), the trajectory after plain and verified alignment."""
    photos, pairs = photos_of(views), make_pairs(views.image.shape[1])
    told = inference.predict(network, photos, pairs)
    truth = true_labels(views, pairs)
    azimuth = views.azimuth[0]
    errors, near = [], []
    for edge, (i, j) in enumerate(pairs):
        true = (truth.points(edge, 0), truth.points(edge, 1))
        error = metrics.pair_error((told.points1[edge], told.points2[edge]), true)
        errors.append(error)
        near += [error] if float((azimuth[i] - azimuth[j]).abs()) <= NEAR_DEGREES else []
    trajectories = [
        metrics.trajectory_error(alignment.align(thinned(kept, plan.stride), plan.steps).poses, views.pose[0])
        for kept in (told, verified(told, photos).predictions)
    ]
    return {"pair_error": float(np.mean(errors)), "near_error": float(np.mean(near)) if near else float("nan"),
            "ate": trajectories[0], "ate_verified": trajectories[1]}  # fmt: skip


def self_labels(network: Any, views: Views, plan: Plan, file: Path, ours: bool = True) -> Labels:
    """A scene's own labels, the studio's or the paper's; kept in ``file``, because they also serve another scene."""
    if file.is_file():
        return Labels.load(file)
    pairs = tuple(make_pairs(plan.views))
    photos = photos_of(views)
    told = inference.predict(network, photos, pairs)
    warmup = min(100, plan.steps // 3)
    if ours:
        seen = verified(told, photos)
        robust = calibration.robust_alignment(seen.predictions, steps=plan.steps, warmup=warmup)
        labels = calibration.scene_labels(robust, seen, pairs)
    else:
        robust = calibration.robust_alignment(told, steps=plan.steps, warmup=warmup)
        labels = calibration.pseudo_labels(robust, pairs)
    labels.save(file)
    return labels


def kept_share(labels: Labels, edges: int) -> float:
    """Share of all pixels of all edges that are labelled."""
    return float(labels.valid.sum()) / (2 * edges * labels.valid.shape[-1])


def raw_labels(network: Any, views: Views, plan: Plan, share: float) -> Labels:
    """Labels of the plain alignment: the same share of pixels, chosen by what the network itself says."""
    pairs = make_pairs(plan.views)
    told = inference.predict(network, photos_of(views), pairs)
    plain = alignment.align(told, plan.steps)
    weights = alignment.transformed(torch.stack([told.confidence1, told.confidence2]))
    level = float(np.quantile(weights.numpy(), 1 - share))
    return calibration.pseudo_labels(replace(plain, weights=weights), pairs, cutoff=max(level, 1e-6))


def lesson(open_base: Callable[[], Any], arm: str, number: int, plan: Plan, folder: Path) -> tuple[Views, Labels]:
    """The views and labels that an arm learns from."""
    half, _ = scene(number, plan.views)
    pairs = make_pairs(plan.views)

    def own(which: int, ours: bool = True) -> tuple[Views, Labels]:
        views, _ = scene(which, plan.views)
        file = folder / f"labels-{which}{'' if ours else '-paper'}.safetensors"
        return views, self_labels(open_base(), views, plan, file, ours)

    if arm == "self":
        return own(number)
    if arm == "paper":
        return own(number, ours=False)
    if arm == "other scene":
        return own(number + 1)
    if arm == "raw confidence":
        return half, raw_labels(open_base(), half, plan, kept_share(own(number)[1], len(pairs)))
    if arm == "true labels":
        return half, true_labels(half, pairs)
    seed = FIRST_SCENE + 90_000 + number
    _, usual = sample_views(1, plan.views, PRETRAINING, torch.Generator().manual_seed(seed))
    return usual, true_labels(usual, pairs)


def run_arm(open_base: Callable[[], Any], arm: str, number: int, plan: Plan, folder: Path) -> dict[str, Any]:
    """Train one arm on one scene and judge it on the held-out views."""
    rest = scene(number, plan.views)[1]
    if arm == "base":
        return judge(open_base(), rest, plan)
    views, labels = lesson(open_base, arm, number, plan, folder)
    recipe = plan.recipe()
    model, losses = calibration.train_adapter(open_base(), [photos_of(views)], [labels], recipe)
    edges = plan.views * (plan.views - 1)
    about = {"kept": kept_share(labels, edges), "edges": len(labels.pairs), "cutoff": labels.cutoff,
             "loss": [float(np.mean(losses[:10])), float(np.mean(losses[-10:]))]}  # fmt: skip
    return {**judge(model.eval(), rest, plan), **about}


# ------------------------------------------------------------------------------------------------ without a network


def alignment_errors(made: Room, found: alignment.Alignment) -> tuple[float, float]:
    """ATE, and mean distance of all points, after the Sim(3) of the cameras."""
    move = metrics.onto_truth(found.poses, made.poses)
    apart = [move(found.points(n).double().flatten(0, 1)[None])[0] - made.world()[n] for n in range(len(made.poses))]
    return metrics.trajectory_error(found.poses, made.poses), float(torch.stack(apart).norm(dim=-1).mean())


def rounded(made: Room, repeat: int) -> Room:
    """The room with its pointmaps changed by a millionth, differently for every ``repeat``; unchanged for 0."""
    if repeat == 0:
        return made
    generator = torch.Generator().manual_seed(repeat)
    told = made.predictions
    changed = {
        name: getattr(told, name) * (1 + 1e-6 * torch.randn(getattr(told, name).shape, generator=generator))
        for name in ("points1", "points2")
    }
    return replace(made, predictions=replace(told, **changed))


def core(seed: int, steps: int, repeats: int = REPEATS) -> dict[str, Any]:
    """Medians of :func:`core_once` over several repeats, and under ``low`` and ``high`` the least and the most."""
    rows = [core_once(seed, steps, repeat) for repeat in range(repeats)]

    def of(choose: Callable[[list[float]], Any]) -> dict[str, float]:
        return {name: float(choose([row[name] for row in rows])) for name in rows[0]}

    return {**of(np.median), "low": of(min), "high": of(max)}


def core_once(seed: int, steps: int, repeat: int = 0) -> dict[str, Any]:
    """Plain against robust alignment where every pair of low overlap is wrong and nevertheless sure."""
    made = rounded(spoil_narrow(room(FIRST_ROOM + seed, spread=SPREAD), seed), repeat)
    plain = alignment.align(made.predictions, steps)
    robust = calibration.robust_alignment(made.predictions, steps=steps)
    kept = verified(made.predictions, photos_of(made.views)).predictions
    (ate, points), (ate_robust, points_robust), (ate_kept, points_kept) = (
        alignment_errors(made, found)
        for found in (plain, robust, calibration.robust_alignment(kept, steps=steps))
    )  # fmt: skip
    raw = torch.stack([made.predictions.confidence1, made.predictions.confidence2])
    return {"bad_edges": float((~made.good[1]).double().mean(1).gt(0.5).double().mean()), "ate": ate, "points": points,
            "ate_ratio": ate_robust / ate, "point_ratio": points_robust / points,
            "verified_ratio": ate_kept / ate, "verified_point_ratio": points_kept / points,
            "auc_w": metrics.ranking(robust.weights, made.good), "auc_c": metrics.ranking(raw, made.good)}  # fmt: skip


def exact(steps: int) -> dict[str, Any]:
    """ATE over the scene's size where nothing is wrong."""
    made = room(200, spread=SPREAD)
    size = float((made.world().flatten(0, 1) - made.world().flatten(0, 1).mean(0)).norm(dim=-1).median())
    plain = alignment.align(made.predictions, steps)
    robust = calibration.robust_alignment(made.predictions, steps=steps)
    return {"plain": alignment_errors(made, plain)[0] / size, "robust": alignment_errors(made, robust)[0] / size}


def telling(open_base: Callable[[], Any], scenes: int, views: int) -> dict[str, Any]:
    """How well confidence, and the pictures' agreement, tell pairs that are right from pairs that are not (AUC)."""
    network, found = open_base(), []
    for number in range(scenes):
        half, _ = scene(number, views)
        photos, pairs = photos_of(half), make_pairs(views)
        told, truth = inference.predict(network, photos, pairs), true_labels(half, pairs)
        errors = [
            metrics.pair_error((told.points1[e], told.points2[e]), (truth.points(e, 0), truth.points(e, 1)))
            for e in range(len(pairs))
        ]
        score = told.confidence1.mean(1) * told.confidence2.mean(1)
        found.append((torch.tensor(errors), score, verification.agreement(told, photos)))
    errors, score, agrees = (torch.cat(column) for column in zip(*found, strict=True))
    right = errors < RIGHT
    return {"pairs": len(right), "right": int(right.sum()), "confidence": metrics.ranking(score, right),
            "agreement": metrics.ranking(agrees, right),
            "believed_right": float((agrees >= verification.LEAST)[right].double().mean()),
            "believed_wrong": float((agrees >= verification.LEAST)[~right].double().mean())}  # fmt: skip


def encodings(open_base: Callable[[], Any], views: int) -> dict[str, Any]:
    """Encoder calls and CPU seconds for a complete graph, cached and pair by pair."""
    half, _ = scene(0, views)
    photos, pairs = photos_of(half), make_pairs(views)
    network, calls = open_base(), [0]
    encode = network.encode

    def counted(image: Tensor) -> Any:
        calls[0] += len(image)
        return encode(image)

    network.encode = counted
    begun = time.process_time()
    inference.predict(network, photos, pairs)
    cached, used = time.process_time() - begun, calls[0]
    begun = time.process_time()
    with torch.no_grad():
        for k in range(0, len(pairs), 8):
            sides = [torch.stack([photos[pair[side]].pixels for pair in pairs[k : k + 8]]) for side in (0, 1)]
            network(sides[0] * 2 - 1, sides[1] * 2 - 1)
    return {"pictures": views, "pairs": len(pairs), "calls": used, "cached_cpu": round(cached, 2),
            "direct_calls": calls[0] - used, "direct_cpu": round(time.process_time() - begun, 2)}  # fmt: skip


def main() -> None:
    """Run what is missing and print the report; ``--write`` also writes ``results/lora3d.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(Path(assets.__file__).parent / "models/dust3r-tiny"))
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--begin", type=int, default=0, help="leave scenes before this one to another process")
    parser.add_argument("--rooms", type=int, default=8, help="rooms of the test of the alignment alone")
    for name, default in asdict(Plan()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after this time")
    parser.add_argument("--anyway", action="store_true", help="run the scenes although a gate is missed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/lora3d.json and .md")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    plan = Plan(**{name: getattr(given, name) for name in asdict(Plan())})

    def open_base() -> Any:
        return checkpoints.open_checkpoint(given.base, given.device).network

    opened, code = checkpoints.open_checkpoint(given.base, given.device), code_version()
    key = hashlib.sha256(json.dumps([opened.sha256, asdict(plan), code]).encode()).hexdigest()[:12]
    kept = Kept(build_dir() / "lora3d" / key, time.monotonic() + 60 * given.minutes)
    near, wide = (pair_error(opened.network, family, 7_000_003) for family in (PRETRAINING, SHIFTS["overlap"]))
    gates = {"near": near, "wide": wide, "ratio": wide / near, "void": near > GATE_NEAR or wide / near < GATE_SHIFT}
    counted = kept.make("encodings", lambda: encodings(open_base, plan.views))
    told = kept.make("telling", lambda: telling(open_base, given.scenes, plan.views))
    rooms = [kept.make(f"core-{seed}", partial(core, seed, plan.steps)) for seed in range(given.rooms)]
    plain = kept.make("exact", lambda: exact(plan.steps))
    scenes: list[dict[str, Any]] = []
    if given.anyway or not gates["void"]:
        for number in range(given.begin, given.scenes):
            pieces = {arm: kept.make(f"scene-{number}-{arm}",
                                     partial(run_arm, open_base, arm, number, plan, kept.folder))
                      for arm in ("base", *ARMS)}  # fmt: skip
            scenes.append({"seed": FIRST_SCENE + number, **pieces})
    result = {"date": time.strftime("%Y-%m-%d"), "base": opened.sha256, "code": code, "gates": gates,
              "plan": asdict(plan), "scenes": scenes, "core": [row for row in rooms if row],
              "encodings": counted, "telling": told,
              "exact": plain, "spread": SPREAD, "right": RIGHT, "repeats": REPEATS}  # fmt: skip
    text = report(result)
    if given.write:
        write_json(RESULTS / "lora3d.json", result)
        files.write_text(RESULTS / "lora3d.md", text)
    print(text)


if __name__ == "__main__":
    main()
