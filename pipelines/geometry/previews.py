"""Previews of a scene: depth and confidence in colours, a file for viewers in a browser, and a flight around it.

The viewer's file is rotated and scaled so that one viewpoint suits every scene: seen from :data:`VIEW_DISTANCE` in
front of its centre (in the direction +z, a little from above), the scene fills the frame. Points far outside are left
out, and points are drawn as squares of their pixels' size, since browsers draw plain points one pixel wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from adapters import files
from pipelines.geometry.exports.glb import add_cameras, extent, moved
from pipelines.geometry.exports.gltf import Document
from pipelines.geometry.exports.written import Written
from pipelines.geometry.scene import Array, Scene
from pipelines.geometry.selection import Selection, masks, squares, surfaces_suit, triangles

VIEW_DISTANCE = 5.0
VIEW_ABOVE = 8.0
"""Degrees from above."""
HALF_FRAME = np.array([0.55, 0.42])
"""Half the width and height of the frame at distance 1."""
INSIDE = 85
"""Per cent of the points inside the frame; the rest, mostly outliers, may be outside."""
MOST_SQUARES, MOST_VERTICES = 80_000, 250_000
"""Limits that a browser draws without delay."""
BACKGROUND = 237
VIEWPOINTS, PAUSE, SWING = 15, 120, 25.0
"""Of the flight: viewpoints from left to right, milliseconds at each, and degrees to either side."""


def depth_picture(depth: Tensor | Array) -> Array:
    """Depth or confidence ``(H, W)`` as uint8 ``(H, W, 3)``: the 2nd to the 98th percentile from dark to light."""
    import cv2

    values = np.asarray(depth, np.float64)
    low, high = np.percentile(values, [2, 98])
    grey = ((values - low) / max(high - low, 1e-9)).clip(0, 1)
    return cv2.cvtColor(cv2.applyColorMap((grey * 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def facing(scene: Scene) -> Array:
    """Rotation ``(3, 3)`` from the world to axes x right, y up, z backward of the cameras' mean direction."""
    forward, down = scene.poses[:, :3, 2].mean(0), scene.poses[:, :3, 1].mean(0)
    if np.linalg.norm(forward) < 0.3:  # cameras all around: use the first one
        forward, down = scene.poses[0, :3, 2], scene.poses[0, :3, 1]
    back = -forward / np.linalg.norm(forward)
    up = -down - (-down @ back) * back
    up /= np.linalg.norm(up)
    return np.stack([np.cross(up, back), up, back])


def box(points: Array) -> tuple[Array, Array]:
    """Least and greatest corner ``(3,)`` of the box shown: the central 98 % along each axis, and a tenth more."""
    low, high = np.percentile(points, [1, 99], axis=0)
    return low - 0.1 * (high - low), high + 0.1 * (high - low)


def within(vertices: Array, faces: Array, low: Array, high: Array) -> Array:
    """Faces whose corners are all inside a box; all faces if there are none."""
    inside = np.all((vertices >= low) & (vertices <= high), axis=1)
    kept = faces[inside[faces].all(1)]
    return kept if len(kept) else faces


def skin(scene: Scene, choice: Selection, mesh: bool | None = None) -> tuple[Array, Array, Array]:
    """Vertices, colours and faces: surfaces if ``mesh``, else points as squares; None = what suits the scene."""
    fewer = replace(choice, limit=min(choice.limit, MOST_VERTICES))
    if surfaces_suit(scene, fewer) if mesh is None else mesh:
        return triangles(scene, fewer)
    return squares(scene, replace(choice, limit=min(choice.limit, MOST_SQUARES)))


def distance(points: Array) -> float:
    """Distance in front of the origin at which the frame contains :data:`INSIDE` % of the points ``(M, 3)``."""
    return float(np.percentile((np.abs(points[:, :2]) / HALF_FRAME).max(1) + points[:, 2], INSIDE))


def tilted(points: Array, degrees: float = VIEW_ABOVE, turn: float = 0.0) -> Array:
    """Points ``(..., 3)`` as seen from ``degrees`` above and ``turn`` degrees to the right."""
    a, b = np.radians(degrees), np.radians(turn)
    above = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    aside = np.array([[np.cos(b), 0, -np.sin(b)], [0, 1, 0], [np.sin(b), 0, np.cos(b)]])
    return points @ (above @ aside).T


def write_view(
    scene: Scene, file: Path, choice: Selection | None = None, mesh: bool | None = None, cameras: bool = True,
    camera_size: float = 5.0,
) -> Written:  # fmt: skip
    """Write the viewer's GLB; arguments as of :func:`pipelines.geometry.exports.glb.write_glb`."""
    choice = choice or Selection()
    turn = np.eye(4)
    turn[:3, :3] = facing(scene)
    count = min(sum(int(mask.sum()) for mask in masks(scene, choice)), choice.limit)
    vertices, colours, faces = skin(scene, choice, mesh)
    vertices = moved(vertices, turn)
    shown = vertices[np.unique(faces)]
    size = extent(shown) * camera_size / 100
    faces = within(vertices, faces, *box(shown))
    shown = vertices[np.unique(faces)]
    corners = add_cameras(Document(), scene, turn, size) if cameras else shown
    # Viewers look at the centre of everything in the file.
    middle = (np.minimum(shown.min(0), corners.min(0)) + np.maximum(shown.max(0), corners.max(0))) / 2
    scale = VIEW_DISTANCE / max(distance(tilted(shown - middle)), 1e-9)
    place = np.eye(4)
    place[:3, :3], place[:3, 3] = scale * np.eye(3), -scale * middle
    document = Document()
    document.add_surface("scene", moved(vertices, place), colours, faces, two_sided=False)
    if cameras:
        add_cameras(document, scene, place @ turn, size)
    document.write(file)
    return Written(file, count)


# ------------------------------------------------------------------------------------------------ the flight


def write_flight(
    scene: Scene, file: Path, choice: Selection | None = None, width: int = 320, height: int = 240
) -> Path:
    """Write an animated GIF in which the camera swings to either side of the scene and back; returns ``file``."""
    there = [Image.fromarray(frame) for frame in flight(scene, choice or Selection(), width, height)]
    frames = [*there, *there[-2:0:-1]]

    def save(part: Path) -> None:
        frames[0].save(part, "GIF", save_all=True, append_images=frames[1:], duration=PAUSE, loop=0)

    files.write(file, save)
    return file


def flight(scene: Scene, choice: Selection, width: int, height: int) -> Iterator[Array]:
    """Frames uint8 ``(height, width, 3)`` from the left to the right."""
    vertices, colours, faces = skin(scene, choice)
    vertices = vertices @ facing(scene).T
    low, high = box(vertices[np.unique(faces)])
    faces = within(vertices, faces, low, high)
    away = distance(tilted(vertices[np.unique(faces)] - (low + high) / 2))
    points, normals, shades = sampled(vertices - (low + high) / 2, colours, faces, 2 * width * height)
    for turn in SWING * np.sin(np.linspace(-np.pi / 2, np.pi / 2, VIEWPOINTS)):
        seen = tilted(points, VIEW_ABOVE, turn) - [0, 0, away]
        front = (tilted(normals, VIEW_ABOVE, turn) * seen).sum(1) < 0  # back faces are culled: walls do not hide rooms
        yield drawn(seen[front], shades[front], width, height)


def sampled(vertices: Array, colours: Array, faces: Array, count: int) -> tuple[Array, Array, Array]:
    """``count`` points sampled evenly over the surfaces, their normals and colours, interpolated from the corners."""
    random = np.random.default_rng(0)
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    normals = np.cross(b - a, c - a)
    area = np.linalg.norm(normals, axis=1)
    chosen = random.choice(len(faces), count, p=area / area.sum())
    first, second = np.sqrt(random.random(count)), random.random(count)
    weights = np.stack([1 - first, first * (1 - second), first * second])[..., None]
    points = weights[0] * a[chosen] + weights[1] * b[chosen] + weights[2] * c[chosen]
    shades = sum(weights[k] * colours[faces[chosen, k]] for k in range(3))
    return points, normals[chosen], np.rint(shades).astype(np.uint8)


def drawn(points: Array, colours: Array, width: int, height: int) -> Array:
    """A picture of points ``(M, 3)`` from the origin along -z, each a square of 2 x 2 pixels."""
    picture = np.full((height, width, 3), BACKGROUND, np.uint8)
    depth = -points[:, 2]
    focal = min(width / 2 / HALF_FRAME[0], height / 2 / HALF_FRAME[1])
    order = np.argsort(-depth, kind="stable")  # in each pixel the last and nearest one stays
    order = order[depth[order] > 0.02 * np.median(np.abs(depth))]
    u = np.floor(width / 2 + focal * points[order, 0] / depth[order] - 0.5).astype(int)
    v = np.floor(height / 2 - focal * points[order, 1] / depth[order] - 0.5).astype(int)
    nearest, rank = np.zeros((height, width), int), np.arange(1, len(order) + 1)
    for dy, dx in np.ndindex(2, 2):
        x, y = u + dx, v + dy
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        layer = np.zeros_like(nearest)
        layer[y[inside], x[inside]] = rank[inside]
        nearest = np.maximum(nearest, layer)
    picture[nearest > 0] = colours[order][nearest[nearest > 0] - 1]
    return picture
