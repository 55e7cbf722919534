"""Which training methods go together: one table of refusals, one of warnings, one sentence each.

Schemas refuse with :func:`refusal`; pages and commands show :func:`warnings`. A rule reads a configuration's fields; a
field that a schema does not have counts as switched off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OFFSET_INITS = ("pissa", "olora", "corda", "lora_ga")
"""Starts with a frozen copy beside the adapter, so that the model does not change at the start."""

CALIBRATED_INITS = ("eva", "corda", "lora_ga", "lora_sb")
"""Starts that look at some batches first."""

ADAM_LIKE = ("adamw", "adamw8bit", "adafactor", "prodigy", "schedulefree-adamw")
"""Optimisers that divide the size of the gradient away."""

WITH_MOMENTUM = ("adamw", "sgd")
"""Optimisers whose state holds a plain momentum of every parameter."""


@dataclass(frozen=True)
class Rule:
    """One row: when it applies, and what to say (what is wrong, what to do)."""

    applies: Callable[[Any], bool]
    sentence: str


def refusal(config: Any) -> str | None:
    """The sentence of the first refused combination in ``config``, or None."""
    seen = _Fields(config)
    return next((rule.sentence for rule in REFUSED if rule.applies(seen)), None)


def refuse(config: Any) -> None:
    """Raise ``ValueError`` with the sentence of :func:`refusal`, if there is one."""
    if sentence := refusal(config):
        raise ValueError(sentence)


def warnings(config: Any) -> list[str]:
    """Sentences on combinations that work but may surprise."""
    seen = _Fields(config)
    return [rule.sentence for rule in WARNED if rule.applies(seen)]


class _Fields:
    """A configuration whose missing fields read as off."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name, _OFF.get(name))


_OFF: dict[str, Any] = {
    "init": "default", "grad_rule": "plain", "perturb": "none", "reg": "none", "allora_mode": "gradient",
    "optimizer": "adamw", "rank_pattern": {}, "alpha_pattern": {}, "dropout": 0.0, "beta1": 0.9, "loraplus_ratio": 1.0,
    "family": "auto", "fused_loss": False,
}  # fmt: skip


def _scaled(c: Any) -> bool:
    """The forward factor alpha / r is, or may be, other than 1."""
    return bool(
        c.use_rslora
        or (c.alpha is not None and c.alpha != c.rank)
        or c.alpha_pattern
        or (c.rank_pattern and c.alpha is not None)
        or (c.conv_alpha is not None and c.conv_alpha != c.conv_rank)
    )


REFUSED: tuple[Rule, ...] = (
    Rule(
        lambda c: c.init in OFFSET_INITS and bool(c.use_dora),
        "pissa, olora, corda and lora_ga with DoRA cannot be saved as an ordinary adapter: switch one of them off",
    ),
    Rule(
        lambda c: c.init != "default" and bool(c.continue_from),
        "an adapter to continue from replaces the init: set init to 'default'",
    ),
    Rule(
        lambda c: c.init == "lora_sb" and bool(c.use_dora),
        "lora_sb trains a small matrix between A and B, which DoRA knows nothing of: switch use_dora off",
    ),
    Rule(
        lambda c: c.init == "lora_sb" and bool(c.freeze_a),
        "lora_sb freezes A and B already: switch freeze_a off",
    ),
    Rule(
        lambda c: c.init == "lora_sb" and c.grad_rule == "allora",
        "allora scales the gradients of A and B, which lora_sb does not train: choose one of them",
    ),
    Rule(
        lambda c: c.init == "lora_sb" and c.loraplus_ratio != 1,
        "LoRA+ gives B a learning rate of its own, but lora_sb does not train B: set loraplus_ratio to 1",
    ),
    Rule(
        lambda c: c.grad_rule == "allora" and _scaled(c),
        "ALLoRA has no scaling factor (its forward factor is 1): leave alpha empty and use_rslora off",
    ),
    Rule(
        lambda c: c.grad_rule == "allora" and c.dropout > 0,
        "ALLoRA replaces dropout: set dropout to 0",
    ),
    Rule(
        lambda c: c.grad_rule == "allora" and bool(c.use_dora),
        "ALLoRA's gradient rule is for plain low-rank layers: switch use_dora off",
    ),
    Rule(
        lambda c: c.grad_rule == "allora" and c.allora_mode == "lr" and c.optimizer == "schedulefree-adamw",
        "allora_mode 'lr' scales each step of the weights, but schedule-free AdamW keeps two sets of them: "
        "choose another optimizer",
    ),
    Rule(
        lambda c: c.perturb != "none" and bool(c.use_dora),
        "disturbed weights are not defined for DoRA layers: switch use_dora or perturb off",
    ),
    Rule(
        lambda c: c.perturb == "mgpo" and c.optimizer not in WITH_MOMENTUM,
        "mgpo follows the optimiser's momentum, which only adamw and sgd keep in plain form: "
        "choose one of them, or perturb 'ggpo'",
    ),
    Rule(
        lambda c: c.perturb == "mgpo" and c.optimizer == "sgd" and c.beta1 == 0,
        "mgpo follows the momentum, and beta1 is 0: set beta1 above 0, or perturb to 'ggpo'",
    ),
    Rule(
        lambda c: bool(c.intruders_every) and bool(c.use_dora),
        "intruder dimensions are counted during training for plain low-rank layers only: set intruders_every to 0, or "
        "inspect the finished adapter",
    ),
    Rule(
        lambda c: c.freeze_a and c.init == "orthogonal",
        "the orthogonal start shares its directions between A and B: with freeze_a choose another init",
    ),
    Rule(
        lambda c: bool(c.ema) and c.optimizer == "schedulefree-adamw",
        "schedule-free AdamW already averages the weights: switch ema off or choose another optimizer",
    ),
    Rule(
        lambda c: c.reg == "ba" and bool(c.fused_loss),
        "BA-LoRA needs logits, which a fused loss never makes: switch the fused loss off",
    ),
)  # fmt: skip


WARNED: tuple[Rule, ...] = (
    Rule(
        lambda c: c.grad_rule == "allora" and c.allora_mode == "gradient" and c.optimizer in ADAM_LIKE,
        "Adam-like optimisers divide the gradient's size away, so ALLoRA's rule has almost no effect: "
        "use optimizer 'sgd', or allora_mode 'lr'.",
    ),
    Rule(
        lambda c: c.init == "lora_ga" and not c.use_rslora and c.grad_rule != "allora",
        "LoRA-GA's size is derived for rank-stabilised LoRA: switch use_rslora on.",
    ),
    Rule(
        lambda c: c.init in OFFSET_INITS,
        "The saved adapter has twice the rank: it holds the change since the start.",
    ),
    Rule(
        lambda c: c.init == "lora_sb",
        "LoRA-SB trains rank x rank numbers per layer: use a larger rank than for LoRA (and more learning rate).",
    ),
    Rule(
        lambda c: c.freeze_a and c.init in ("default", "gaussian"),
        "With A frozen at random directions, learning is slower: a higher learning rate or rank makes up for it.",
    ),
    Rule(
        lambda c: c.perturb in ("ggpo", "flat") and (c.perturb_sigma or 0) >= 0.5,
        "Noise of half the weight's size and more usually destroys the model: 0.03 to 0.2 is usual.",
    ),
    Rule(
        lambda c: c.reg == "ba" and c.init != "pissa",
        "BA-LoRA's paper starts from PiSSA: set init to 'pissa' to follow it.",
    ),
)


__all__ = ["ADAM_LIKE", "CALIBRATED_INITS", "OFFSET_INITS", "Rule", "refusal", "refuse", "warnings"]
