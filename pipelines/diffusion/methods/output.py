"""Regions at the output: every region predicts the whole picture on its own, and masks blend the predictions.

    eps = share_0 eps_0 + sum_i share_i eps_i,      share_i = m_i / max(1, sum_j m_j),  share_0 = 1 - sum_i share_i

eps_i is the denoiser with the adapters, prompt and negative prompt of region i (and the adapters of no region), eps_0
that of the background; m_i is the mask of region i on the latents. ComfyUI's masked conditioning with LoRA hooks
computes the same, one pass per region; here the N + 1 predictions are one batch. It is exact where masks do not
overlap, needs N + 1 predictions, and regions influence each other only through the latents.
"""

from __future__ import annotations

from adapters.catalogue import Method

METHOD = Method(
    name="output",
    title="Regions: blended predictions",
    summary="One prediction per region, blended by masks: works with every model and LoRA, one pass per region.",
    stage="compose",
    makes="picture",
    paper="",
    entry="pipelines.diffusion.regions.rows:apart",
    properties={"position": 22, "regions": "predictions"},
)
