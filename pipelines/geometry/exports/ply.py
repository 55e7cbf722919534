"""PLY: a binary point cloud with colours in sRGB.

Axes: the scene's world, in OpenCV's directions (x right, y down, z forward of the camera that the alignment started
from).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from adapters import files
from pipelines.geometry.exports.written import Written
from pipelines.geometry.scene import Scene
from pipelines.geometry.selection import Selection, cloud


def write_ply(scene: Scene, file: Path, choice: Selection | None = None) -> Written:
    """Write a binary PLY with x y z, red green blue and confidence; raises :class:`InputError` if no point is left."""
    points, colours, confidence = cloud(scene, choice or Selection())
    kind = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1"),
                     ("confidence", "<f4")])  # fmt: skip
    rows = np.empty(len(points), kind)
    for k, name in enumerate(("x", "y", "z")):
        rows[name], rows[("red", "green", "blue")[k]] = points[:, k], colours[:, k]
    rows["confidence"] = confidence
    types = {"<f4": "float", "|u1": "uchar"}
    head = "".join(f"property {types[kind[name].str]} {name}\n" for name in kind.names or ())
    text = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(rows)}\n{head}end_header\n"
    files.write(file, lambda part: part.write_bytes(text.encode() + rows.tobytes()))
    return Written(file, len(rows))
