"""COLMAP's text files: world-to-camera quaternions and PINHOLE intrinsics.

Intrinsics are in the pixels of the original file; COLMAP puts pixel centres at halves.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from adapters import files
from pipelines.geometry.cameras import matrix_quaternion
from pipelines.geometry.exports import cameras as common
from pipelines.geometry.scene import Scene
from pipelines.geometry.selection import Selection, cloud


def write_colmap(scene: Scene, folder: Path, choice: Selection | None = None) -> Path:
    """Write ``cameras.txt``, ``images.txt`` and ``points3D.txt``.

    Raises:
        InputError: fewer than two pictures (then there are no poses), two of one name, or no point left.
    """
    common.check(scene)
    cameras, images = ["# CAMERA_ID MODEL WIDTH HEIGHT fx fy cx cy"], ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME"]
    for n, name in enumerate(scene.names):
        fx, fy, cx, cy, width, height = common.intrinsics(scene, n)
        cameras.append(f"{n + 1} PINHOLE {width} {height} {fx:.9g} {fy:.9g} {cx + 0.5:.9g} {cy + 0.5:.9g}")
        view = np.linalg.inv(scene.poses[n])
        x, y, z, w = matrix_quaternion(torch.from_numpy(view[:3, :3])).tolist()
        shift = " ".join(f"{value:.9g}" for value in view[:3, 3])
        images += [f"{n + 1} {w:.9g} {x:.9g} {y:.9g} {z:.9g} {shift} {n + 1} {name}", ""]
    points, colours, _ = cloud(scene, choice or Selection())
    rows = ["# POINT3D_ID X Y Z R G B ERROR TRACK[]"]
    for k, ((x, y, z), (r, g, b)) in enumerate(zip(points, colours, strict=True)):
        rows.append(f"{k + 1} {x:.6g} {y:.6g} {z:.6g} {r} {g} {b} 0")
    with files.whole(folder, sync=False) as part:
        part.mkdir()
        for name, lines in (("cameras", cameras), ("images", images), ("points3D", rows)):
            (part / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
