"""Distil classifier-free guidance into an adapter: one pass of the denoiser per step instead of two."""

from __future__ import annotations

import argparse
from pathlib import Path

import studio

PROMPTS = ("a cartoon icon of a red apple", "a flat icon of a dog", "a bold icon of a car", "a cartoon icon of a tree")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path("out/distillation"), help="folder of the run")
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--trajectories", type=int, default=16, help="paths of the base to learn from")
    options.add_argument("--knots", type=int, default=50, help="points of each path")
    chosen = options.parse_args()

    chosen.out.mkdir(parents=True, exist_ok=True)
    prompts = chosen.out / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    result = studio.train(
        "distill",
        folder=chosen.out / "run",
        objective="guidance",
        guidance=4,
        states="trajectories",
        prompts=str(prompts),
        trajectory_count=chosen.trajectories,
        knots=chosen.knots,
        steps=chosen.steps,
        batch_size=4,
        learning_rate=2e-3,
        targets="all",
        sample_every=0,
    )
    print(f"steps: {result['steps']}, loss {result['loss']:.4f}: {result['adapter']}")
    # Guidance is inside the adapter, so the picture takes a guidance_scale of 1.
    studio.compose(PROMPTS[0], [result["adapter"]], guidance_scale=1, steps=20, folder=chosen.out / "pictures")
    print(f"a picture from single passes is in {chosen.out / 'pictures'}")


if __name__ == "__main__":
    main()
