"""MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts, arXiv 2404.15159.

    w = softmax(Wr x) over the k largest, renormalised;   y = sum_e w_e FFN_e(x)

FFN_e is the frozen feed-forward block with a LoRA on each of its linear layers (eq. 4-6); attention gets ordinary
LoRAs; N sum_i F_i P_i balances the routers (eq. 8-9, in the form that is k at uniform routing). The last layer of the
block is linear, so the gates are applied before it and it runs once per token instead of k times.
"""

from __future__ import annotations

from typing import Any

from adapters.catalogue import Method
from adapters.options import Training

METHOD = Method(
    name="mixlora",
    title="MixLoRA",
    summary="Experts are whole feed-forward blocks, two of eight per token: for several different tasks at once.",
    stage="layers",
    makes="mixture of experts",
    paper="MixLoRA, arXiv 2404.15159",
    entry="adapters.layers.experts.presets.mixlora:choices",
    training=Training(
        key="method",
        shared=("experts", "experts_per_token", "router_loss", "router_loss_scope"),
        plugin="adapters.layers.experts.plugin:ExpertsPlugin",
    ),
)


def choices() -> dict[str, Any]:
    """The fields of the configuration."""
    return {
        "placement": "ffn_block", "attention": "plain", "num_experts": 8, "router": "topk", "gate": "renormalised",
        "router_init": "normal", "aux_loss": "load_balance", "aux_coefficient": 1e-2, "aux_norm": "k",
    }  # fmt: skip
