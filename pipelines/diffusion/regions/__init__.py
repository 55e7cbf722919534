"""Adapters with a place of their own in the picture: masks, the levels at which they act, LoRA-Composer's parts."""

from pipelines.diffusion.regions.region import PlacedRegion, Region, RegionOptions

__all__ = ["PlacedRegion", "Region", "RegionOptions"]
