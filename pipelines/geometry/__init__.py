"""3D from photos: pointmap network, alignment, self-calibration and exports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.geometry.pipeline import ScenePipeline
    from pipelines.geometry.scene import Scene

__all__ = ["Scene", "ScenePipeline"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that :mod:`pipelines.geometry.licence` does not load torch."""
    if name == "ScenePipeline":
        from pipelines.geometry.pipeline import ScenePipeline

        return ScenePipeline
    if name == "Scene":
        from pipelines.geometry.scene import Scene

        return Scene
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
