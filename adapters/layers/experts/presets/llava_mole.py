"""LLaVA-MoLE: Sparse Mixture of LoRA Experts for Mitigating Data Conflicts in Instruction Finetuning MLLMs, arXiv
2401.16160.

    e = argmax softmax(Wr x + b);   y = FFN_e(x)

One router per feed-forward block; a token uses one expert, whose output is not multiplied by its probability, so that
the task's loss does not train the router: only the balance loss within each sample does (eq. 7, here 1 at uniform
routing). ``router_grad`` changes that. Attention gets ordinary LoRAs. The cost of a token is that of one LoRA.
"""

from __future__ import annotations

from typing import Any

from adapters.catalogue import Method
from adapters.options import Option, Rule, Training

METHOD = Method(
    name="llava-mole",
    title="LLaVA-MoLE",
    summary="One expert per token and feed-forward block: mixtures of conflicting data at the cost of one LoRA.",
    stage="layers",
    makes="mixture of experts",
    paper="LLaVA-MoLE, arXiv 2401.16160",
    entry="adapters.layers.experts.presets.llava_mole:choices",
    training=Training(
        key="method",
        shared=("experts", "router_loss", "router_loss_scope"),
        options=(
            Option(
                "router_grad",
                "none",
                choices=("none", "straight_through", "probability"),
                help="llava-mole: how the task trains the router: not (paper), by the chosen expert's log probability "
                "without changing the output, or by multiplying the output with the probability.",
            ),
        ),
        refused=(
            Rule("experts_per_token > 1", "llava-mole uses one expert per token: leave experts_per_token empty or 1"),
        ),
        plugin="adapters.layers.experts.plugin:ExpertsPlugin",
    ),
)

GATES = {"none": "one", "straight_through": "straight_through", "probability": "probability"}


def choices(router_grad: str = "none") -> dict[str, Any]:
    """The fields of the configuration."""
    return {
        "placement": "ffn_block", "attention": "plain", "num_experts": 3, "router": "top1", "gate": GATES[router_grad],
        "router_bias": True, "router_init": "kaiming", "aux_loss": "sample_balance", "aux_coefficient": 1e-2 / 3,
        "aux_norm": "one",
    }  # fmt: skip
