"""Regions in cross-attention: LoRA-Composer's concept injection without its other parts.

"LoRA-Composer: Leveraging Low-Rank Adaptation for Multi-Concept Customization in Training-Free Diffusion Models"
(arXiv 2403.11627), region-aware LoRA injection; in every cross-attention layer, with Q from the base model,

    O_0 = to_out( attn(Q, K(E_0), V(E_0)) )                                    the prompt, where no region is
    O_i = (to_out + s B_o A_o)( attn(Q[region i], (W_k + s B_k A_k) E_i, (W_v + s B_v A_v) E_i) )

E_i the prompt of region i from the text encoder with its adapters. Overlaps are averaged. Of an adapter only
attn2.{to_k, to_v, to_out} and its text encoder part are used.
"""

from __future__ import annotations

from adapters.catalogue import Method

METHOD = Method(
    name="cross",
    title="Regions: cross-attention",
    summary="Each region reads its own prompt through its adapter's cross-attention: fast, for attn2 LoRAs on UNets.",
    stage="compose",
    makes="picture",
    paper="LoRA-Composer, arXiv 2403.11627 (concept injection alone)",
    entry="pipelines.diffusion.regions.rows:together",
    properties={"position": 20, "regions": "network", "transformers": False, "scope": "cross", "hard": True},
)
