"""Which pixels of a scene are shown or exported, and the points and surfaces made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.errors import InputError
from pipelines.geometry.alignment import Alignment
from pipelines.geometry.alignment import clean as without_hiding
from pipelines.geometry.cameras import Similarity
from pipelines.geometry.scene import Array, Scene

CONNECTED = 0.9
"""Surfaces suit a scene if at least this share of the chosen pixels is on one."""


@dataclass(frozen=True)
class Selection:
    """Which pixels are shown or exported.

    Attributes:
        confidence: least raw confidence (the network's own scale, always above 1).
        percentile: also drop this share of the least confident pixels, in per cent.
        frame: number of one picture; None = all.
        hide: background to leave out, recognised by colour.
        limit: most points, a fixed random choice.
        clean: leave out points that would hide what another picture sees with more confidence.

    Raises:
        InputError: a percentile outside [0, 100) or a limit below 1.
    """

    confidence: float = 1.0
    percentile: float = 20.0
    frame: int | None = None
    hide: Literal["nothing", "black", "white", "sky"] = "nothing"
    limit: int = 500_000
    clean: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.percentile < 100 or self.limit < 1:
            raise InputError("The percentile must be between 0 and 100 and the number of points at least 1.")


def masks(scene: Scene, choice: Selection) -> list[Array]:
    """Masks ``(H, W)`` of the chosen pixels, one per picture."""
    everything = np.concatenate([c.ravel() for c in scene.confidence])
    least = max(choice.confidence, float(np.percentile(everything, choice.percentile)))
    out = []
    for n, confidence in enumerate(cleaned(scene).confidence if choice.clean else scene.confidence):
        mask = (confidence >= least) & (confidence > 0) & np.isfinite(scene.depth[n])
        if choice.frame is not None and choice.frame != n:
            mask = np.zeros_like(mask)
        if choice.hide == "black":
            mask &= scene.images[n].astype(int).sum(-1) >= 24
        elif choice.hide == "white":
            mask &= scene.images[n].min(-1) <= 240
        elif choice.hide == "sky":
            mask &= ~sky(scene.images[n])
        out.append(mask)
    return out


def cleaned(scene: Scene) -> Scene:
    """The scene with confidence 0 for points that :func:`pipelines.geometry.alignment.clean` takes to be wrong."""
    room = max(depth.size for depth in scene.depth)

    def flat(maps: Sequence[Array]) -> Tensor:
        return torch.stack([F.pad(torch.from_numpy(m.ravel()).float(), (0, room - m.size)) for m in maps])

    sizes = tuple((depth.shape[0], depth.shape[1]) for depth in scene.depth)
    none = torch.zeros(2, 0, room)
    still = Similarity(torch.ones(0), torch.zeros(0, 3, 3), torch.zeros(0, 3))
    aligned = without_hiding(
        Alignment(sizes, torch.from_numpy(scene.poses).float(), torch.from_numpy(scene.focals).float(),
                  flat(scene.depth), flat(scene.confidence), none, none, still)
    )  # fmt: skip
    return replace(scene, confidence=tuple(aligned.confidence_map(n).numpy() for n in range(len(sizes))))


def sky(image: Array) -> Array:
    """Mask ``(H, W)`` of the sky: bright blue or nearly white pixels connected to the upper edge."""
    import cv2

    hue, saturation, value = (channel.astype(int) for channel in cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV)))
    blue = (hue >= 90) & (hue <= 130) & (saturation >= 30) & (value >= 120)  # hue in half degrees
    pale = (saturation <= 25) & (value >= 230)
    _, regions = cv2.connectedComponents((blue | pale).astype(np.uint8))
    above = np.setdiff1d(regions[0], [0])
    return np.isin(regions, above)


def cloud(scene: Scene, choice: Selection) -> tuple[Array, Array, Array]:
    """Chosen points ``(M, 3)``, colours uint8 ``(M, 3)`` and confidences ``(M,)``.

    Raises:
        InputError: nothing is left.
    """
    chosen = masks(scene, choice)
    points = np.concatenate([scene.points(n)[mask] for n, mask in enumerate(chosen)])
    colours = np.concatenate([scene.images[n][mask] for n, mask in enumerate(chosen)])
    confidence = np.concatenate([scene.confidence[n][mask] for n, mask in enumerate(chosen)])
    if len(points) == 0:
        raise InputError(_nothing_left("point", scene, choice))
    if len(points) > choice.limit:
        kept = np.sort(np.random.default_rng(0).choice(len(points), choice.limit, replace=False))
        points, colours, confidence = points[kept], colours[kept], confidence[kept]
    return points, colours, confidence


def _nothing_left(what: str, scene: Scene, choice: Selection) -> str:
    least, most = min(float(c.min()) for c in scene.confidence), max(float(c.max()) for c in scene.confidence)
    return (
        f"No {what} is left at a confidence of {choice.confidence:g} or more: in this scene it is between "
        f"{least:.3g} and {most:.3g}. Lower the confidence threshold, or hide less."
    )


def triangles(scene: Scene, choice: Selection, tear: float = 0.05) -> tuple[Array, Array, Array]:
    """Vertices ``(V, 3)``, colours uint8 ``(V, 3)`` and faces ``(F, 3)`` of neighbouring pixels.

    Pixels whose depth differs by a share of more than ``tear`` are not joined. With more pixels than ``choice.limit``,
    only every second, third ... row and column is used.

    Raises:
        InputError: nothing is left.
    """
    vertices, colours, faces, base = [], [], [], 0
    chosen = masks(scene, choice)
    step = stride(chosen, choice.limit)
    for n, mask in enumerate(chosen):
        mask, depth, points = mask[::step, ::step], scene.depth[n][::step, ::step], scene.points(n)[::step, ::step]
        height, width = mask.shape
        index = np.arange(height * width).reshape(height, width)
        a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]
        quads = np.stack([a, c, b, b, c, d], -1).reshape(-1, 3)
        corner = depth.ravel()[quads]
        good = mask.ravel()[quads].all(1) & (np.ptp(corner, axis=1) < tear * step * corner.mean(1))
        vertices.append(points.reshape(-1, 3))
        colours.append(scene.images[n][::step, ::step].reshape(-1, 3))
        faces.append(quads[good] + base)
        base += height * width
    joined = np.concatenate(faces)
    if len(joined) == 0:
        raise InputError(_nothing_left("surface", scene, choice))
    return np.concatenate(vertices), np.concatenate(colours), joined


def stride(chosen: Sequence[Array], limit: int) -> int:
    """Step between the rows and columns used, so that at most about ``limit`` of the chosen pixels are left."""
    return max(1, int(np.ceil(np.sqrt(sum(int(mask.sum()) for mask in chosen) / limit))))


def surfaces_suit(scene: Scene, choice: Selection) -> bool:
    """Whether surfaces show a scene well: most chosen pixels are on one, so that there are few holes and fragments."""
    chosen = masks(scene, choice)
    step = stride(chosen, choice.limit)
    kept = sum(int(mask[::step, ::step].sum()) for mask in chosen)
    try:
        faces = triangles(scene, choice)[2]
    except InputError:
        return False
    return len(np.unique(faces)) >= CONNECTED * kept


def squares(scene: Scene, choice: Selection) -> tuple[Array, Array, Array]:
    """Every chosen point as a square of its pixel's size that faces its camera: vertices, colours and faces.

    With fewer points than pixels (``choice.limit``) the squares are larger, so that they still cover the surfaces.

    Raises:
        InputError: nothing is left.
    """
    chosen = masks(scene, choice)
    count = sum(int(mask.sum()) for mask in chosen)
    if count == 0:
        raise InputError(_nothing_left("point", scene, choice))
    random, share = np.random.default_rng(0), min(1.0, choice.limit / count)
    half = 0.5 / np.sqrt(share)
    corners, colours = [], []
    for n, mask in enumerate(chosen):
        v, u = np.nonzero(mask & (random.random(mask.shape) < share) if share < 1 else mask)
        height, width = mask.shape
        around = np.array([[-half, -half], [half, -half], [half, half], [-half, half]])
        place = np.stack([u - width / 2, v - height / 2], -1)[:, None] + around
        own = np.concatenate([place / scene.focals[n], np.ones((*place.shape[:2], 1))], -1)
        own = own * scene.depth[n][v, u][:, None, None]
        corners.append((own @ scene.poses[n][:3, :3].T + scene.poses[n][:3, 3]).reshape(-1, 3))
        colours.append(np.repeat(scene.images[n][v, u], 4, 0))
    vertices = np.concatenate(corners)
    first = np.arange(0, len(vertices), 4)[:, None, None]
    faces = (first + np.array([[0, 3, 1], [1, 3, 2]])).reshape(-1, 3)
    return vertices, np.concatenate(colours), faces
