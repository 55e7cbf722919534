"""X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language Models, arXiv 2402.07148.

    g = softmax(classifier(H) / tau);   y = W0 x + gamma sum_n g_n s_n B_n A_n x

The experts are adapters that exist already; they stay as they are, and only the classifier of the base's last hidden
state H is trained. There is no balance loss. Defaults are those of the authors' code.
"""

from __future__ import annotations

from typing import Any

from adapters.catalogue import Method
from adapters.options import Option, Rule, Training

METHOD = Method(
    name="x-lora",
    title="X-LoRA",
    summary="Mixes adapters that you have already, token by token: only a small classifier is trained.",
    stage="layers",
    makes="mixture of experts",
    paper="X-LoRA, arXiv 2402.07148",
    entry="adapters.layers.experts.presets.x_lora:choices",
    properties={"frozen": True},
    training=Training(
        key="method",
        shared=("experts",),
        options=(
            Option("xlora_depth", 1, ge=1, help="x-lora: linear layers of the classifier.", advanced=False),
            Option("xlora_size", 2048, ge=1, help="x-lora: width of the classifier between its layers."),
            Option("xlora_dropout", 0.2, ge=0, lt=1, help="x-lora: dropout between the classifier's layers."),
            Option(
                "xlora_layerwise",
                False,
                help="x-lora: gates of their own for each adapted module, instead of the same for all.",
                advanced=False,
            ),
            Option(
                "xlora_softmax",
                "all",
                choices=("all", "kept", "none"),
                help="x-lora: softmax over all experts, over those that xlora_top_k keeps, or none.",
            ),
            Option("xlora_temperature", 1.0, gt=0, finite=True, help="x-lora: temperature of the softmax."),
            Option(
                "xlora_top_k", None, type="int", ge=1, help="x-lora: only the largest gates are kept; empty = all."
            ),
            Option(
                "xlora_pass_value",
                0.0,
                finite=True,
                help="x-lora: gate of every expert while the classifier's input is computed; 0 = the base alone.",
            ),
            Option("xlora_weight", 1.0, finite=True, help="x-lora: factor of all updates."),
        ),
        refused=(
            Rule("not experts", "x-lora mixes adapters that you have: name them in experts, separated by commas"),
            Rule("use_dora or use_rslora", "x-lora's experts are what they are: switch use_dora and use_rslora off"),
            Rule("xlora_softmax == 'kept' and xlora_top_k is None", "xlora_softmax 'kept' needs xlora_top_k"),
            Rule("router_loss or experts_per_token", "x-lora has no router_loss and no experts_per_token: leave both "
                 "empty (xlora_top_k limits the experts of a token)"),
        ),
        plugin="adapters.layers.experts.plugin:GatesPlugin",
    ),
)  # fmt: skip


def choices(
    xlora_depth: int = 1,
    xlora_size: int = 2048,
    xlora_dropout: float = 0.2,
    xlora_layerwise: bool = False,
    xlora_softmax: str = "all",
    xlora_temperature: float = 1.0,
    xlora_top_k: int | None = None,
    xlora_pass_value: float = 0.0,
    xlora_weight: float = 1.0,
) -> dict[str, Any]:
    """The fields of the configuration, without the experts."""
    return {
        "placement": "linear", "attention": "experts", "router": "external", "gate": "probability", "trained": "router",
        "classifier": {
            "depth": xlora_depth, "size": xlora_size, "dropout": xlora_dropout, "layerwise": xlora_layerwise,
            "softmax": xlora_softmax == "all", "softmax_of_top_k": xlora_softmax == "kept",
            "temperature": xlora_temperature, "top_k": xlora_top_k, "pass_value": xlora_pass_value,
            "weight": xlora_weight,
        },
    }  # fmt: skip
