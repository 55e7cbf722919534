"""GLB for three.js, Blender and similar programs: points or surfaces, and the cameras with their photos.

Axes: x right, y up, z backward of the first camera, which is at the origin (glTF's axes). Units are the scene's.
Colours of points and surfaces are linear, as the standard requires.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.geometry.exports.gltf import Document
from pipelines.geometry.exports.written import Written
from pipelines.geometry.scene import TO_GL, Array, Scene
from pipelines.geometry.selection import Selection, cloud, surfaces_suit, triangles

_COLOURS = ((230, 85, 60), (60, 130, 230), (60, 170, 90), (235, 170, 40), (150, 90, 200), (40, 175, 185))
_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 0), (4, 1), (4, 2), (4, 3))
_BAR = np.array([[0, 1, 2], [2, 1, 3], [4, 6, 5], [5, 6, 7], [0, 4, 1], [1, 4, 5], [2, 3, 6], [6, 3, 7], [0, 2, 4],
                 [4, 2, 6], [1, 5, 3], [3, 5, 7]])  # fmt: skip
"""Triangles of a bar whose corners are numbered by (end, side, side) in binary."""


def write_glb(
    scene: Scene, file: Path, choice: Selection | None = None, mesh: bool | None = None, cameras: bool = True,
    camera_size: float = 5.0,
) -> Written:  # fmt: skip
    """Write a scene as one GLB.

    Args:
        choice: which pixels; by default all but the least confident fifth.
        mesh: surfaces instead of points; None = if they suit the scene.
        cameras: add the cameras as pyramids with their photos.
        camera_size: height of these pyramids, in per cent of the scene's size.

    Raises:
        InputError: no point or surface is left.
    """
    choice = choice or Selection()
    upright = TO_GL @ np.linalg.inv(scene.poses[0])
    document = Document()
    if surfaces_suit(scene, choice) if mesh is None else mesh:
        vertices, colours, faces = triangles(scene, choice)
        points = vertices[np.unique(faces)]
        document.add_surface("surface", moved(vertices, upright), colours, faces)
    else:
        points, colours, _ = cloud(scene, choice)
        document.add_points("points", moved(points, upright), colours)
    if cameras:
        add_cameras(document, scene, upright, extent(points) * camera_size / 100)
    document.write(file)
    return Written(file, len(points))


def extent(points: Array) -> float:
    """Size of a scene: the distance between the 10th and the 90th percentile of its points."""
    return float(np.linalg.norm(np.percentile(points, 90, 0) - np.percentile(points, 10, 0)))


def moved(points: Array, move: Array) -> Array:
    """Points ``(..., 3)`` transformed by a matrix ``(4, 4)``."""
    return points @ move[:3, :3].T + move[:3, 3]


def add_cameras(document: Document, scene: Scene, move: Array, size: float) -> Array:
    """Add every camera as a pyramid of bars around its photo; returns all their corners ``(N * 5, 3)``."""
    corners = [moved(pyramid(scene, n, size), move) for n in range(len(scene.names))]
    for n, (name, own) in enumerate(zip(scene.names, corners, strict=True)):
        bars = [bar(own[a], own[b], 0.03 * size * _scale(move)) for a, b in _EDGES]
        vertices = np.concatenate(bars)
        faces = np.concatenate([_BAR + 8 * k for k in range(len(bars))])
        colours = np.tile(np.array(_COLOURS[n % len(_COLOURS)], np.uint8), (len(vertices), 1))
        document.add_surface(f"camera {n}", vertices, colours, faces)
        document.add_picture(name, own[:4], scene.images[n])
    return np.concatenate(corners)


def pyramid(scene: Scene, n: int, size: float) -> Array:
    """A camera's pyramid ``(5, 3)`` in the world: its picture's corners, clockwise from the upper left; its centre."""
    height, width = scene.depth[n].shape
    x, y = width / 2 / scene.focals[n] * size, height / 2 / scene.focals[n] * size
    return moved(np.array([[-x, -y, size], [x, -y, size], [x, y, size], [-x, y, size], [0, 0, 0]]), scene.poses[n])


def bar(start: Array, end: Array, width: float) -> Array:
    """The eight corners ``(8, 3)`` of a thin bar between two points."""
    along = end - start
    side = np.cross(along, np.eye(3)[np.abs(along).argmin()])
    side *= width / max(float(np.linalg.norm(side)), 1e-12)
    other = np.cross(along, side)
    other *= width / max(float(np.linalg.norm(other)), 1e-12)
    return np.array([p + i * side + j * other for p in (start, end) for i in (-1, 1) for j in (-1, 1)])


def _scale(move: Array) -> float:
    return float(np.linalg.norm(move[:3, 0]))
