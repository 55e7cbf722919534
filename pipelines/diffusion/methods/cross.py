"""Regions in cross-attention: LoRA-Composer's concept injection without its other parts.

"LoRA-Composer: Leveraging Low-Rank Adaptation for Multi-Concept Customization in Training-Free Diffusion Models"
(arXiv 2403.11627), region-aware LoRA injection; in every cross-attention layer, with Q from the base model,

    O_0 = to_out( attn(Q, K(E_0), V(E_0)) )                                    the prompt, where no region is
    O_i = (to_out + s B_o A_o)( attn(Q[region i], (W_k + s B_k A_k) E_i, (W_v + s B_v A_v) E_i) )

with E_i the prompt of region i, encoded with its adapters. Overlaps are averaged. Only an adapter's
attn2.{to_k, to_v, to_out} and its text encoder layers are used.
"""

from __future__ import annotations

from adapters.catalogue import Method

METHOD = Method(
    name="cross",
    title="Regions: cross-attention",
    summary="Each region attends to its own prompt through its adapter's cross-attention: fast, for LoRAs on attn2 of "
    "UNets.",
    stage="compose",
    makes="picture",
    paper="LoRA-Composer, arXiv 2403.11627 (only concept injection)",
    entry="pipelines.diffusion.regions.rows:together",
    properties={"position": 20, "regions": "network", "transformers": False, "scope": "cross", "hard": True},
)
