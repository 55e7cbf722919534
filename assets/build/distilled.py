"""The shipped distilled adapters: ``python -m assets.build.distilled train guided``, then ``train few-steps``.

``guided`` has guidance built in, ``few-steps`` draws in four steps and starts from
``guided``, so it comes second. Values stand in ``configs/``; each takes about ten minutes on one core, goes on where it
was interrupted, and is put into ``assets/adapters/NAME``. A base that has changed gets new trajectories and new runs.
``score`` asks the judge what it sees in pictures of single subjects, and writes the answer beside the adapter.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from adapters.files import write_text
from assets.build import data
from assets.build.adapters import CONFIGS, SAMPLES, SHIPPED
from assets.build.cards import percent
from assets.build.common import build_dir, from_home, write_json
from assets.build.evaluate import STEPS, part, score, single_cases
from assets.build.judge import load_judge
from studio import library

NAMES = ("guided", "few-steps")
PROMPTS = 512
CASES = 48


def prompts(count: int = PROMPTS, seed: int = 5) -> list[str]:
    """Captions as the base knows them: two thirds single subjects, one third pairs, a third with a background."""
    rng = random.Random(seed)
    styles, names, colours = list(data.BASE_STYLES), list(data.BASE_CONCEPTS), list(data.BACKGROUNDS)[1:]
    made = []
    for number in range(count):
        subjects = rng.sample(names, 2 if number % 3 == 2 else 1)
        background = rng.choice(colours) if rng.random() < 1 / 3 else None
        made.append(data.make_caption(rng.choice(styles), subjects, background))
    return made


def base_key() -> str:
    """Changes when the base's denoiser changes."""
    weights = next(iter(sorted((SHIPPED.parent / "models" / "tinymoji" / "unet").glob("*.safetensors"))))
    return library.sha256(weights)[:12]


def values(name: str, folder: Path) -> dict[str, Any]:
    """The values of the job: those of the file in ``configs/`` and what depends on this machine."""
    chosen: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    listed = write_text(folder / "prompts.txt", "\n".join(prompts()) + "\n")
    chosen |= {
        "prompts": from_home(listed),
        "trajectories": from_home(folder / "trajectories"),  # both learn from the same ones
        "sample_prompts": [data.make_caption(style, [word], None) for style, word in
                           zip(data.BASE_STYLES, ("red apple", "dog", "car"), strict=True)],
    }  # fmt: skip
    if name == "few-steps":
        first = folder / "guided" / "guided.safetensors"
        if not first.is_file():
            raise SystemExit("few-steps starts from guided: run  python -m assets.build.distilled train guided  first")
        chosen["continue_from"] = from_home(first)
    return chosen


def train(name: str, changes: dict[str, Any] | None = None, shipped: Path = SHIPPED) -> Path:
    """Distil one adapter (going on if it was interrupted) and put it into ``shipped``; returns its folder."""
    from studio.cli.terminal import Terminal
    from studio.training import distill

    folder = build_dir() / "distilled" / base_key()
    run, target = folder / name, shipped / name
    with Terminal() as monitor:
        result = distill(folder=run, monitor=monitor, resume=True, **(values(name, folder) | (changes or {})))
    target.mkdir(parents=True, exist_ok=True)
    for source in (Path(result["adapter"]), run / "config.yaml"):
        shutil.copy2(source, target / source.name)
    text = Path(result["card"]).read_text(encoding="utf-8")
    write_text(target / "card.md", re.sub(r"(!\[sample\]\([^)]*\)\n)+", f"{SAMPLES}\n", text))
    print(f"final loss {result['loss']:.5f} (first {result['first_loss']:.5f}), {result['seconds']:.0f} s of training")
    return target


def judge_distilled(name: str, folder: Path, count: int = CASES) -> dict[str, Any]:
    """Draw single subjects with the adapter, as it is meant to be used, and score them.

    Writes ``score.json``, ``samples.png`` and ``preview.png`` into the adapter's folder, and the score into its card.
    """
    from pipelines.diffusion import MultiLoRAPipeline

    pipeline, judge = MultiLoRAPipeline.from_pretrained(SHIPPED.parent / "models" / "tinymoji"), load_judge()
    mark = pipeline.load_lora(folder / f"{name}.safetensors", name=name).distilled
    assert mark is not None, f"{name} is not distilled"
    how: dict[str, Any] = {"steps": mark.steps or STEPS, "scheduler": mark.sampler or "default"}
    all_cases = single_cases(1)
    cases = part(all_cases, count / len(all_cases))
    drawn = [pipeline(case.caption, seed=case.seed, **how).images[0] for case in cases]
    pictures = [np.array(image.convert("RGB")) for image in drawn]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    found = judge.classify(images).argmax(1)
    result = {
        **how, "passes per step": 1,
        "subject": score([int(k) == judge.index(case.names[0]) for k, case in zip(found, cases, strict=True)]),
    }  # fmt: skip
    data.save_sheet(folder / "samples.png", data.contact_sheet(pictures, 8))
    data.save_png(folder / "preview.png", pictures[0])
    write_json(folder / "score.json", result)
    card = (folder / "card.md").read_text(encoding="utf-8")
    line = f"- Judged in {how['steps']} steps of one pass each, subject recognised: {percent(result['subject'])}\n"
    write_text(folder / "card.md", re.sub(r"(- Judged in .*\n)?\n!\[samples\]", f"{line}\n![samples]", card, count=1))
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Distil adapters, or score what is shipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "score"))
    parser.add_argument("names", nargs="*", help=f"which; all by default ({', '.join(NAMES)})")
    parser.add_argument("--steps", type=int, help="optimiser steps instead of the configuration's")
    parser.add_argument("--shipped", type=Path, default=SHIPPED, help="where they are put")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(options.threads)
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        raise SystemExit(f"unknown adapters {', '.join(unknown)}: there are {', '.join(NAMES)}")
    for name in options.names or NAMES:
        if options.command == "train":
            print(
                f"wrote {train(name, {'steps': options.steps} if options.steps else None, options.shipped)}", flush=True
            )
        else:
            print(name, judge_distilled(name, options.shipped / name), flush=True)


if __name__ == "__main__":
    main()
