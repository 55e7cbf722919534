"""Image generation with several adapters: model families, loading, the composition pipeline and its methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.diffusion.pipeline import MultiLoRAPipeline

__all__ = ["MultiLoRAPipeline"]


def __getattr__(name: str) -> Any:
    """Import the pipeline on first use, so that listing methods does not load model code."""
    if name == "MultiLoRAPipeline":
        from pipelines.diffusion.pipeline import MultiLoRAPipeline

        return MultiLoRAPipeline
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
