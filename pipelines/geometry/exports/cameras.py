"""What files of cameras share: intrinsics in the pixels of the original file, and which scenes they can hold."""

from __future__ import annotations

from adapters.errors import InputError
from pipelines.geometry.scene import Scene


def intrinsics(scene: Scene, n: int) -> tuple[float, float, float, float, int, int]:
    height, width = scene.depth[n].shape
    affine = scene.affines[n]
    whole = affine.size if affine.size != (0, 0) else (width, height)
    return (*affine.intrinsics(float(scene.focals[n]), height, width), *whole)


def check(scene: Scene) -> None:
    if len(scene.names) < 2:
        raise InputError(
            "A file of cameras needs two pictures or more: one picture has no pose. Choose glb, ply or npz."
        )
    twice = next((name for name in scene.names if scene.names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"Two pictures are named '{twice}', and this format tells them apart by name: rename one.")
