"""Regions: adapters that act in a part of the picture. Masks, composition inside the network, LoRA-Composer's parts."""

from pipelines.diffusion.regions.region import PlacedRegion, Region, RegionOptions

__all__ = ["PlacedRegion", "Region", "RegionOptions"]
