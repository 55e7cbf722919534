"""Regions at the output: every region predicts the whole picture on its own, and masks blend the predictions.

    eps = share_0 eps_0 + sum_i share_i eps_i,      share_i = m_i / max(1, sum_j m_j),  share_0 = 1 - sum_i share_i

eps_i is the denoiser with the adapters, prompt and negative prompt of region i (and those adapters that no region
names), eps_0 that of the background; m_i the mask of region i on the latents. This is what ComfyUI's masked
conditioning with LoRA hooks computes, one pass per region; here the N + 1 predictions are one batch. It is exact where
masks do not overlap, needs N + 1 predictions, and the regions see each other only through the picture itself.
"""

from __future__ import annotations

from adapters.catalogue import Method

METHOD = Method(
    name="output",
    title="Regions: blended predictions",
    summary="Each region predicts alone and masks blend the predictions: works with everything, one pass per region.",
    stage="compose",
    makes="picture",
    paper="",
    entry="pipelines.diffusion.regions.rows:apart",
    properties={"position": 22, "regions": "predictions"},
)
