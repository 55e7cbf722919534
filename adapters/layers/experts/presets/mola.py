"""MoLA: MoE LoRA with Layer-wise Expert Allocation (Higher Layers Need More LoRA Experts), arXiv 2402.08562.

    y = W0 x + s sum_e w_e B_e A_e x,   w = softmax(Wr x) over the k largest, renormalised

beside every linear layer, each with a router of its own; layer j has N_j experts. The first version of the paper finds
more experts best in higher layers, the NAACL one in middle layers: both are shapes here, and neither is promised. The
balance loss (its sum over layers, 1 each at uniform routing) is off unless a weight is given, as in the authors' code.
"""

from __future__ import annotations

from typing import Any

from adapters.catalogue import Method
from adapters.options import Training

METHOD = Method(
    name="mola",
    title="MoLA",
    summary="Experts beside every linear layer, their number chosen layer by layer: for a fixed budget of experts.",
    stage="layers",
    makes="mixture of experts",
    paper="MoLA, arXiv 2402.08562",
    entry="adapters.layers.experts.presets.mola:choices",
    training=Training(
        key="method",
        shared=("experts", "experts_per_token", "router_loss", "router_loss_scope"),
        plugin="adapters.layers.experts.plugin:ExpertsPlugin",
    ),
)


def choices() -> dict[str, Any]:
    """The fields of the configuration."""
    return {
        "placement": "linear", "attention": "experts", "num_experts": "inverted-triangle", "router": "topk",
        "gate": "renormalised", "router_init": "kaiming", "aux_loss": "load_balance", "aux_coefficient": 0.0,
        "aux_norm": "one", "aux_reduce": "sum",
    }  # fmt: skip
