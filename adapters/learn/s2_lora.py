"""Sparsely Shared LoRA on Whisper for Child Speech Recognition (S2-LoRA), arXiv 2309.11756, as a training.

    L = task loss + l2 mean_g (|A A^T - I|^2 + |B^T B - I|^2);   after each step   v <- sign(v) max(|v| - l1 eta_v, 0)

Layer and algebra are in :mod:`adapters.layers.shared`. Trained: one pair per group and a vector v per weight; v learns
at its own, higher rate and without weight decay (a few coefficients carry what a whole LoRA layer carries), and the
proximal step, unlike an L1 term under AdamW, gives exact zeros. A pair's gradient is a sum over all its weights, so
each group is clipped by itself. With A and B orthonormal and v = 0 the model starts as the base, and the first gradient
reaches v alone. Without the deviation term (l2 = 0) the pair is normalised after every step instead, since A -> c A,
v -> v / c would cheat the penalty.

The orthogonality term is AdaLoRA's; whether the paper keeps it, its sharing rule and its numbers are not known to us.
Stored: an ordinary LoRA, exact, with |K| ranks per weight, and beside it the small native form, ``s2_config.json`` and
``s2_weights.safetensors``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from adapters.catalogue import Method
from adapters.errors import FamilyError, InputError
from adapters.layers.shared import (
    Group,
    Share,
    SharedPair,
    Shares,
    deviation,
    gaussian,
    groups,
    orthonormal,
    renormalise,
    soft_threshold,
)
from adapters.layers.sizes import sizes
from adapters.layers.variant import adapted, base_weight, set_shares, shares_of
from adapters.options import Option, Rule, Training
from adapters.plugin import Answers, Handles, Layers, Outputs, Plugin, no_decay

METHOD = Method(
    name="s2-lora",
    title="S2-LoRA",
    summary="One pair shared by many weights, each with few coefficients of its own: a fraction of LoRA's parameters.",
    stage="learn",
    makes="ordinary LoRA",
    paper="S2-LoRA, arXiv 2309.11756",
    entry="adapters.learn.s2_lora:SharedPlugin",
    training=Training(
        key="s2_share",
        options=(
            Option("s2_share", None, choices=("shape", "type", "type+stack", "blocks"), help="s2-lora: weights "
                   "that share a pair: of one shape, of one type (q_proj ...), of one type within encoder or decoder, "
                   "or all, cut into blocks; empty = off (every weight has a pair of its own).", advanced=False),
            Option("s2_sparsity", 0.3, ge=0, finite=True, help="s2-lora: weight of the L1 penalty that makes "
                   "coefficients exactly zero; 0 = none."),
            Option("s2_orthogonality", 0.1, ge=0, finite=True, help="s2-lora: weight of the term that keeps shared "
                   "pairs orthonormal; 0 = they are normalised after every step."),
            Option("s2_rate", 10.0, gt=0, finite=True, help="s2-lora: learning rate of the coefficients over that "
                   "of the pairs."),
            Option("s2_start", "orthonormal", choices=("orthonormal", "adalora"), help="s2-lora: how pairs start: "
                   "orthonormal, or small and random as in AdaLoRA."),
            Option("s2_fixed", 0.0, ge=0, lt=1, help="s2-lora: share of the steps, at the end, in which zeros stay "
                   "and nothing more is shrunk."),
        ),
        refused=(
            Rule("use_rslora or alpha not in (None, rank) or alpha_pattern or rank_pattern", "s2-lora has one rank and "
                 "no scaling factor: leave alpha and the patterns empty and use_rslora off"),
            Rule("use_dora", "s2-lora is for plain low-rank layers: switch use_dora off"),
            Rule("init != 'default'", "s2-lora has its own start (s2_start): set init to 'default'"),
            Rule("freeze_a", "s2-lora has no A of a single layer to freeze: switch freeze_a off"),
            Rule("grad_rule != 'plain'", "a grad_rule needs a pair per layer: set it to 'plain', or leave "
                 "s2_share empty"),
            Rule("perturb != 'none'", "perturb needs a pair per layer: set it to 'none', or leave s2_share empty"),
            Rule("l4q_bits > 0", "l4q needs a pair per layer: set l4q_bits to 0, or leave s2_share empty"),
            Rule("method != 'lora'", "experts have pairs of their own: set method to 'lora', or leave s2_share empty"),
            Rule("continue_from", "shared pairs start anew: leave continue_from empty"),
            Rule("loraplus_ratio != 1", "LoRA+ sets B's rate against A's, s2-lora that of its coefficients "
                 "(s2_rate): set loraplus_ratio to 1"),
            Rule("optimizer in ('prodigy', 'schedulefree-adamw')", "s2-lora sets the coefficients after every step, "
                 "at a rate of their own: choose adamw, adamw8bit, adafactor or sgd"),
            Rule("ema and s2_sparsity > 0", "a running average of the coefficients has no zeros: switch ema off, or "
                 "set s2_sparsity to 0"),
        ),
    ),
)  # fmt: skip

CONFIG, WEIGHTS = "s2_config.json", "s2_weights.safetensors"
"""The native form."""

OWNER = "lora_shared"
"""Name of the module, at the root of the model, that owns the pairs of every adapter."""

WARM_UP = 0.2
"""Share of the steps over which the penalty grows to its full weight."""

_log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------ on a model


def share_pairs(
    model: nn.Module, share: Share, rank: int, start: str = "orthonormal", seed: int = 0, adapter: str = "default"
) -> dict[str, SharedPair]:
    """Give the adapted layers of ``model`` shared pairs in place of their own: group -> pair.

    Args:
        model: with plain adapters of PEFT.
        start: "orthonormal" or "adalora" (both with v = 0).

    Raises:
        InputError: a rank above a group's smaller side, layers that cannot share, or none at all.
    """
    layers = adapted(model, adapter)
    if table := next((name for name, layer in layers.items() if adapter not in layer.lora_A), None):
        raise InputError(f"'{table}' is an embedding, which cannot share a pair: leave it out of the targets.")
    found = groups({name: sizes(layer.get_base_layer()) for name, layer in layers.items()}, share)
    for about in found.values():
        if len(about.members) == 1:
            _log.warning("'%s' is alone in its group: there a plain LoRA is better.", next(iter(about.members)))
    begin = {"orthonormal": orthonormal, "adalora": gaussian}[start]
    pairs = {}
    for number, (group, about) in enumerate(found.items()):
        made = begin(about.size, rank, torch.Generator().manual_seed(seed * 1009 + number))
        like = layers[next(iter(about.members))].lora_A[adapter].weight
        pairs[group] = SharedPair(*(matrix.to(like.device, like.dtype) for matrix in made))
    _attach(model, layers, found, pairs, adapter)
    return pairs


def _attach(
    model: nn.Module, layers: Mapping[str, Any], found: Mapping[str, Group], pairs: Mapping[str, SharedPair],
    adapter: str,
) -> None:  # fmt: skip
    owner: Any = getattr(model, OWNER, None)
    if owner is None:
        owner = nn.ModuleDict()
        model.add_module(OWNER, owner)
    owner[adapter] = nn.ModuleDict({group.replace(".", "/"): pair for group, pair in pairs.items()})
    for group, about in found.items():
        A = pairs[group].A
        for name, (rows, columns) in about.members.items():
            v = torch.zeros(rows, columns, A.shape[0], device=A.device, dtype=A.dtype)
            set_shares(layers[name], Shares(pairs[group], v), adapter)


def pairs_of(model: nn.Module, adapter: str = "default") -> dict[str, SharedPair]:
    """Group -> pair of a model with shared pairs.

    Raises:
        InputError: it has none.
    """
    owner: Any = getattr(model, OWNER, {})
    if adapter not in owner:
        raise InputError(f"The model has no shared pairs named '{adapter}'.")
    return {group.replace("/", "."): pair for group, pair in owner[adapter].items()}


def shares(model: nn.Module, adapter: str = "default") -> dict[str, Shares]:
    """Module path -> its share."""
    found = {name: shares_of(layer, adapter) for name, layer in adapted(model, adapter).items()}
    return {name: one for name, one in found.items() if one is not None}


def native(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The tensors of the native form: ``A.GROUP``, ``B.GROUP``, ``v.MODULE``, and ``base.MODULE``, the first row of one
    weight, which tells whether a base is the same model in whatever precision."""
    pairs = pairs_of(model, adapter)
    tensors = {f"{matrix}.{group}": getattr(pair, matrix) for group, pair in pairs.items() for matrix in "AB"}
    members = shares(model, adapter)
    tensors |= {f"v.{name}": one.v for name, one in members.items()}
    first = next(iter(members))
    tensors[f"base.{first}"] = base_weight(adapted(model, adapter)[first])[0].float()
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def load_native(model: nn.Module, folder: Path, adapter: str = "default") -> dict[str, SharedPair]:
    """Load the native form from ``folder`` into a model with plain adapters of PEFT on the same layers.

    Raises:
        InputError: a file is missing, damaged, or for other layers.
        FamilyError: it was trained on other base weights.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        rank, share = int(config["r"]), config["share"]
    except Exception as error:  # safetensors has errors of its own
        raise InputError(f"'{folder}' has no readable {CONFIG} and {WEIGHTS} ({error}).") from None
    layers = adapted(model, adapter)
    given = {name.removeprefix("v."): tensor for name, tensor in tensors.items() if name.startswith("v.")}
    if odd := sorted(given.keys() ^ layers.keys()):
        raise InputError(f"'{folder / WEIGHTS}' is for other layers ({len(odd)} differ, e.g. '{odd[0]}').")
    first, row = next((name.removeprefix("base."), t) for name, t in tensors.items() if name.startswith("base."))
    own = base_weight(layers[first])[0].float().cpu()
    if own.shape != row.shape or not torch.allclose(own, row, rtol=2e-2, atol=1e-4):
        raise FamilyError(f"'{folder / WEIGHTS}' was trained on other base weights ('{first}' differs).")
    pairs = share_pairs(model, share, rank, adapter=adapter)
    for group, pair in pairs.items():
        for matrix in "AB":
            _take(getattr(pair, matrix), tensors.get(f"{matrix}.{group}"), f"{matrix}.{group}")
    for name, one in shares(model, adapter).items():
        _take(one.v, given[name], f"v.{name}")
    return pairs


def _take(parameter: Tensor, given: Tensor | None, name: str) -> None:
    if given is None or given.shape != parameter.shape:
        shape = "missing" if given is None else f"{tuple(given.shape)}"
        raise FamilyError(f"'{name}' is {shape} in the file, but this base needs {tuple(parameter.shape)}.")
    parameter.copy_(given)


# ------------------------------------------------------------------------------------------------ in the training loop


class SharedPlugin(Plugin):
    """S2-LoRA in the training loop.

    Logged: ``shared_zeros``, the share of coefficients that are exactly zero, and ``shared_deviation``.
    """

    name = "s2"

    def configure(self, config: Any) -> None:
        self.share, self.rank, self.start = config.s2_share, config.rank, config.s2_start
        self.sparsity, self.orthogonality = config.s2_sparsity, config.s2_orthogonality
        self.rate, self.fixed, self.clip = config.s2_rate, config.s2_fixed, config.max_grad_norm
        self.base = config.base

    def initialise(self, handles: Handles) -> None:
        self.models, self.adapter, self.steps = handles.models, handles.adapter, handles.steps
        self.pairs: dict[str, dict[str, SharedPair]] = {}
        for number, (component, model) in enumerate(handles.models.items()):
            seed = handles.seed + number
            self.pairs[component] = share_pairs(model, self.share, self.rank, self.start, seed, self.adapter)
        self.members = {
            f"{component}.{name}": one
            for component, model in handles.models.items()
            for name, one in shares(model, self.adapter).items()
        }
        self.support: dict[str, Tensor] = {}

    def _pairs(self) -> list[SharedPair]:
        return [pair for found in self.pairs.values() for pair in found.values()]

    def after_inject(self, handles: Handles) -> None:
        """Give the coefficients groups of their own in the optimiser."""
        self.groups: list[dict[str, Any]] = []
        if handles.optimizer is None:
            return
        ours = {id(one.v) for one in self.members.values()}
        for group in list(handles.optimizer.param_groups):
            mine = [parameter for parameter in group["params"] if id(parameter) in ours]
            if not mine:
                continue
            if rest := [parameter for parameter in group["params"] if id(parameter) not in ours]:
                group["params"] = rest
                options = {key: value for key, value in group.items() if key != "params"}
                handles.optimizer.add_param_group({**options, "params": mine})
                group = handles.optimizer.param_groups[-1]
            group["lr"] *= self.rate
            if "initial_lr" in group:
                group["initial_lr"] = group["lr"]
            self.groups.append(group)
        no_decay(handles, [one.v for one in self.members.values()])

    def loss(self, loss: Tensor, outputs: Outputs | Answers) -> tuple[Tensor, dict[str, float]]:
        pairs = self._pairs()
        spread = torch.stack([deviation(pair.A, pair.B) for pair in pairs]).mean()
        zeros = sum(int((one.v == 0).sum()) for one in self.members.values())
        total = sum(one.v.numel() for one in self.members.values())
        logs = {"shared_zeros": zeros / total, "shared_deviation": float(spread.detach())}
        if not self.orthogonality:
            return loss, logs
        share = outputs.share if isinstance(outputs, Answers) else 1.0
        return loss + self.orthogonality * share * spread.to(loss.device), logs

    def grads_ready(self, step: int) -> None:
        """Clip each pair's gradient, a sum over its weights, by itself, so that it does not drown the others."""
        for pair in self._pairs() if self.clip else ():
            nn.utils.clip_grad_norm_(pair.parameters(), self.clip)

    def step_begin(self, step: int) -> None:
        """Note the support when it becomes fixed, before the optimiser moves coefficients off zero."""
        if self._is_fixed(step) and not self.support:
            self.support = {name: (one.v != 0).to(one.v) for name, one in self.members.items()}

    def _is_fixed(self, step: int) -> bool:
        return self.fixed > 0 and step >= (1 - self.fixed) * self.steps

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if not self.orthogonality:
            for pair in self._pairs():
                renormalise(pair.A, pair.B, [one.v for one in self.members.values() if one.pair is pair])
        if self._is_fixed(step):
            for name, one in self.members.items():
                one.v.mul_(self.support[name])
            return
        warm = min(1.0, (step + 1) / max(1.0, WARM_UP * self.steps))
        rates = {id(parameter): group["lr"] for group in self.groups for parameter in group["params"]}
        for one in self.members.values():
            one.v.copy_(soft_threshold(one.v, self.sparsity * warm * rates.get(id(one.v), 0.0)))

    def state_dict(self) -> dict[str, Any]:
        return dict(self.support)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.support = {name: mask.to(self.members[name].v) for name, mask in state.items()}

    def finalize(self, layers: Layers) -> Layers:
        if not any(layers.values()):
            raise InputError(
                "Every coefficient is zero, so there is no adapter to save: lower s2_sparsity, or train longer."
            )
        return layers

    def beside(self) -> Mapping[str, Mapping[str, Tensor]]:
        if len(self.models) != 1:
            return {}
        return {WEIGHTS: native(next(iter(self.models.values())), self.adapter)}

    def texts_beside(self) -> Mapping[str, str]:
        if len(self.models) != 1:
            return {}
        told = {
            "r": self.rank, "share": self.share, "s2_sparsity": self.sparsity, "tau": 0.0,
            "base_model_name_or_path": Path(str(self.base)).name,
            "targets": sorted({name.rpartition(".")[2] for name in self.members}),
        }  # fmt: skip
        return {CONFIG: json.dumps(told, indent=1, sort_keys=True) + "\n"}
