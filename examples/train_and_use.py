"""Train a LoRA on a folder of pictures, then draw with it.

Without ``--data`` the training pictures are drawn first, with the shipped adapter of a fox.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import studio


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, help="folder of pictures (captions beside them are read)")
    options.add_argument("--trigger", default="zorkfox", help="the word that will call the concept")
    options.add_argument("--out", type=Path, default=Path("out/training"), help="folder of the run")
    options.add_argument("--steps", type=int, default=300)
    chosen = options.parse_args()

    data = chosen.data or chosen.out / "data"
    if chosen.data is None:
        studio.compose("a cartoon icon of a fox", ["fox"], images=6, steps=15, folder=data)
    result = studio.train(
        "image",
        folder=chosen.out / "run",
        data=str(data),
        trigger=chosen.trigger,
        steps=chosen.steps,
        batch_size=4,
        learning_rate=2e-3,
        targets="all",
        checkpoint_every=100,
        sample_every=0,
    )
    print(f"trained {result['steps']} steps, loss {result['loss']:.3f}: {result['adapter']}")
    prompt = f"a picture of {chosen.trigger}"
    studio.compose(prompt, [result["adapter"]], images=2, folder=chosen.out / "with-adapter")
    studio.compose(prompt, images=2, folder=chosen.out / "base-alone")
    print(f"pictures with and without the adapter are in {chosen.out}")


if __name__ == "__main__":
    main()
