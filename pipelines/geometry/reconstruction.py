"""A finished scene as one file, and its exports: GLB, PLY, COLMAP, nerfstudio, npz.

Inside, cameras are camera-to-world in OpenCV's axes. GLB: three.js' axes, the first camera upright. transforms.json:
OpenGL cameras. COLMAP: world-to-camera quaternions and PINHOLE intrinsics in the pixels of the original file, whose
pixel centres lie at halves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from adapters import files
from adapters.errors import InputError
from pipelines.geometry.alignment import Alignment, clean
from pipelines.geometry.cameras import Similarity, matrix_quaternion
from pipelines.geometry.images import Affine, Photo

Array = NDArray[Any]
TO_GL = np.diag([1.0, -1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Reconstruction:
    """``N`` pictures with cameras, depth and confidence; every picture keeps its own size.

    Attributes:
        poses: ``(N, 4, 4)`` camera-to-world. focals: ``(N,)`` in network pixels.
        images: uint8 ``(H, W, 3)``; depth, confidence: ``(H, W)``.
    """

    names: tuple[str, ...]
    affines: tuple[Affine, ...]
    poses: Array
    focals: Array
    images: tuple[Array, ...]
    depth: tuple[Array, ...]
    confidence: tuple[Array, ...]

    @classmethod
    def of(cls, scene: Alignment, photos: Sequence[Photo]) -> Reconstruction:
        """From an alignment and its pictures."""
        each = range(len(photos))
        return cls(
            tuple(p.name for p in photos), tuple(p.affine for p in photos), scene.poses.double().numpy(),
            scene.focals.double().numpy(),
            tuple((p.pixels.permute(1, 2, 0) * 255).round().byte().numpy() for p in photos),
            tuple(scene.depth_map(n).numpy() for n in each), tuple(scene.confidence_map(n).numpy() for n in each),
        )  # fmt: skip

    def points(self, n: int) -> Array:
        """World points ``(H, W, 3)``."""
        height, width = self.depth[n].shape
        v, u = np.mgrid[:height, :width].astype(np.float64)
        own = np.stack([(u - width / 2) / self.focals[n], (v - height / 2) / self.focals[n], np.ones_like(u)], -1)
        return (own * self.depth[n][..., None]) @ self.poses[n][:3, :3].T + self.poses[n][:3, 3]

    def save(self, file: Path) -> Path:
        """Write everything as one npz (no pickles)."""
        values: dict[str, Any] = {
            "poses": self.poses, "focals": self.focals,
            "about": np.array(json.dumps({"names": self.names, "affines": [asdict(a) for a in self.affines]})),
        }  # fmt: skip
        for n in range(len(self.names)):
            values |= {f"image_{n}": self.images[n], f"depth_{n}": self.depth[n].astype(np.float32),
                       f"confidence_{n}": self.confidence[n].astype(np.float32)}  # fmt: skip
        with files.whole(file) as part, part.open("wb") as stream:  # a stream: numpy would add an ending to a name
            np.savez_compressed(stream, **values)
        return file

    @classmethod
    def load(cls, file: Path) -> Reconstruction:
        """Read it back. Raises :class:`InputError` for anything else."""
        try:
            with np.load(file, allow_pickle=False) as kept:
                about = json.loads(str(kept["about"]))
                each = range(len(about["names"]))
                affines = tuple(Affine(tuple(a["scale"]), tuple(a["crop"]), tuple(a["size"])) for a in about["affines"])
                return cls(
                    tuple(about["names"]), affines, kept["poses"], kept["focals"],
                    tuple(kept[f"image_{n}"] for n in each), tuple(kept[f"depth_{n}"] for n in each),
                    tuple(kept[f"confidence_{n}"] for n in each),
                )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"'{file.name}' is no reconstruction of this studio: {error}") from None


@dataclass(frozen=True)
class Selection:
    """Which pixels are shown or written.

    Attributes:
        confidence: least raw confidence (the network's own scale, always above 1).
        percentile: drop this share of the least confident pixels too, in per cent.
        frame: one picture's number, or None for all.
        hide: background to leave out, judged by colour.
        clean: leave out points that would hide what another, surer picture sees.
        limit: most points; a random but fixed choice.

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
            raise InputError("The percentile must lie between 0 and 100 and the number of points be 1 or more.")


def masks(scene: Reconstruction, choice: Selection) -> list[Array]:
    """Chosen pixels ``(H, W)`` of every picture."""
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


def cleaned(scene: Reconstruction) -> Reconstruction:
    """The scene without the confidence of what :func:`pipelines.geometry.alignment.clean` takes for wrong."""
    room = max(depth.size for depth in scene.depth)

    def flat(maps: Sequence[Array]) -> Tensor:
        return torch.stack([F.pad(torch.from_numpy(m.ravel()).float(), (0, room - m.size)) for m in maps])

    sizes = tuple((depth.shape[0], depth.shape[1]) for depth in scene.depth)
    none = torch.zeros(2, 0, room)
    still = Similarity(torch.ones(0), torch.zeros(0, 3, 3), torch.zeros(0, 3))
    aligned = clean(
        Alignment(sizes, torch.from_numpy(scene.poses).float(), torch.from_numpy(scene.focals).float(),
                  flat(scene.depth), flat(scene.confidence), none, none, still)
    )  # fmt: skip
    return replace(scene, confidence=tuple(aligned.confidence_map(n).numpy() for n in range(len(sizes))))


def sky(image: Array) -> Array:
    """Pixels ``(H, W)`` of the sky: bright blue, or nearly white, and joined to the upper edge."""
    import cv2

    hue, saturation, value = (channel.astype(int) for channel in cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV)))
    blue = (hue >= 90) & (hue <= 130) & (saturation >= 30) & (value >= 120)  # hue counts half degrees
    pale = (saturation <= 25) & (value >= 230)
    _, regions = cv2.connectedComponents((blue | pale).astype(np.uint8))
    above = np.setdiff1d(regions[0], [0])
    return np.isin(regions, above)


def cloud(scene: Reconstruction, choice: Selection) -> tuple[Array, Array, Array]:
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


def _nothing_left(what: str, scene: Reconstruction, choice: Selection) -> str:
    least, most = min(float(c.min()) for c in scene.confidence), max(float(c.max()) for c in scene.confidence)
    return (
        f"No {what} is left at a confidence of {choice.confidence:g} or more: in this scene it lies between "
        f"{least:.3g} and {most:.3g}. Lower the confidence threshold, or hide less."
    )


def triangles(scene: Reconstruction, choice: Selection, tear: float = 0.05) -> tuple[Array, Array, Array]:
    """Vertices, colours and faces ``(F, 3)``: neighbouring pixels joined unless depth jumps by more than ``tear``."""
    vertices, colours, faces, base = [], [], [], 0
    for n, mask in enumerate(masks(scene, choice)):
        height, width = mask.shape
        index = np.arange(height * width).reshape(height, width)
        a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]
        quads = np.stack([a, c, b, b, c, d], -1).reshape(-1, 3)
        depth, kept = scene.depth[n].ravel(), mask.ravel()
        corner = depth[quads]
        good = kept[quads].all(1) & (np.ptp(corner, axis=1) < tear * corner.mean(1))
        vertices.append(scene.points(n).reshape(-1, 3))
        colours.append(scene.images[n].reshape(-1, 3))
        faces.append(quads[good] + base)
        base += height * width
    joined = np.concatenate(faces)
    if len(joined) == 0:
        raise InputError(_nothing_left("surface", scene, choice))
    return np.concatenate(vertices), np.concatenate(colours), joined


# ------------------------------------------------------------------------------------------------ exports


def write_glb(
    scene: Reconstruction, file: Path, choice: Selection | None = None, mesh: bool = False, cameras: bool = True,
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


def _pyramid(scene: Reconstruction, n: int, size: float) -> Any:
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


def write_ply(scene: Reconstruction, file: Path, choice: Selection | None = None) -> int:
    """Write a binary PLY with x y z, red green blue and confidence; returns the number of points."""
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
    return len(rows)


def _intrinsics(scene: Reconstruction, n: int) -> tuple[float, float, float, float, int, int]:
    height, width = scene.depth[n].shape
    affine = scene.affines[n]
    whole = affine.size if affine.size != (0, 0) else (width, height)
    return (*affine.intrinsics(float(scene.focals[n]), height, width), *whole)


def _check_cameras(scene: Reconstruction) -> None:
    if len(scene.names) < 2:
        raise InputError(
            "A file of cameras needs two pictures or more: one picture has no pose. Choose glb, ply or npz."
        )
    twice = next((name for name in scene.names if scene.names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"Two pictures are named '{twice}', and this format tells them apart by name: rename one.")


def write_colmap(scene: Reconstruction, folder: Path, choice: Selection | None = None) -> Path:
    """Write ``cameras.txt``, ``images.txt`` and ``points3D.txt``.

    Raises:
        InputError: fewer than two pictures (then there are no poses), two of one name, or no point left.
    """
    _check_cameras(scene)
    cameras, images = ["# CAMERA_ID MODEL WIDTH HEIGHT fx fy cx cy"], ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME"]
    for n, name in enumerate(scene.names):
        fx, fy, cx, cy, width, height = _intrinsics(scene, n)
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


def write_nerfstudio(scene: Reconstruction, folder: Path, choice: Selection | None = None) -> Path:
    """Write ``transforms.json`` (OpenGL cameras, intrinsics of the original files) and ``sparse_pc.ply``.

    Raises:
        InputError: as :func:`write_colmap`.
    """
    _check_cameras(scene)
    frames = []
    for n, name in enumerate(scene.names):
        fx, fy, cx, cy, width, height = _intrinsics(scene, n)
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


def depth_picture(depth: Tensor | Array) -> Array:
    """Depth or confidence as an uint8 ``(H, W, 3)`` picture: the 2nd to the 98th percentile from dark to light."""
    import cv2

    values = np.asarray(depth, np.float64)
    low, high = np.percentile(values, [2, 98])
    grey = ((values - low) / max(high - low, 1e-9)).clip(0, 1)
    return cv2.cvtColor(cv2.applyColorMap((grey * 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
