"""COLMAP's text files, with the pictures.

Poses are world-to-camera, quaternions (w, x, y, z), in OpenCV's axes (x right, y down, z forward); the world is the
scene's. Cameras are PINHOLE, one per picture, in pixels with centres at half-integers. Names contain no white space,
which separates the format's fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from adapters import files
from pipelines.geometry.cameras import matrix_quaternion
from pipelines.geometry.exports.pictures import write_pictures
from pipelines.geometry.exports.written import Written
from pipelines.geometry.scene import Scene
from pipelines.geometry.selection import Selection, cloud


def write_colmap(
    scene: Scene, folder: Path, choice: Selection | None = None, originals: Sequence[Path | None] = ()
) -> Written:
    """Write ``cameras.txt``, ``images.txt``, ``points3D.txt`` and ``images/``.

    Raises:
        InputError: fewer than two pictures (there are no poses then), or no point left.
    """
    points, colours, _ = cloud(scene, choice or Selection())
    with files.whole(folder, sync=False) as part:
        part.mkdir()
        views, notes = write_pictures(scene, part / "images", originals)
        cameras = ["# CAMERA_ID MODEL WIDTH HEIGHT fx fy cx cy"]
        images = ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME"]
        for n, view in enumerate(views):
            cameras.append(
                f"{n + 1} PINHOLE {view.width} {view.height} {view.fx:.9g} {view.fy:.9g} {view.cx:.9g} {view.cy:.9g}"
            )
            inverse = np.linalg.inv(scene.poses[n])
            x, y, z, w = matrix_quaternion(torch.from_numpy(inverse[:3, :3])).tolist()
            shift = " ".join(f"{value:.9g}" for value in inverse[:3, 3])
            images += [f"{n + 1} {w:.9g} {x:.9g} {y:.9g} {z:.9g} {shift} {n + 1} {view.name}", ""]
        rows = ["# POINT3D_ID X Y Z R G B ERROR TRACK[]"]
        for k, ((px, py, pz), (r, g, b)) in enumerate(zip(points, colours, strict=True)):
            rows.append(f"{k + 1} {px:.6g} {py:.6g} {pz:.6g} {r} {g} {b} 0")
        for name, lines in (("cameras", cameras), ("images", images), ("points3D", rows)):
            (part / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Written(folder, len(points), tuple(notes))
