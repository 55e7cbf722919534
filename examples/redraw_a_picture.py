"""A picture redrawn with another adapter: all of it, then one half of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

import studio


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--image", type=Path, help="start picture (default: a fox is drawn first)")
    options.add_argument("--strength", type=float, default=0.6, help="how much is redrawn: 0 to 1")
    options.add_argument("--out", type=Path, default=Path("out/redrawn"), help="folder for the pictures")
    options.add_argument("--steps", type=int, default=25)
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args()

    start = chosen.image or studio.compose(
        "a cartoon icon of a fox", ["fox"], steps=chosen.steps, seed=3, folder=chosen.out / "start"
    )[0]  # fmt: skip
    how = {"image": start, "steps": chosen.steps, "seed": chosen.seed}
    words = "a cartoon icon of a robot"
    whole = studio.compose(words, ["robot"], strength=chosen.strength, folder=chosen.out / "whole", **how)[0]
    mask = Image.new("L", whole.size)
    ImageDraw.Draw(mask).rectangle((0, 0, whole.width, whole.height // 2), fill="white")  # white is redrawn
    studio.compose(words, ["robot"], strength=1, mask=mask, folder=chosen.out / "half", **how)
    print(f"2 pictures of {whole.width} x {whole.height} pixels in {chosen.out}")


if __name__ == "__main__":
    main()
