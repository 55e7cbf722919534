"""The reconstruction job: pictures of a scene become cameras and a point cloud, optionally after self-calibration."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from studio.schema import JobConfig

_PICTURES = {"group": "Pictures", "advanced": False}
_MODEL = {"group": "Model", "advanced": False}
_ALIGN = {"group": "Alignment", "advanced": True}
_CALIBRATE = {"group": "Calibrate to this scene", "advanced": True}
_OUTPUT = {"group": "Output", "advanced": True}

ADAPTER = "adapter"
"""Name of the adapter of a calibrating reconstruction."""


def _f(default: Any, group: dict[str, Any], description: str, **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra=group, **limits)


class ReconstructConfig(JobConfig):
    """Photos in, 3D out."""

    kind: ClassVar[str] = "reconstruct"

    images: list[str] = _f([], _PICTURES, "Pictures of one scene, or one video.")
    seconds_per_frame: float = _f(1.0, _PICTURES, "Video: seconds between frames.", gt=0)
    name: str = _f("scene", _PICTURES, "Name of the scene.", min_length=1, max_length=80)

    model: str = _f("dust3r-tiny", _MODEL, "Weights: dust3r-tiny, a .pth file, a folder or a hub id.")
    size: int | None = _f(None, _MODEL, "Longer side in pixels; empty = the model's own.", ge=16, le=4096)
    adapter: str = _f("", _MODEL, "Folder of an adapter from an earlier calibration.")
    device: str = _f("auto", _MODEL, "auto, cpu, cuda, cuda:1 ...")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = _f("auto", _MODEL, "Precision of the trunk; heads stay in fp32.")
    accept_licence: bool = _f(
        False, _MODEL, "I have read the licence of the weights (the public ones are non-commercial)."
    )

    graph: str = _f("complete", _ALIGN, "Pairs: complete, swin-3, logwin-2, oneref-0.")
    many: bool = _f(False, _ALIGN, "Allow a complete graph over more than 30 pictures.")
    verify: bool = _f(
        True, _ALIGN, "Three pictures or more: leave out pairs that differ in colour where their points meet."
    )
    steps: int = _f(300, _ALIGN, "Steps of the alignment.", ge=1, le=10000)
    schedule: Literal["cosine", "linear"] = _f("cosine", _ALIGN, "How the learning rate falls.")
    chunk: int = _f(8, _ALIGN, "Pairs decoded together; fewer need less memory.", ge=1, le=256)

    calibrate: bool = _f(False, _CALIBRATE, "First train an adapter on this scene (LoRA3D); three pictures or more.")
    also: list[str] = _f([], _CALIBRATE, "Folders of more scenes for the same adapter to learn from.")
    rank: int = _f(16, _CALIBRATE, "Rank of the adapter.", ge=1, le=1024)
    preset: Literal["paper-18mb", "all-attention"] = _f("paper-18mb", _CALIBRATE, "Which layers are adapted.")
    epochs: int = _f(10, _CALIBRATE, "Passes over all pairs.", ge=1, le=1000)
    lr: float = _f(1e-3, _CALIBRATE, "Learning rate at the start.", gt=0)
    mu: float = _f(0.03, _CALIBRATE, "Residual (scene units) at which a point keeps a quarter of its weight.", gt=0)
    cutoff: float = _f(1.5, _CALIBRATE, "Calibrated confidence above which a point becomes a label.", gt=0)
    share: bool = _f(
        True, _CALIBRATE, "A point that one pair confirms is a label in every pair; off: only where confirmed (paper)."
    )
    seed: int = _f(0, _CALIBRATE, "Seed of the adapter.", ge=0)

    confidence: float = _f(1.0, _OUTPUT, "Minimum confidence of a point (the network's scale, 1 and up).", ge=0)
    percentile: float = _f(20.0, _OUTPUT, "Percentage of the least confident points to leave out.", ge=0, lt=100)
    mesh: bool | None = _f(None, _OUTPUT, "Surfaces instead of points; default: if they suit the scene.")
    cameras: bool = _f(True, _OUTPUT, "Show the cameras.")
    max_points: int = _f(500_000, _OUTPUT, "Maximum number of points in a file.", ge=1)
