"""Measure the base model with the judge: ``python -m assets.build.evaluate``.

Single subjects: every subject x base style x 4 seeds, is the named subject the judge's first answer?
Two subjects: a fixed list of pairs, is each the judge's first answer on its own half? Both with 95 %
Wilson intervals. ``--fraction 0.1`` takes an evenly spread part. Results go to ``scores.json`` and the
card (``README.md``) of the model directory. ``--curve`` scores every kept average of the training run
instead and writes ``learning-curve.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ZImagePipeline
from torch import Tensor

from assets.build import data
from assets.build.common import build_dir, pick_device, write_json
from assets.build.judge import Judge, load_judge
from assets.build.vae import reconstruction

STEPS = 20
GUIDANCE = 4.0
SAMPLERS = {"DDIMScheduler": "DDIM", "FlowMatchEulerDiscreteScheduler": "Euler on the flow"}
SEEDS = 4
PAIRS = 312
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Case:
    """One picture to be made: caption, seed, style and the subjects from left to right."""

    caption: str
    seed: int
    style: str
    names: tuple[str, ...]


Draw = Callable[[Sequence[Case]], Tensor]
"""Cases -> pictures (B, 3, H, W), float in 0..1."""


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson interval of a share; (0, 1) when nothing was counted."""
    if count == 0:
        return (0.0, 1.0)
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - half, middle + half)


def single_cases(seeds: int = SEEDS) -> list[Case]:
    """Return every base subject in every base style, ``seeds`` times, on a white background."""
    return [
        Case(data.make_caption(style, [name], None), 1000 * seed + index, style, (name,))
        for seed in range(seeds)
        for index, name in enumerate(data.BASE_CONCEPTS)
        for style in data.BASE_STYLES
    ]


def pair_cases(count: int = PAIRS) -> list[Case]:
    """Return the fixed list of two-subject cases: each subject equally often, all wordings with positions."""
    rng = np.random.default_rng(2024)
    names, styles = list(data.BASE_CONCEPTS), list(data.BASE_STYLES)
    made: list[Case] = []
    while len(made) < count:
        order = rng.permutation(len(names))
        for a, b in zip(order[::2], order[1::2], strict=False):
            pair, style = (names[a], names[b]), styles[len(made) % len(styles)]
            caption = data.make_caption(style, pair, None, form=len(made) % 6)
            made.append(Case(caption, 50_000 + len(made), style, pair))
    return made[:count]


def part(cases: Sequence[Case], fraction: float) -> list[Case]:
    """Return an evenly spread part of the cases; at least one. ``fraction`` is in (0, 1]."""
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction must be above 0 and at most 1, got {fraction}")
    count = max(1, round(len(cases) * fraction))
    picked = np.random.default_rng(7).permutation(len(cases))[:count]
    return [cases[i] for i in sorted(picked)]


def guidance_for(pipeline: Any) -> float:
    """Return what :data:`GUIDANCE` is called by a pipeline of diffusers: Z-Image's counts from 0 instead of 1."""
    return GUIDANCE - 1 if isinstance(pipeline, ZImagePipeline) else GUIDANCE


def pipeline_draw(pipeline: Any, steps: int, guidance: float) -> Draw:
    """Return a function that draws with an ordinary pipeline, each picture from its own seed."""
    pipeline.set_progress_bar_config(disable=True)

    def draw(cases: Sequence[Case]) -> Tensor:
        generators = [torch.Generator().manual_seed(case.seed) for case in cases]
        made = pipeline(
            prompt=[case.caption for case in cases],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            height=data.SIZE,
            width=data.SIZE,
            output_type="pt",
        )
        return made.images.float().cpu()

    return draw


def render_draw(sprites: np.ndarray, vae: AutoencoderKL | None) -> Draw:
    """Return a function that renders the true art instead, through the autoencoder if one is given.

    What the judge makes of these pictures is the most that a model could reach.
    """

    def draw(cases: Sequence[Case]) -> Tensor:
        images = []
        for case in cases:
            placed = data.place(np.random.default_rng(case.seed), case.names)
            images.append(data.render(data.Scene(case.style, placed, "white", case.caption), sprites))
        stack = np.stack(images)
        if vae is not None:
            stack, _ = reconstruction(vae, stack, vae.device)
        return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 255

    return draw


def ceiling(judge: Judge, vae: AutoencoderKL, fraction: float, batch: int) -> dict[str, Any]:
    """Return the scores of the true art, as it is and after the autoencoder."""
    sprites = data.load_sprites()
    made = {}
    for name, model in (("renders", None), ("renders through the autoencoder", vae)):
        scores, _ = evaluate(render_draw(sprites, model), judge, fraction, batch)
        made[name] = {key: scores[key] for key in ("single", "pair", "single style")}
    return made


def judge_case(judge: Judge, images: Tensor, cases: Sequence[Case]) -> list[bool]:
    """Say for each picture whether every subject is the first answer at its place (one or two subjects)."""
    wanted = torch.tensor([[judge.index(name) for name in case.names] for case in cases])
    if wanted.shape[1] == 1:
        found = judge.classify(images).argmax(1, keepdim=True)
    else:
        found = torch.stack([judge.classify_region(images, box).argmax(1) for box in (LEFT, RIGHT)], 1)
    return [bool(x) for x in (found == wanted).all(1)]


def run_cases(
    draw: Draw, judge: Judge, cases: Sequence[Case], batch: int, keep: int = 48
) -> tuple[list[bool], list[int], Tensor]:
    """Draw and judge all cases, ``batch`` at a time.

    Returns right or wrong per case, the judge's style answer per picture, and the first ``keep`` pictures.
    """
    right: list[bool] = []
    styles: list[int] = []
    kept: list[Tensor] = []
    for start in range(0, len(cases), batch):
        now = cases[start : start + batch]
        images = draw(now)
        right += judge_case(judge, images, now)
        styles += judge.classify_style(images).argmax(1).tolist()
        if len(kept) * batch < keep:
            kept.append(images)
    return right, styles, torch.cat(kept)[:keep]


def score(right: Sequence[bool]) -> dict[str, Any]:
    """Return share, interval and count."""
    low, high = wilson(sum(right), len(right))
    share = sum(right) / len(right) if right else 0.0
    return {"right": sum(right), "pictures": len(right), "share": share, "low": low, "high": high}


def evaluate(
    draw: Draw, judge: Judge, fraction: float, batch: int = 48, guidance: float = GUIDANCE
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the scores (single, pair, by style, by subject) and sample pictures of both kinds.

    ``guidance`` is only written down: what ``draw`` uses.
    """
    singles, pairs = part(single_cases(), fraction), part(pair_cases(), fraction)
    right, styles, single_images = run_cases(draw, judge, singles, batch)
    both, _, pair_images = run_cases(draw, judge, pairs, batch)
    by_style = {
        style: score([ok for ok, case in zip(right, singles, strict=True) if case.style == style])
        for style in data.BASE_STYLES
    }
    by_subject = {
        name: [ok for ok, case in zip(right, singles, strict=True) if case.names == (name,)]
        for name in data.BASE_CONCEPTS
    }
    style_right = [judge.styles[s] == case.style for s, case in zip(styles, singles, strict=True)]
    scores = {
        "single": score(right), "pair": score(both), "single style": score(style_right), "by style": by_style,
        "by subject": {name: sum(ok) / len(ok) for name, ok in by_subject.items() if ok},
        "fraction": fraction, "steps": STEPS, "guidance": guidance,
    }  # fmt: skip
    return scores, {"single": single_images, "pair": pair_images}


def sheet(images: dict[str, Tensor], columns: int = 12) -> np.ndarray:
    """Lay out the sample pictures, single subjects above, pairs below: uint8 (H, W, 3)."""
    flat = [image for group in images.values() for image in group]
    return data.contact_sheet([(im.permute(1, 2, 0).numpy() * 255 + 0.5).astype(np.uint8) for im in flat], columns)


def load_pipeline(folder: Path, device: str) -> Any:
    """Load a model directory in fp32 on CPU and in fp16 on a GPU."""
    place = pick_device(device)
    dtype = torch.float32 if place.type == "cpu" else torch.float16
    return DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(place)


def curve(options: argparse.Namespace, judge: Judge) -> None:
    """Score every kept average that has no score yet and write the learning curve."""
    from assets.build import export

    program = export.program(options.model.name)
    folder = build_dir() / program.FOLDER
    target = options.model / "learning-curve.json"
    rows: dict[str, Any] = json.loads(target.read_text("utf-8")) if target.is_file() else {}
    model = program.Model()
    for file in sorted(folder.glob("average-*.pt")):
        facts = program.load_average(model, file)
        if str(facts["step"]) in rows:
            continue
        pipeline = program.make_pipeline(model)
        draw = pipeline_draw(pipeline, STEPS, guidance_for(pipeline))
        scores, _ = evaluate(draw, judge, options.fraction, options.batch)
        row = {"samples": facts["samples"], "single": scores["single"], "pair": scores["pair"]}
        rows[str(facts["step"])] = row
        write_json(target, rows)
        print(f"step {facts['step']}: single {row['single']['share']:.1%}, pair {row['pair']['share']:.1%}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate a model directory, or the learning curve."""
    import assets
    from assets.build import cards

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(assets.__file__).parent / "models" / "tinymoji")
    parser.add_argument("--judge", type=Path, default=None)
    parser.add_argument("--fraction", type=float, default=1.0)
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--ceiling", action="store_true", help="score the true art as well (needs the sprites)")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    judge = load_judge(options.judge)
    if options.curve:
        curve(options, judge)
        cards.write_model_card(options.model)
        return
    began = time.monotonic()
    pipeline = load_pipeline(options.model, options.device)
    guidance = guidance_for(pipeline)
    draw = pipeline_draw(pipeline, STEPS, guidance)
    scores, images = evaluate(draw, judge, options.fraction, options.batch, guidance)
    scores["sampler"] = SAMPLERS.get(type(pipeline.scheduler).__name__, type(pipeline.scheduler).__name__)
    if options.ceiling:
        scores["ceiling"] = ceiling(judge, pipeline.vae.float(), options.fraction, options.batch)
    write_json(options.model / "scores.json", scores)
    data.save_sheet(options.model / "samples.png", sheet(images))
    cards.write_model_card(options.model)
    for key in ("single", "pair", "single style"):
        s = scores[key]
        print(f"{key}: {s['right']}/{s['pictures']} = {s['share']:.1%} (95 % {s['low']:.1%} to {s['high']:.1%})")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
