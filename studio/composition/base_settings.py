"""Measured best settings of bases; all others use the schema's defaults."""

from __future__ import annotations

from studio.composition.schema import ComposeConfig

MEASURED: dict[str, dict[str, float]] = {"tinymoji": {"guidance_scale": 4.0}, "tinydit": {"guidance_scale": 3.0}}
"""Base -> settings (benchmarks/results/composition_quality.md; at guidance 5 fewer subjects are recognised). Z-Image,
whose format tinydit has, counts guidance from 0: 3 there is 4 elsewhere."""


def guidance(base: str) -> float:
    """Initial guidance for a base."""
    usual = float(ComposeConfig.model_fields["guidance_scale"].default)
    return MEASURED.get(base, {}).get("guidance_scale", usual)
