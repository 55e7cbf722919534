"""LoRA-MGPO: Mitigating Double Descent in Low-Rank Adaptation via Momentum-Guided Perturbation Optimization, arXiv
2502.14538v3 (EMNLP 2025 Findings).

With the optimiser's momenta mA, mB and W' = W0 + s B A:

    D = s (mB A + B mA),   gbar = running mean of |G|_F,   k = min(1 / gbar, 10)  (1 in the first step)
    E = -rho k D / |D|_F   (the authors' code, which looks ahead along the step; SAM's direction is +)

Forward and backward at W' + E, the step at W'. E has rank at most 2r and is one more low-rank branch: no dense matrix,
W0 is never written to, quantised bases work. Nothing is perturbed until there are momenta. Trained: A and B. Stored:
an ordinary LoRA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.layers.variant import product
from adapters.learn.direction import Change, direction, gradient_of
from adapters.learn.perturbation import PerturbationPlugin
from adapters.low_rank import norm
from adapters.options import Option, Rule, Training
from adapters.plugin import Answers, Handles, Need, Outputs

METHOD = Method(
    name="mgpo",
    title="LoRA-MGPO",
    summary="Trains at weights moved along the momentum: smoother loss at high rank, at almost no cost.",
    stage="learn",
    makes="ordinary LoRA",
    paper="LoRA-MGPO, arXiv 2502.14538",
    entry="adapters.learn.mgpo:MomentumPlugin",
    training=Training(
        key="perturb",
        shared=("perturb_every",),
        options=(
            Option("perturb_rho", 0.05, gt=0, finite=True, help="mgpo: radius of the perturbation."),
            Option("perturb_ema", 0.9, ge=0, lt=1, help="mgpo: decay of the gradient norm's running mean."),
            Option(
                "perturb_direction",
                "downhill",
                choices=("downhill", "uphill"),
                help="mgpo: downhill looks ahead along the step (the authors' code), uphill is SAM's direction.",
            ),
        ),
        refused=(
            Rule(
                "optimizer not in ('adamw', 'sgd')",
                "mgpo follows the optimiser's momentum, which only adamw and sgd store in plain form: "
                "choose one of them, or perturb 'ggpo'",
            ),
            Rule(
                "optimizer == 'sgd' and beta1 == 0",
                "mgpo follows the momentum, and beta1 is 0: set beta1 above 0, or perturb to 'ggpo'",
            ),
        ),
    ),
)

LARGEST = 10.0
"""Upper limit of k."""


def momentum_of(optimizer: torch.optim.Optimizer) -> Change:
    """A function that gives a parameter's momentum in ``optimizer`` (``exp_avg`` or ``momentum_buffer``).

    It gives None before the first step, and raises :class:`InputError` if the optimiser's state holds no plain momentum
    of the parameter's shape.
    """

    def look(parameter: Tensor) -> Tensor | None:
        state = optimizer.state.get(parameter) or {}
        found = state.get("exp_avg", state.get("momentum_buffer"))
        if found is None and not state:
            return None
        if found is None and set(state) <= {"momentum_buffer"}:
            return None
        if not isinstance(found, Tensor) or found.shape != parameter.shape or not found.is_floating_point():
            raise InputError(
                f"mgpo finds no plain momentum in {type(optimizer).__name__} (sharded or quantised state?): "
                "use adamw or sgd on whole parameters, or perturb 'ggpo'."
            )
        return found

    return look


class MomentumBranch:
    """The perturbation of one layer (:class:`adapters.layers.variant.Perturbation`), off until :meth:`begin`.

    Args:
        rho: radius.
        ema: decay of the gradient norm's running mean.
        sign: -1 downhill (authors' code), +1 uphill (SAM).
    """

    def __init__(self, rho: float, ema: float = 0.9, sign: float = -1.0) -> None:
        self.rho, self.ema, self.sign = rho, ema, sign
        self.memory: float | None = None  # gbar
        self.branch: tuple[Tensor, Tensor] | None = None

    @property
    def adaptive(self) -> float:
        """k, the factor on the radius."""
        return 1.0 if self.memory is None else min(1 / (self.memory + 1e-12), LARGEST)

    @torch.no_grad()
    def begin(self, layer: Any, adapter: str, momentum: Change) -> None:
        """Set E for an optimiser step from the momenta."""
        self.branch = None
        found = direction(layer, adapter, momentum)
        if found is None:
            return
        left, right = found
        scale = float(layer.scaling[adapter])
        size = scale * float(norm(left, right))
        if not 1e-12 < size < float("inf"):
            return
        self.branch = self.sign * self.rho * self.adaptive * scale / (size + 1e-12) * left, right

    def end(self, layer: Any, adapter: str) -> None:
        """Switch off and update the running mean of the gradient's norm."""
        self.branch = None
        found = direction(layer, adapter, gradient_of)
        if found is None:
            return
        left, right = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in found)
        size = float(layer.scaling[adapter]) * float(norm(left, right))
        self.memory = size if self.memory is None else self.ema * self.memory + (1 - self.ema) * size

    def __call__(self, layer: Any, adapter: str, x: Tensor) -> Tensor | None:
        if self.branch is None:
            return None
        left, right = self.branch
        return product(layer, adapter, x, right.to(x), left.to(x))


class MomentumPlugin(PerturbationPlugin):
    """LoRA-MGPO: every layer perturbed along its momentum."""

    active: dict[str, MomentumBranch]

    def configure(self, config: Any) -> None:
        super().configure(config)
        self.rho, self.ema = config.perturb_rho, config.perturb_ema
        self.sign = -1.0 if config.perturb_direction == "downhill" else 1.0

    def needs(self) -> frozenset[Need]:
        return super().needs() | {"momenta"}

    def after_inject(self, handles: Handles) -> None:
        if handles.optimizer is None:
            raise InputError("mgpo follows an optimiser's momentum, but there is none: use perturb 'ggpo'.")
        self.momentum = momentum_of(handles.optimizer)
        super().after_inject(handles)

    def make(self, name: str, layer: Any, handles: Handles) -> MomentumBranch:
        return MomentumBranch(self.rho, self.ema, self.sign)

    def begin(self, name: str, layer: Any, step: int) -> None:
        self.active[name].begin(layer, self.adapter, self.momentum)

    def loss(self, loss: Tensor, outputs: Outputs | Answers) -> tuple[Tensor, dict[str, float]]:
        ks = [branch.adaptive for branch in self.active.values()]
        return loss, {"mgpo_k": sum(ks) / len(ks)} if ks else {}
