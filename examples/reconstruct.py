"""Photos of one scene in, cameras and a point cloud out."""

from __future__ import annotations

import argparse
from pathlib import Path

import assets
import studio


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("photos", type=Path, nargs="*", help="photos, a folder or a video (a sample room if left out)")
    options.add_argument("--out", type=Path, default=Path("out/scene"))
    options.add_argument("--calibrate", action="store_true", help="train an adapter on this scene first (LoRA3D)")
    options.add_argument("--steps", type=int, default=300, help="steps of the alignment")
    chosen = options.parse_args()

    photos = chosen.photos or sorted(assets.path("scenes/room").glob("room-*.png"))[:4]
    result = studio.reconstruct(photos, folder=chosen.out, calibrate=chosen.calibrate, steps=chosen.steps)
    for text in result["warnings"]:
        print(f"note: {text}")
    print(f"{len(result['cameras'])} cameras and {result['points']} points in {result['glb']}")


if __name__ == "__main__":
    main()
