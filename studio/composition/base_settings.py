"""Settings with which a base draws best, where that was measured; the schema's defaults hold for all others."""

from __future__ import annotations

from studio.composition.schema import ComposeConfig

MEASURED: dict[str, dict[str, float]] = {"tinymoji": {"guidance_scale": 4.0}}
"""Base -> settings (benchmarks/results/composition_quality.md; at guidance 5 fewer subjects are recognised)."""


def guidance(base: str) -> float:
    """Guidance to begin with for a base."""
    usual = float(ComposeConfig.model_fields["guidance_scale"].default)
    return MEASURED.get(base, {}).get("guidance_scale", usual)
