"""nerfstudio's ``transforms.json``, with the pictures and a point cloud.

Poses are camera-to-world in OpenGL's axes (x right, y up, z backward); the world is the scene's, as in
``sparse_pc.ply``. Every frame has its own intrinsics, in pixels with centres at half-integers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from adapters import files
from pipelines.geometry.exports.pictures import write_pictures
from pipelines.geometry.exports.ply import write_ply
from pipelines.geometry.exports.written import Written
from pipelines.geometry.scene import TO_GL, Scene
from pipelines.geometry.selection import Selection


def write_nerfstudio(
    scene: Scene, folder: Path, choice: Selection | None = None, originals: Sequence[Path | None] = ()
) -> Written:
    """Write ``transforms.json``, ``sparse_pc.ply`` and ``images/``.

    Raises:
        InputError: as :func:`pipelines.geometry.exports.colmap.write_colmap`.
    """
    with files.whole(folder, sync=False) as part:
        part.mkdir()
        views, notes = write_pictures(scene, part / "images", originals)
        frames = [
            {
                "file_path": f"images/{view.name}", "transform_matrix": (pose @ TO_GL).tolist(), "fl_x": view.fx,
                "fl_y": view.fy, "cx": view.cx, "cy": view.cy, "w": view.width, "h": view.height,
            }
            for view, pose in zip(views, scene.poses, strict=True)
        ]  # fmt: skip
        whole = {"camera_model": "OPENCV", "ply_file_path": "sparse_pc.ply", "frames": frames}
        (part / "transforms.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
        points = write_ply(scene, part / "sparse_pc.ply", choice).points
    return Written(folder, points, tuple(notes))
