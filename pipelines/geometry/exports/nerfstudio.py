"""nerfstudio's ``transforms.json``: OpenGL cameras (x right, y up, z backward) and ``sparse_pc.ply``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapters import files
from pipelines.geometry.exports import cameras as common
from pipelines.geometry.exports.ply import write_ply
from pipelines.geometry.scene import TO_GL, Scene
from pipelines.geometry.selection import Selection


def write_nerfstudio(scene: Scene, folder: Path, choice: Selection | None = None) -> Path:
    """Write ``transforms.json`` (OpenGL cameras, intrinsics of the original files) and ``sparse_pc.ply``.

    Raises:
        InputError: as :func:`write_colmap`.
    """
    common.check(scene)
    frames: list[dict[str, Any]] = []
    for n, name in enumerate(scene.names):
        fx, fy, cx, cy, width, height = common.intrinsics(scene, n)
        frames.append({
            "file_path": f"images/{name}", "transform_matrix": (scene.poses[n] @ TO_GL).tolist(), "fl_x": fx,
            "fl_y": fy, "cx": cx + 0.5, "cy": cy + 0.5, "w": width, "h": height,
        })  # fmt: skip
    whole = {"camera_model": "OPENCV", "ply_file_path": "sparse_pc.ply", "frames": frames}
    with files.whole(folder, sync=False) as part:
        part.mkdir()
        (part / "transforms.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
        write_ply(scene, part / "sparse_pc.ply", choice)
    return folder
