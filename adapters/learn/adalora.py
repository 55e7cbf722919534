"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512 (ICLR 2023), through PEFT.

    y = W0 x + s B (E * (A x)),   s = alpha / r0,   L = task loss + w mean |P P^T - I|_F over all A and B^T

The budget of ranks falls from r0 per layer to a target on average, by a cubic schedule over the middle of the run;
ranks of small importance (smoothed |parameter x gradient|, over A, B and E) get E = 0. Trained: A (r0, in), B (out, r0)
and E (r0, 1). Layers and allocator are PEFT's. The term is added here and not by PEFT's forward pass, which would count
it once per forward pass of an accumulated step. Stored: an ordinary LoRA with as many ranks per layer as are left,

    lora_A = s E_K A_K,   lora_B = B_K,   r = alpha = |K|,   K = {k: E_k != 0}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.formats.lora import LoraLayer
from adapters.options import Option, Rule, Training
from adapters.plugin import Answers, Handles, Layers, Outputs, Plugin

METHOD = Method(
    name="adalora",
    title="AdaLoRA",
    summary="Starts with more ranks than wanted and keeps those that matter, so that layers get different ranks.",
    stage="learn",
    makes="ordinary LoRA",
    paper="AdaLoRA, arXiv 2303.10512",
    entry="adapters.learn.adalora:AdaLoraPlugin",
    training=Training(
        key="adalora_rank",
        options=(
            Option("adalora_rank", 0, ge=0, help="adalora: ranks per layer that are left at the end, on average; rank "
                   "is what each layer starts with. 0 = off.", advanced=False),
            Option("adalora_start", 0.1, ge=0, le=0.5, help="adalora: share of the steps before ranks are taken away."),
            Option("adalora_end", 0.3, ge=0, lt=0.5, help="adalora: share of the steps, at the end, with fixed ranks."),
            Option("adalora_every", 1, ge=1, help="adalora: take ranks away every this many steps."),
            Option("adalora_orthogonality", 0.5, ge=0, finite=True, help="adalora: weight of the term that keeps A "
                   "and B orthonormal."),
        ),
        refused=(
            Rule("adalora_rank >= rank", "adalora ends with fewer ranks than it starts with: set adalora_rank below "
                 "rank"),
            Rule("use_dora or use_rslora", "adalora is for plain low-rank layers: switch use_dora and use_rslora off"),
            Rule("rank_pattern or alpha_pattern", "adalora chooses ranks itself: leave the patterns empty"),
            Rule("init != 'default'", "adalora has its own start: set init to 'default'"),
            Rule("freeze_a", "adalora learns A too: switch freeze_a off"),
            Rule("s2_share", "adalora needs a pair per layer: leave s2_share empty"),
            Rule("l4q_bits > 0", "l4q merges a plain LoRA: set l4q_bits or adalora_rank to 0"),
            Rule("grad_rule != 'plain'", "a grad_rule is for plain pairs: set it to 'plain'"),
            Rule("perturb != 'none'", "perturb is for plain pairs: set it to 'none'"),
            Rule("method != 'lora'", "experts have ranks of their own: set method to 'lora'"),
            Rule("intruders_every > 0", "intruders_every measures plain pairs: set it to 0"),
            Rule("continue_from", "adalora starts anew: leave continue_from empty"),
            Rule("ema", "a running average of E has no zeros: switch ema off"),
            Rule("quantization not in ('none', False, None)", "adalora is for whole weights: set quantization to "
                 "'none'"),
        ),
    ),
)  # fmt: skip


def configuration(config: Any, targets: Sequence[str], **other: Any) -> AdaLoraConfig:
    """PEFT's configuration for a training's; its step counts are set when they are known."""
    return AdaLoraConfig(
        init_r=config.rank, target_r=config.adalora_rank, lora_alpha=config.alpha or config.rank,
        lora_dropout=config.dropout, target_modules=list(targets), total_step=10**9, tinit=0, tfinal=0,
        deltaT=config.adalora_every, orth_reg_weight=0.0, **other,
    )  # fmt: skip


def deviation(layers: Sequence[Any], adapter: str = "default") -> Tensor:
    """mean |P P^T - I|_F over every A and B^T, as PEFT computes it."""
    found = []
    for layer in layers:
        for rows in (layer.lora_A[adapter], layer.lora_B[adapter].T):
            unit = torch.eye(rows.shape[0], dtype=rows.dtype, device=rows.device)
            found.append(torch.linalg.matrix_norm(rows @ rows.T - unit))
    return torch.stack(found).mean()


@torch.no_grad()
def as_lora(layer: Any, adapter: str = "default") -> LoraLayer | None:
    """The layer as an ordinary LoRA of the ranks that are left, exactly; None if none is."""
    A, B, E = (getattr(layer, name)[adapter].detach().float() for name in ("lora_A", "lora_B", "lora_E"))
    kept = E[:, 0] != 0
    if not bool(kept.any()):
        return None
    scale = float(layer.scaling[adapter] / (layer.ranknum[adapter] + 1e-5))
    down = scale * E[kept] * A[kept]
    return LoraLayer(down.cpu().contiguous(), B[:, kept].cpu().contiguous(), float(kept.sum()))


class AdaLoraPlugin(Plugin):
    """AdaLoRA in the training loop. Logged: ``adalora_ranks``, how many are left, and ``adalora_deviation``."""

    name = "adalora"

    def configure(self, config: Any) -> None:
        self.weight = config.adalora_orthogonality
        self.start, self.end = config.adalora_start, config.adalora_end

    def initialise(self, handles: Handles) -> None:
        self.adapter = handles.adapter
        self.models = dict(handles.models)
        self.layers = {
            component: {
                name.removeprefix("base_model.model."): module
                for name, module in model.named_modules()
                if isinstance(module, AdaLoraLayer) and self.adapter in module.lora_A
            }
            for component, model in self.models.items()
        }
        if not any(self.layers.values()):
            raise InputError("AdaLoRA is for language and speech models: set adalora_rank to 0.")
        for model in self.models.values():
            tuner: Any = model.base_model
            plan = tuner.peft_config[self.adapter]
            plan.total_step = handles.steps
            plan.tinit, plan.tfinal = round(self.start * handles.steps), round(self.end * handles.steps)

    def _all(self) -> list[Any]:
        return [layer for layers in self.layers.values() for layer in layers.values()]

    def loss(self, loss: Tensor, outputs: Outputs | Answers) -> tuple[Tensor, dict[str, float]]:
        spread = deviation(self._all(), self.adapter)
        left = sum(int((layer.lora_E[self.adapter] != 0).sum()) for layer in self._all())
        logs = {"adalora_ranks": float(left), "adalora_deviation": float(spread.detach())}
        share = outputs.share if isinstance(outputs, Answers) else 1.0
        return loss + self.weight * share * spread.to(loss.device), logs

    def after_step(self, step: int) -> None:
        for model in self.models.values():
            tuner: Any = model.base_model
            tuner.update_and_allocate(step)

    def state_dict(self) -> dict[str, Any]:
        return {component: _state(model, self.adapter) for component, model in self.models.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for component, kept in state.items():
            tuner: Any = self.models[component].base_model
            allocator = tuner.rankallocator
            for name in _KEPT:
                setattr(allocator, name, dict(kept[name]))
            tuner.peft_config[self.adapter].rank_pattern = kept["ranks"] or {}

    def finalize(self, layers: Layers) -> Layers:
        found = {
            component: {name: one for name, layer in members.items() if (one := as_lora(layer, self.adapter))}
            for component, members in self.layers.items()
        }
        if not any(found.values()):
            raise InputError("No rank is left, so there is no adapter to save: raise adalora_rank, or train longer.")
        return {**layers, **found}


_KEPT = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What PEFT's allocator remembers of past steps."""


def _state(model: nn.Module, adapter: str) -> dict[str, Any]:
    tuner: Any = model.base_model
    found = {name: {key: value.cpu().clone() for key, value in getattr(tuner.rankallocator, name).items()}
             for name in _KEPT}  # fmt: skip
    return {**found, "ranks": tuner.peft_config[adapter].rank_pattern}
