"""GLB: binary glTF 2.0 for three.js, Blender and the like: points or surfaces, and the cameras as pyramids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from adapters import files
from pipelines.geometry.scene import TO_GL, Scene
from pipelines.geometry.selection import Selection, cloud, triangles


def write_glb(
    scene: Scene, file: Path, choice: Selection | None = None, mesh: bool = False, cameras: bool = True,
    camera_size: float = 5.0,
) -> int:  # fmt: skip
    """Write points or a mesh, and the cameras as pyramids (``camera_size`` % of the scene); returns the points."""
    import trimesh

    choice = choice or Selection()
    upright = TO_GL @ np.linalg.inv(scene.poses[0])
    out = trimesh.Scene()
    if mesh:
        vertices, colours, faces = triangles(scene, choice)
        shown = trimesh.Trimesh(vertices, faces, vertex_colors=colours, process=False)
        shown.remove_unreferenced_vertices()
        out.add_geometry(shown)
        points = np.asarray(shown.vertices)
    else:
        points, colours, _ = cloud(scene, choice)
        out.add_geometry(trimesh.PointCloud(points, colors=colours))
    if cameras:
        extent = float(np.linalg.norm(np.percentile(points, 90, 0) - np.percentile(points, 10, 0)))
        for n in range(len(scene.names)):
            out.add_geometry(_pyramid(scene, n, extent * camera_size / 100))
    out.apply_transform(upright)
    files.write(file, lambda part: part.write_bytes(out.export(file_type="glb")))
    return len(points)


_COLOURS = ((230, 85, 60), (60, 130, 230), (60, 170, 90), (235, 170, 40), (150, 90, 200), (40, 175, 185))


def _pyramid(scene: Scene, n: int, size: float) -> Any:
    """A camera: thin bars from its centre to the corners of its picture."""
    import trimesh

    height, width = scene.depth[n].shape
    x, y = width / 2 / scene.focals[n] * size, height / 2 / scene.focals[n] * size
    corners = np.array([[-x, -y, size], [x, -y, size], [x, y, size], [-x, y, size], [0, 0, 0]])
    edges = [(0, 1), (1, 2), (2, 3), (3, 0), *((4, k) for k in range(4))]
    bars = [trimesh.creation.cylinder(size * 0.03, segment=corners[[a, b]], sections=5) for a, b in edges]
    made: Any = trimesh.util.concatenate(bars)
    made.visual.vertex_colors = (*_COLOURS[n % len(_COLOURS)], 255)
    made.apply_transform(scene.poses[n])
    return made
