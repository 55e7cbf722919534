"""Mixtures of LoRA experts as one PEFT tuner: MixLoRA, MoLA, LoRAMoE, LLaVA-MoLE and X-LoRA are choices of
:class:`~adapters.layers.experts.config.MoeConfig`.

Importing this package makes PEFT know the type MOEADAPTER; files of this type can be loaded only after that.

The tensors of an adapter, in ``adapter_model.safetensors`` (N experts of rank r; each name follows the module's path,
and in a model the adapter's name follows the tensor's: ``...q_proj.moeadapter_A.default``):

beside a linear layer (``...self_attn.q_proj``, ``...mlp.gate_proj``)

    moeadapter_A              (N, r, in)
    moeadapter_B              (N, out, r)
    moeadapter_magnitude      (N, out)      DoRA only
    moeadapter_router.weight  (N, in)       fp32; none for N = 1 and for router "external"
    moeadapter_router.bias    (N,)          if the router has one

around a feed-forward block (``...mlp``), for each of its linear layers that is targeted (gate, up, down; gate_up, down
where they are fused; up, down without a gate)

    moeadapter_gate_A ...     (N, r, in)
    moeadapter_gate_B ...     (N, out, r)
    moeadapter_gate_magnitude ...  (N, out) DoRA only
    moeadapter_router.weight  (N, d), moeadapter_router.bias (N,)

beside a linear layer, for X-LoRA (:mod:`adapters.layers.experts.frozen`; R is the sum of the experts' ranks there)

    moeadapter_A              (R, in)
    moeadapter_B              (out, R)      the scales are in it
    moeadapter_rows           (N, out)      where an expert is DoRA
    moeadapter_router.weight_{i}, .bias_{i} the classifier's layers, beside the first module only, in fp32

Experts of smaller rank than r are padded with zeros, which keep a gradient of zero. What routers are told and what they
decided is in the :class:`~adapters.layers.experts.routing.Routing` of the model (:func:`routing_of`).
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from adapters.layers.experts.config import MoeConfig, StudioPeftType, check_peft
from adapters.layers.experts.layer import PREFIX, ExpertBlock, ExpertLayer, ExpertLinear, Place
from adapters.layers.experts.losses import aux_loss, load
from adapters.layers.experts.model import MoeModel, expert_layers, is_moe
from adapters.layers.experts.routing import Record, Routing, Segment, routing_of, sample_types, watched

check_peft()
PEFT_TYPE_TO_CONFIG_MAPPING[StudioPeftType.MOEADAPTER] = MoeConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[StudioPeftType.MOEADAPTER] = MoeModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[StudioPeftType.MOEADAPTER] = PREFIX  # type: ignore[index]

__all__ = [
    "ExpertBlock",
    "ExpertLayer",
    "ExpertLinear",
    "MoeConfig",
    "MoeModel",
    "Place",
    "Record",
    "Routing",
    "Segment",
    "StudioPeftType",
    "aux_loss",
    "expert_layers",
    "is_moe",
    "load",
    "routing_of",
    "sample_types",
    "watched",
]
