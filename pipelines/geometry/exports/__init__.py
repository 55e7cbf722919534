"""Scenes in the formats of other programs, one file per format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.errors import InputError
from pipelines.geometry.exports.written import Written
from pipelines.geometry.scene import Scene
from pipelines.geometry.selection import Selection

FILES = ("glb", "ply", "npz")
FOLDERS = ("colmap", "nerfstudio")
KINDS = ("glb", "ply", "colmap", "nerfstudio", "npz")


def export(
    scene: Scene, target: Path, kind: str = "", choice: Selection | None = None,
    originals: Sequence[str | Path | None] | None = None, **options: Any,
) -> Written:  # fmt: skip
    """Write a scene; see :meth:`pipelines.geometry.scene.Scene.export`.

    Raises:
        InputError: no such kind, no point left, or fewer than two pictures for a kind with poses.
    """
    from pipelines.geometry.exports.colmap import write_colmap
    from pipelines.geometry.exports.glb import write_glb
    from pipelines.geometry.exports.nerfstudio import write_nerfstudio
    from pipelines.geometry.exports.ply import write_ply

    kind = kind or target.suffix.lower().lstrip(".")
    if kind not in KINDS:
        raise InputError(f"Unknown export '{kind}': use one of {', '.join(KINDS)}.")
    choice = choice or Selection()
    if kind == "glb":
        return write_glb(scene, target, choice, **options)
    if kind == "ply":
        return write_ply(scene, target, choice)
    if kind == "npz":
        return Written(scene.save(target), sum(mask.size for mask in scene.confidence))
    given = scene.files if originals is None else originals
    places = [Path(file) if file else None for file in given]
    return (write_colmap if kind == "colmap" else write_nerfstudio)(scene, target, choice, places)
