"""One prompt over seeds (rows) and strengths of an adapter (columns), as one picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

import studio
from studio import library


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path("out/sweep.png"), help="the grid")
    options.add_argument("--adapter", default="fox")
    options.add_argument("--prompt", default="a cartoon icon of a fox")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.4, 0.8, 1.2])
    options.add_argument("--steps", type=int, default=20)
    chosen = options.parse_args()

    file = library.resolve_adapter(chosen.adapter)
    pipe = studio.load("tinymoji")  # opened once; only the strength changes
    rows = []
    for weight in chosen.weights:
        with pipe:
            pipe.load_lora(file, weight=weight)
            rows.append([pipe(chosen.prompt, steps=chosen.steps, seed=seed).images[0] for seed in chosen.seeds])
    width, height = rows[0][0].size
    grid = Image.new("RGB", (width * len(rows), height * len(chosen.seeds)))
    for column, pictures in enumerate(rows):
        for row, picture in enumerate(pictures):
            grid.paste(picture, (column * width, row * height))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    grid.save(chosen.out)
    print(f"{len(chosen.seeds)} seeds x {len(chosen.weights)} strengths in {chosen.out}")


if __name__ == "__main__":
    main()
