"""Does self-calibration help on unseen views?  ``python -m benchmarks.lora3d``

First the gates: the base must be decent on the family it was trained on and clearly worse under the shift (wide
baselines). If not, the claim is void, the result says so, and nothing more is run (``--anyway`` runs it all the same).

Then, per unseen scene: ten calibration views over 180 degrees train an adapter; ten other views of the scene are judged
through the same plain aligner. Controls with the same budget: labels gated by raw confidence; another scene's labels;
LoRA on fresh pairs of the pre-training family; true labels (the upper bound).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import assets
from assets.build.dust3r import GATE_NEAR, GATE_SHIFT, pair_error
from assets.build.scenes3d import PRETRAINING, SHIFTS, Views, sample_views
from pipelines.geometry import alignment, calibration, checkpoints, inference, metrics
from pipelines.geometry.calibration import Labels, Recipe
from pipelines.geometry.images import Affine, Photo
from pipelines.geometry.pairs import Pair, make_pairs

RESULTS = Path(__file__).parent / "results"
NEAR_DEGREES = 40


def photos_of(views: Views) -> list[Photo]:
    """The pictures of one rendered scene."""
    return [Photo(image, Affine(), f"{n}.png") for n, image in enumerate(views.image[0])]


def take(views: Views, index: Sequence[int]) -> Views:
    """Some views of a scene."""
    return Views(*(getattr(views, name)[:, list(index)] for name in ("image", "depth", "pose", "focal", "azimuth")))


def true_labels(views: Views, pairs: Sequence[Pair]) -> Labels:
    """What an oracle would teach."""
    world, inverse = views.points()[0].flatten(1, 2), torch.linalg.inv(views.pose[0])
    points = [
        torch.stack([world[pair[side]] @ inverse[pair[0], :3, :3].T + inverse[pair[0], :3, 3] for pair in pairs])
        for side in (0, 1)
    ]
    everywhere = torch.ones(points[0].shape[:2], dtype=torch.bool)
    size = tuple(views.image.shape[-2:])
    return Labels((size,) * views.image.shape[1], tuple(pairs), *points, everywhere, everywhere, 0.0)  # type: ignore[arg-type]


def judge(network: Any, views: Views, steps: int) -> dict[str, float]:
    """Errors on a scene's held-out views: pairs (all, near ones) and the trajectory after plain alignment."""
    photos, pairs = photos_of(views), make_pairs(views.image.shape[1])
    told = inference.predict(network, photos, pairs)
    truth = true_labels(views, pairs)
    azimuth = views.azimuth[0]
    errors, near = [], []
    for edge, (i, j) in enumerate(pairs):
        error = metrics.pair_error((told.points1[edge], told.points2[edge]), (truth.points1[edge], truth.points2[edge]))
        errors.append(error)
        near += [error] if float((azimuth[i] - azimuth[j]).abs()) <= NEAR_DEGREES else []
    scene = alignment.align(told, steps)
    return {"pair_error": float(np.mean(errors)), "near_error": float(np.mean(near)) if near else float("nan"),
            "ate": metrics.trajectory_error(scene.poses, views.pose[0])}  # fmt: skip


def adapted(open_base: Callable[[], Any], photos: Sequence[Photo], labels: Labels, recipe: Recipe) -> Any:
    """A base with an adapter trained on labels."""
    model = calibration.with_lora(open_base(), recipe.rank, recipe.preset, recipe.seed)
    calibration.train_adapter(model, [photos], [labels], recipe)
    return model.eval()


def one_scene(open_base: Callable[[], Any], seed: int, views: int, recipe: Recipe, steps: int) -> dict[str, Any]:
    """All arms on one scene."""
    _, seen = sample_views(1, 2 * views, SHIFTS["overlap"], torch.Generator().manual_seed(seed))
    _, strange = sample_views(1, views, SHIFTS["overlap"], torch.Generator().manual_seed(seed + 50_000))
    _, usual = sample_views(1, views, PRETRAINING, torch.Generator().manual_seed(seed + 90_000))
    half, rest = take(seen, range(views)), take(seen, range(views, 2 * views))
    pairs = make_pairs(views)

    def robust(of: Views) -> tuple[Any, Labels]:
        told = inference.predict(open_base(), photos_of(of), pairs)
        scene = calibration.robust_alignment(told, steps=steps, warmup=min(100, steps // 3))
        return scene, calibration.pseudo_labels(scene, pairs)

    begun = time.perf_counter()
    _, own = robust(half)
    kept = float(torch.cat([own.valid1, own.valid2]).double().mean())
    told = inference.predict(open_base(), photos_of(half), pairs)
    plain = alignment.align(told, steps)
    # the same share of pixels as the calibrated gate keeps, chosen by what the network itself says
    weights = alignment.transformed(torch.stack([told.confidence1, told.confidence2]))
    level = float(weights.flatten().quantile(1 - max(kept, 0.05))) if weights.numel() < 16_000_000 else own.cutoff
    raw = calibration.pseudo_labels(replace(plain, weights=weights), pairs, cutoff=max(level, 1e-6))
    _, foreign = robust(strange)
    arms = {
        "self": (half, own), "raw confidence": (half, raw), "other scene": (strange, foreign),
        "pre-training pairs": (usual, true_labels(usual, pairs)), "true labels": (half, true_labels(half, pairs)),
    }  # fmt: skip
    result: dict[str, Any] = {"seed": seed, "kept": kept, "cutoff": own.cutoff, "base": judge(open_base(), rest, steps)}
    for name, (of, labels) in arms.items():
        result[name] = judge(adapted(open_base, photos_of(of), labels, recipe), rest, steps)
    result["seconds"] = time.perf_counter() - begun
    return result


def ratios(scenes: Sequence[dict[str, Any]], arm: str, measure: str) -> Tensor:
    """Per scene: an arm's error over the base's."""
    return torch.tensor([scene[arm][measure] / scene["base"][measure] for scene in scenes])


def report(result: dict[str, Any]) -> str:
    """The result in words."""
    gates = result["gates"]
    lines = [
        "# LoRA3D on the embedded base", "",
        f"Gates: near pairs {gates['near']:.3f} (at most {GATE_NEAR}), wide pairs {gates['wide']:.3f}, "
        f"{gates['ratio']:.2f} times as much (at least {GATE_SHIFT}).", "",
    ]  # fmt: skip
    if gates["void"]:
        lines += ["**The gates are missed: the claim that self-calibration helps is void for this base.** It is "
                  "trained too little to be a base worth calibrating; nothing is claimed from it.", ""]  # fmt: skip
    if result["scenes"]:
        lines += [f"{len(result['scenes'])} unseen scene(s), {result['views']} calibration and as many test views, "
                  f"{result['steps']} alignment steps, rank {result['recipe']['rank']}, {result['recipe']['epochs']} "
                  "epochs. Median of error over the base's (below 1 is better):", "",
                  "| labels | pair error | near pairs | ATE | scenes improved |", "|---|---|---|---|---|"]  # fmt: skip
        for arm in ("self", "raw confidence", "other scene", "pre-training pairs", "true labels"):
            cells = [
                f"{float(ratios(result['scenes'], arm, m).nanmedian()):.2f}"
                for m in ("pair_error", "near_error", "ate")
            ]
            better = int((ratios(result["scenes"], arm, "pair_error") < 1).sum())
            lines.append(f"| {arm} | {' | '.join(cells)} | {better} of {len(result['scenes'])} |")
    else:
        lines.append("The scenes were not run.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line and write ``results/lora3d.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(Path(assets.__file__).parent / "models/dust3r-tiny"))
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--anyway", action="store_true", help="run the scenes although a gate is missed")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    opened = checkpoints.open_checkpoint(given.base, given.device)
    near, wide = (pair_error(opened.network, family, 7_000_003) for family in (PRETRAINING, SHIFTS["overlap"]))
    gates = {"near": near, "wide": wide, "ratio": wide / near, "void": near > GATE_NEAR or wide / near < GATE_SHIFT}
    recipe = Recipe(rank=given.rank, epochs=given.epochs)
    scenes = []
    if given.anyway or not gates["void"]:
        for number in range(given.scenes):
            scenes.append(
                one_scene(lambda: checkpoints.open_checkpoint(given.base, given.device).network, 8_000_009 + number,
                          given.views, recipe, given.steps)
            )  # fmt: skip
            print(json.dumps(scenes[-1]), flush=True)
    result = {"base": opened.sha256, "gates": gates, "views": given.views, "steps": given.steps,
              "recipe": vars(recipe), "scenes": scenes}  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "lora3d.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "lora3d.md").write_text(report(result), encoding="utf-8")
    print(report(result))


if __name__ == "__main__":
    main()
