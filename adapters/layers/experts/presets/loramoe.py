"""LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin, arXiv 2312.09979 (ACL
2024).

    y = W0 x + s sum_i w_i B_i A_i x,   w = softmax(Wg x) over all experts

beside the linear layers of the feed-forward blocks. With a type per row (knowledge or task) the localized balancing
constraint moves each type's mass to a half of the experts: rows of type 1 end on the second half.
"""

from __future__ import annotations

from typing import Any

from adapters.catalogue import Method
from adapters.options import Option, Rule, Training

METHOD = Method(
    name="loramoe",
    title="LoRAMoE",
    summary="All experts at once, in two groups that types of rows can be tied to: to learn tasks and keep knowledge.",
    stage="layers",
    makes="mixture of experts",
    paper="LoRAMoE, arXiv 2312.09979",
    entry="adapters.layers.experts.presets.loramoe:choices",
    training=Training(
        key="method",
        shared=("experts", "router_loss"),
        options=(
            Option(
                "type_column",
                "",
                help="loramoe: column with the type of each row (0 or 1); without one, the groups are not told apart.",
                advanced=False,
            ),
            Option(
                "lbc_delta",
                0.1,
                ge=0,
                lt=1,
                help="loramoe: how far a type moves from one half of the experts to the other.",
            ),
            Option(
                "lbc_form",
                "cv2",
                choices=("cv2", "var_over_mean"),
                help="loramoe: variance of the groups' masses over their squared mean (code) or their mean (paper).",
            ),
        ),
        refused=(
            Rule(
                "router_loss > 0 and not type_column",
                "router_loss of loramoe compares types of rows: name their column in type_column",
            ),
            Rule("type_column and task != 'causal'", "type_column is for the causal task: leave it empty"),
            Rule("type_column and packing", "packing mixes rows of different types: switch packing off"),
            Rule("experts_per_token", "loramoe uses every expert for every token: leave experts_per_token empty"),
        ),
        plugin="adapters.layers.experts.plugin:ExpertsPlugin",
    ),
)


def choices(type_column: str = "", lbc_delta: float = 0.1, lbc_form: str = "cv2") -> dict[str, Any]:
    """The fields of the configuration; the constraint is on where rows have a type."""
    return {
        "placement": "linear", "attention": "none", "num_experts": 6, "router": "dense", "gate": "probability",
        "router_init": "kaiming", "aux_loss": "localized", "aux_coefficient": 0.1 if type_column else 0.0,
        "aux_reduce": "sum", "lbc_delta": lbc_delta, "lbc_form": lbc_form,
    }  # fmt: skip
