"""Two characters in one picture, each in its own half."""

from __future__ import annotations

import argparse
from pathlib import Path

import studio


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path("out/regions"), help="folder for the pictures")
    options.add_argument("--steps", type=int, default=25)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()

    pictures = studio.compose(
        "a cartoon icon of a robot and a cartoon icon of a cactus",
        ["robot", "cactus"],
        regions=[
            {"box": [0, 0, 0.5, 1], "adapters": ["robot"]},
            {"box": [0.5, 0, 1, 1], "adapters": ["cactus"]},
        ],
        width=128,
        height=64,
        steps=chosen.steps,
        seed=chosen.seed,
        folder=chosen.out,
    )
    print(f"{len(pictures)} picture of {pictures[0].width} x {pictures[0].height} pixels in {chosen.out}")


if __name__ == "__main__":
    main()
