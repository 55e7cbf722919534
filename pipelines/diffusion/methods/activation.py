"""Regions inside the network: each adapter's update is added only to the activations of its own region.

    y = W0 x + sum_i share_i(cell) g_i s_i B_i A_i x        for every layer on image tokens (cells), in one pass

with shares as in :mod:`pipelines.diffusion.regions.masks`, resized to each layer's grid. Text tokens have no place in
the picture. In a UNet each region therefore has its own keys and values in cross-attention, from its own prompt with
its own adapters (as in LoRA-Composer, arXiv 2403.11627). In transformers the prompts of all regions are concatenated in
the text sequence; an adapter acts on its own segment, and segment and region attend to each other and to no other
region's segment. Layers without any place (time embedding) get the adapter at the region's share of the picture, but
the time vector of a UNet's residual blocks is masked where it is added to the picture.

``lora-composer`` with ``scope="spatial"`` and self_mask, reinit and refine off is the same with hard edges ("injection
only" in the benchmark).
"""

from __future__ import annotations

from adapters.catalogue import Method

METHOD = Method(
    name="activation",
    title="Regions: masked adapters",
    summary="All regions in one pass, each adapter masked to its region in every layer: fast, for every LoRA.",
    stage="compose",
    makes="picture",
    paper="",
    entry="pipelines.diffusion.regions.rows:together",
    properties={"position": 3, "regions": "network"},
)
