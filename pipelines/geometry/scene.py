"""A reconstructed scene: pictures with cameras, depth and confidence, saved as one npz file.

Poses are camera-to-world in OpenCV's axes (x right, y down, z forward); :mod:`pipelines.geometry.exports` writes the
formats of other programs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adapters import files
from adapters.errors import InputError
from pipelines.geometry.alignment import Alignment
from pipelines.geometry.images import Affine, Photo

if TYPE_CHECKING:
    from pipelines.geometry.exports.written import Written
    from pipelines.geometry.pipeline import Calibration
    from pipelines.geometry.selection import Selection

Array = NDArray[Any]
TO_GL = np.diag([1.0, -1.0, -1.0, 1.0])
"""From OpenCV's axes to OpenGL's (x right, y up, z backward), and back."""


@dataclass(frozen=True)
class Record:
    """How a scene was made.

    Attributes:
        warnings: one sentence each.
        estimate: the expected cost, as text.
        pairs: number of ordered pairs given to the network.
        encodings: number of pictures that were encoded.
        loss: of the last step of the alignment; None without one.
        calibration: the adapter, if the network was calibrated to the scene.
    """

    warnings: tuple[str, ...] = ()
    estimate: str = ""
    pairs: int = 0
    encodings: int = 0
    loss: float | None = None
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Scene:
    """``N`` pictures with cameras, depth and confidence; every picture keeps its own size.

    Attributes:
        names: names of the pictures' files.
        affines: maps from the files' pixels to the network's.
        poses: ``(N, 4, 4)`` camera-to-world, in the scene's units.
        focals: ``(N,)`` in network pixels.
        images: uint8 ``(H, W, 3)`` each, in the network's size.
        depth, confidence: ``(H, W)`` each; confidence on the network's own scale (above 1), 0 = left out.
        record: how it was made; empty after :meth:`load`.
        files: the pictures' files; empty after :meth:`load`.
    """

    names: tuple[str, ...]
    affines: tuple[Affine, ...]
    poses: Array
    focals: Array
    images: tuple[Array, ...]
    depth: tuple[Array, ...]
    confidence: tuple[Array, ...]
    record: Record = field(default_factory=Record, compare=False, repr=False)
    files: tuple[Path | None, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, found: Alignment, photos: Sequence[Photo], record: Record | None = None) -> Scene:
        """The scene of an alignment and its pictures."""
        each = range(len(photos))
        return cls(
            tuple(p.name for p in photos), tuple(p.affine for p in photos), found.poses.double().numpy(),
            found.focals.double().numpy(),
            tuple((p.pixels.permute(1, 2, 0) * 255).round().byte().numpy() for p in photos),
            tuple(found.depth_map(n).numpy() for n in each), tuple(found.confidence_map(n).numpy() for n in each),
            record or Record(), tuple(p.file for p in photos),
        )  # fmt: skip

    def points(self, n: int) -> Array:
        """World points ``(H, W, 3)`` of picture ``n``."""
        height, width = self.depth[n].shape
        v, u = np.mgrid[:height, :width].astype(np.float64)
        own = np.stack([(u - width / 2) / self.focals[n], (v - height / 2) / self.focals[n], np.ones_like(u)], -1)
        return (own * self.depth[n][..., None]) @ self.poses[n][:3, :3].T + self.poses[n][:3, 3]

    def export(
        self, target: str | Path, kind: str = "", choice: Selection | None = None,
        originals: Sequence[str | Path | None] | None = None, **options: Any,
    ) -> Written:  # fmt: skip
        """Write the scene for other programs.

        Args:
            target: a file, or for "colmap" and "nerfstudio" a folder.
            kind: "glb", "ply", "npz", "colmap" or "nerfstudio"; by default the file's suffix.
            choice: which pixels; by default all but the least confident fifth.
            originals: for "colmap" and "nerfstudio", the pictures' files (default: :attr:`files`), which are exported
                upright; missing ones are replaced by the pictures in the network's size.
            options: for "glb", those of :func:`pipelines.geometry.exports.glb.write_glb` (``mesh``, ``cameras``,
                ``camera_size``).

        Raises:
            InputError: no such kind, no point left, or fewer than two pictures for "colmap" or "nerfstudio".
        """
        from pipelines.geometry import exports

        return exports.export(self, Path(target), kind, choice, originals, **options)

    def save(self, file: Path) -> Path:
        """Write everything but :attr:`record` and :attr:`files` as one npz (no pickles); returns ``file``."""
        values: dict[str, Any] = {
            "poses": self.poses, "focals": self.focals,
            "about": np.array(json.dumps({"names": self.names, "affines": [asdict(a) for a in self.affines]})),
        }  # fmt: skip
        for n in range(len(self.names)):
            values |= {f"image_{n}": self.images[n], f"depth_{n}": self.depth[n].astype(np.float32),
                       f"confidence_{n}": self.confidence[n].astype(np.float32)}  # fmt: skip
        with files.whole(file) as part, part.open("wb") as stream:  # a stream: numpy would append .npz to a name
            np.savez_compressed(stream, **values)
        return file

    @classmethod
    def load(cls, file: Path) -> Scene:
        """Read a scene written by :meth:`save`; raises :class:`InputError` for any other file."""
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
            raise InputError(f"'{file.name}' is not a reconstruction of this studio: {error}") from None
