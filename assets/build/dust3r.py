"""Pre-train the embedded pointmap model: ``python -m assets.build.dust3r train --until 21:25 --decay-for 15``.

Scenes are rendered on the fly (``assets.build.scenes3d``); each step's scenes are drawn from (seed, step) alone. Every
scene is seen from several near views (azimuths within 40 degrees); each is encoded once and all ordered pairs are
decoded. A checkpoint (weights, averages, optimizer, step, curve) is written every few minutes and on SIGTERM or Ctrl-C;
the same command goes on from it, on this or another machine, CPU or GPU. The learning rate warms up after every start
and falls to zero over the last ``--decay-for`` minutes.

    python -m assets.build.dust3r export     write assets/models/dust3r-tiny (fp16) with its card
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from assets.build.common import Average, autocast, build_dir, gradient_norm, pick_device, write_json
from assets.build.scenes3d import PRETRAINING, SHIFTS, Family, Views, sample_views
from pipelines.geometry.network import TINY, Encoded, PointmapNetwork, Points
from pipelines.geometry.objective import confidence_loss, regression

GATE_NEAR, GATE_SHIFT = 0.08, 1.5
"""The base is good enough when near pairs err at most this much (of the mean distance), wide pairs this much more."""


def initialise(network: PointmapNetwork, generator: torch.Generator) -> PointmapNetwork:
    """Xavier matrices, zero biases; the heads start small, so that the first points are moderate."""
    for name, parameter in network.named_parameters():
        if name == "mask_token" or "norm" in name:
            continue
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.zero_()
            else:
                fan_out, fan_in = parameter.shape[0], parameter[0].numel()
                bound = (6 / (fan_in + (fan_out / 3 if "qkv" in name else fan_out))) ** 0.5
                bound *= 0.3 if "downstream_head" in name else 1.0
                parameter.uniform_(-bound, bound, generator=generator)
    return network


def ordered_pairs(views: int) -> tuple[list[int], list[int]]:
    """All ordered pairs of ``views`` pictures."""
    pairs = [(i, j) for i in range(views) for j in range(views) if i != j]
    return [i for i, _ in pairs], [j for _, j in pairs]


def pair_targets(views: Views, first: Sequence[int], second: Sequence[int]) -> tuple[Tensor, Tensor]:
    """True points ``(S * P, H, W, 3)`` of both views of each ordered pair, in the frame of the first."""
    world, inverse = views.points(), torch.linalg.inv(views.pose)
    out = []
    for chosen in (first, second):
        own = inverse[:, first]
        points = world[:, chosen] @ own[..., None, :3, :3].mT + own[..., None, None, :3, 3]
        out.append(points.flatten(0, 1))
    return out[0], out[1]


def predict_pairs(
    network: nn.Module, views: Views, first: Sequence[int], second: Sequence[int]
) -> tuple[Points, Points]:
    """What the network says about ordered pairs of each scene's views; every view is encoded once."""
    count, number = views.image.shape[:2]
    encoded = network.encode(views.image.flatten(0, 1) * 2 - 1)  # type: ignore[operator]
    tokens = encoded.tokens.unflatten(0, (count, number))
    sides = [Encoded(tokens[:, index].flatten(0, 1), encoded.grid) for index in (list(first), list(second))]
    return network.decode(*sides)  # type: ignore[operator]


@torch.no_grad()
def pair_error(network: PointmapNetwork, family: Family, seed: int, scenes: int = 16, views: int = 4) -> float:
    """Mean distance between predicted and true points of both views, each in units of its own mean distance."""
    device = next(network.parameters()).device
    _, seen = sample_views(scenes, views, family, torch.Generator().manual_seed(seed), device)
    first, second = ordered_pairs(views)
    predicted = predict_pairs(network, seen, first, second)
    target = pair_targets(seen, first, second)
    valid = (torch.ones_like(target[0][..., 0], dtype=torch.bool),) * 2
    near, far = regression((predicted[0].points, predicted[1].points), target, valid)
    return float((near.mean() + far.mean()) / 2)


# ------------------------------------------------------------------------------------------------ training


class Run:
    """The state of a training and its checkpoint."""

    def __init__(self, folder: Path, seed: int, lr: float, device: torch.device) -> None:
        self.file, self.seed = folder / "checkpoint.pt", seed
        self.network = initialise(PointmapNetwork(TINY), torch.Generator().manual_seed(seed)).to(device)
        self.network.mask_token.requires_grad_(False)
        self.average = Average(self.network)
        matrices = [p for n, p in self.network.named_parameters() if p.ndim == 2 and "downstream" not in n]
        rest = [p for p in self.network.parameters() if p.requires_grad and all(p is not q for q in matrices)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.step, self.pairs, self.images, self.seconds = 0, 0, 0, 0.0
        self.curve: list[dict[str, float]] = []

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        torch.save(
            {
                "network": self.network.state_dict(),
                "average": self.average.state(),
                "optimizers": [o.state_dict() for o in self.optimizers],
                "counts": [self.step, self.pairs, self.images, self.seconds],
                "curve": self.curve,
                "seed": self.seed,
            },
            part,
        )
        part.replace(self.file)

    def resume(self) -> bool:
        """Continue from the checkpoint, if there is one."""
        if not self.file.is_file():
            return False
        state = torch.load(self.file, map_location=next(self.network.parameters()).device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.average.load(state["average"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.pairs, self.images, self.seconds = state["counts"]
        self.curve, self.seed = state["curve"], state["seed"]
        return True

    def start_from(self, folder: Path) -> None:
        """Take the weights and the history of an exported model folder; the optimizers start anew."""
        from pipelines.geometry.checkpoints import open_checkpoint

        self.network.load_state_dict(open_checkpoint(folder).network.state_dict())
        self.average = Average(self.network)
        kept = json.loads((folder / "curve.json").read_text("utf-8"))
        self.curve, self.pairs, self.step = kept["rows"], kept["pairs"], kept["steps"]
        self.images, self.seconds = kept["images"], kept["seconds"]

    def averaged(self) -> PointmapNetwork:
        """A copy with the averaged weights."""
        copy = PointmapNetwork(TINY).to(next(self.network.parameters()).device)
        copy.load_state_dict(self.network.state_dict())
        self.average.copy_to(copy)
        return copy.eval()


def train(arguments: argparse.Namespace) -> None:
    """Train until the clock, the number of steps or a signal says stop."""
    from assets.build.base import learning_rate, seconds_until

    torch.set_num_threads(arguments.threads)
    device = pick_device(arguments.device)
    run = Run(build_dir() / "dust3r", arguments.seed, arguments.lr, device)
    resumed = run.resume()
    if not resumed and arguments.start_from:
        run.start_from(arguments.start_from)
    print("resumes" if resumed else "starts", "at step", run.step, flush=True)
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda sign, _frame: stop.append(sign))
    first, second = ordered_pairs(arguments.views)
    parameters = [p for p in run.network.parameters() if p.requires_grad]
    begun, saved, told, here, losses, waited = time.monotonic(), time.monotonic(), time.monotonic(), 0, [], 0.0
    end = begun + (seconds_until(arguments.until) if arguments.until else 1e9)
    while not stop and time.monotonic() < end and (not arguments.steps or here < arguments.steps):
        lap = time.monotonic()
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + run.step)
        _, views = sample_views(arguments.scenes, arguments.views, PRETRAINING, generator, device)
        target = pair_targets(views, first, second)
        waited += time.monotonic() - lap
        rate = learning_rate(arguments.lr, here, 50, end - lap, 60 * arguments.decay_for)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        valid = (torch.ones_like(target[0][..., 0], dtype=torch.bool),) * 2
        with autocast(device, arguments.dtype):
            predicted = predict_pairs(run.network, views, first, second)
        loss = confidence_loss(predicted, target, valid)
        loss.backward()
        gradient_norm(parameters, 1.0)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        run.average.update(run.network)
        losses.append(float(loss.detach()))
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"The loss of step {run.step} is not finite; the last checkpoint is kept.")
        here, run.step, run.pairs = here + 1, run.step + 1, run.pairs + arguments.scenes * len(first)
        run.images += arguments.scenes * arguments.views
        run.seconds += time.monotonic() - lap
        if here % arguments.judge_every == 0:
            network = run.averaged()
            near = pair_error(network, PRETRAINING, 10_000_019)
            wide = pair_error(network, SHIFTS["overlap"], 10_000_019)
            row = {"step": run.step, "pairs": run.pairs, "seconds": round(run.seconds), "near": near, "wide": wide,
                   "loss": float(np.mean(losses))}  # fmt: skip
            run.curve.append(row)
            pace = arguments.judge_every * arguments.scenes * len(first) / (time.monotonic() - told)
            share = waited / (time.monotonic() - told)
            print(json.dumps({k: round(v, 4) for k, v in row.items()}), f"{pace:.1f} pairs/s, data {share:.0%}",
                  flush=True)  # fmt: skip
            losses, told, waited = [], time.monotonic(), 0.0
        if time.monotonic() - saved > 60 * arguments.save_every:
            run.save()
            saved = time.monotonic()
    run.save()
    print("stopped at step", run.step, "after", run.pairs, "pairs", flush=True)


# ------------------------------------------------------------------------------------------------ the shipped model

CARD = """# dust3r-tiny

A pointmap network of the DUSt3R family (arXiv 2312.14132), small enough to travel with Adapter Studio: {parameters:.1f}
million parameters, patches of 8 pixels, pictures of 64 x 64, linear heads. Code and weights are the project's own;
the weights may be used under Apache-2.0.

**What it has seen:** {images:,} rendered pictures as {pairs:,} ordered pairs ({steps:,} steps, {minutes:.0f} minutes of
one shared CPU core), all drawn by `assets/build/scenes3d.py`: closed rooms with boxes and balls, softly mottled paint,
views within 40 degrees. It has never seen a photo, and is of no use for photos.

| judged on | error |
|---|---|
| near pairs, as in training | {near:.3f} |
| A: views over 180 degrees | {overlap:.3f} |
| B: other cameras (exposure, cast, noise) | {appearance:.3f} |
| C: cylinders, chequered paint, longer lenses | {texture:.3f} |

The error is the mean distance of predicted and true points of both views, each side divided by its own mean distance
to the camera; 16 unseen scenes with 4 views each, seed 7000003.

{verdict}

![Error of near and wide pairs while it learned](curve.png)

Made by `python -m assets.build.dust3r train`, which goes on from its checkpoint, and `python -m assets.build.dust3r
export`. Seed {seed}.
"""


def export(arguments: argparse.Namespace) -> None:
    """Write the averaged weights (fp16), the curve and the card."""
    import cv2

    import assets
    from adapters import files
    from assets.build.cards import draw_panel
    from pipelines.geometry.checkpoints import save_folder

    torch.set_num_threads(arguments.threads)
    run = Run(build_dir() / "dust3r", 0, 1e-3, torch.device("cpu"))
    if not run.resume():
        raise SystemExit("There is no checkpoint yet: train first.")
    network = run.averaged()
    families = {"near": PRETRAINING, **SHIFTS}
    errors = {name: pair_error(network, family, 7_000_003) for name, family in families.items()}
    folder = save_folder(network, Path(assets.__file__).parent / "models/dust3r-tiny", "Apache-2.0")
    missed = errors["near"] > GATE_NEAR or errors["overlap"] < GATE_SHIFT * errors["near"]
    verdict = (
        f"**The gates are missed**: near pairs should err at most {GATE_NEAR}, wide ones at least {GATE_SHIFT} times "
        "as much. The training was too short (at least 300,000 pairs are wanted), so whether self-calibration helps "
        "cannot be judged with these weights; they show that the parts work."
        if missed
        else f"The gates are met: near pairs err at most {GATE_NEAR}, wide ones at least {GATE_SHIFT} times as much."
    )
    card = CARD.format(
        parameters=sum(p.numel() for p in network.parameters()) / 1e6, images=run.images, pairs=run.pairs,
        steps=run.step, minutes=run.seconds / 60, verdict=verdict, seed=run.seed, **errors,
    )  # fmt: skip
    files.write_text(folder / "README.md", card)
    lines = {name: [(row["pairs"], row[name]) for row in run.curve] for name in ("near", "wide")}
    panel = draw_panel(lines, "error against ordered pairs seen")
    files.write(folder / "curve.png", lambda part: cv2.imwrite(str(part), panel[..., ::-1]))
    write_json(folder / "curve.json", {"rows": run.curve, "errors": errors, "pairs": run.pairs, "steps": run.step,
                                      "images": run.images, "seconds": round(run.seconds)})  # fmt: skip
    print(card)


def main(given: Sequence[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.add_argument("--until", default="", help="stop at this time of the local clock, HH:MM")
    training.add_argument("--steps", type=int, default=0, help="stop after so many steps (0 = no limit)")
    training.add_argument("--decay-for", type=float, default=15, help="minutes over which the rate falls to zero")
    training.add_argument("--lr", type=float, default=1.5e-3)
    training.add_argument("--scenes", type=int, default=4, help="scenes in a batch")
    training.add_argument("--start-from", type=Path, help="exported folder to begin with when there is no checkpoint")
    training.add_argument("--views", type=int, default=4, help="views of a scene: each ordered pair is used")
    training.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    training.add_argument("--device", default="auto")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--threads", type=int, default=1)
    training.add_argument("--save-every", type=float, default=3, help="minutes between checkpoints")
    training.add_argument("--judge-every", type=int, default=200, help="steps between validations")
    training.set_defaults(do=train)
    exporting = commands.add_parser("export")
    exporting.add_argument("--threads", type=int, default=1)
    exporting.set_defaults(do=export)
    arguments = parser.parse_args(given)
    arguments.do(arguments)


if __name__ == "__main__":
    main()
