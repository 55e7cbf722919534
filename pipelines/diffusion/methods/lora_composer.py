"""LoRA-Composer: several concepts in one picture, each in its own region, without training.

"LoRA-Composer: Leveraging Low-Rank Adaptation for Multi-Concept Customization in Training-Free Diffusion Models"
(arXiv 2403.11627): concept injection (:mod:`pipelines.diffusion.methods.cross`), concept isolation in self-attention
(``self_mask``), latent re-initialisation (``reinit``) and refinement by attention losses (``refine``: concept
enhancement with ``gaussian`` and ``fill_loss``, and ``region_loss``). Each part can be switched off. Our additions:
``scope="spatial"`` (all layers of an adapter, masked), masks of any shape, averaging of overlaps, SDXL, and a trust
region for the refinement.
"""

from __future__ import annotations

from adapters.catalogue import Method

METHOD = Method(
    name="lora-composer",
    title="LoRA-Composer",
    summary="Concepts isolated in their regions, started from suitable noise and corrected during sampling; for UNets.",
    stage="compose",
    makes="picture",
    paper="LoRA-Composer, arXiv 2403.11627",
    entry="pipelines.diffusion.regions.rows:together",
    properties={
        "position": 21, "regions": "network", "transformers": False, "scope": "cross", "any_scope": True, "parts": True,
        "hard": True,
    },
)  # fmt: skip
