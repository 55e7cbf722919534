"""Render the sample scene of the app: ``python -m assets.build.sample_scene``.

Eight pictures over 180 degrees of a room that no training has seen (its seed lies beyond all steps' seeds), drawn large
and made smaller so that edges are soft.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

import assets
from adapters import files
from assets.build.common import write_json
from assets.build.scenes3d import SHIFTS, sample_views

SEED, VIEWS, SIZE = 2_000_000_011, 8, 192


def main() -> None:
    """Write ``assets/scenes/room``: pictures and the true cameras."""
    folder = Path(assets.__file__).parent / "scenes/room"
    _, views = sample_views(1, VIEWS, SHIFTS["overlap"], torch.Generator().manual_seed(SEED), size=2 * SIZE)
    for number in views.azimuth[0].argsort().tolist():
        pixels = (views.image[0, number].permute(1, 2, 0) * 255).byte().numpy()
        picture = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        rank = int((views.azimuth[0] < views.azimuth[0, number]).sum())
        files.write(folder / f"room-{rank}.png", picture.save)
    order = views.azimuth[0].argsort()
    truth = {"focal": float(views.focal[0, 0]) / 2, "size": SIZE, "poses": views.pose[0, order].tolist(), "seed": SEED}
    write_json(folder / "cameras.json", truth)


if __name__ == "__main__":
    main()
