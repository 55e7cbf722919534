"""What a training method declares besides its name: its options, what it cannot be combined with, how it takes part.

All of it is plain data, read without importing the method (:mod:`adapters.discovery`). The YAML keys, flags, form
fields, help and refusals are generated from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from adapters import conditions

LooksAt = Literal["nothing", "gradients", "moments", "scaled moments"]
"""What an initialisation measures on some batches: the weights' mean gradient, or the second moment of a layer's inputs
("scaled": of inputs divided by the absolute value of the largest entry of their batch)."""

Sets = Literal["nothing", "factors", "offset", "core"]
"""What an initialisation sets: nothing beyond PEFT; A and B; A and B with a frozen copy that is subtracted, so that the
model does not change; frozen A and B with a trained core between them."""


@dataclass(frozen=True)
class Option:
    """One option: a key of the configuration, a flag and a field of the form.

    Attributes:
        name: the key; unique among all fields of a training.
        default: None means that the method decides.
        help: one sentence, the method's name first.
        type: "int", "float", "str" or "bool"; needed if the default is None.
        choices: the possible values of a text.
        gt, ge, lt, le: bounds of a number.
        finite: whether infinity and NaN are refused.
        advanced: whether a form lists it among the advanced fields.
    """

    name: str
    default: float | int | str | bool | None
    help: str
    type: Literal["", "int", "float", "str", "bool"] = ""
    choices: tuple[str, ...] = ()
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    finite: bool = False
    advanced: bool = True

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"'{self.name}' is not a valid name for an option")
        if self.default is None and not (self.type or self.choices):
            raise ValueError(f"option '{self.name}' needs a type")

    def annotation(self) -> Any:
        """The type of its value."""
        kinds = {"int": int, "float": float, "str": str, "bool": bool}
        kind: Any = Literal[self.choices] if self.choices else kinds[self.type or type(self.default).__name__]
        return kind | None if self.default is None else kind


@dataclass(frozen=True)
class Rule:
    """A combination of settings, and the sentence that says what is wrong with it and what to do.

    ``when`` is a condition on the configuration's fields (:mod:`adapters.conditions`), checked if the method is chosen;
    in it, ``sets`` and ``looks_at`` are the method's own.
    """

    when: str
    sentence: str

    def __post_init__(self) -> None:
        conditions.names(self.when)


@dataclass(frozen=True)
class Training:
    """How a method takes part in training.

    Attributes:
        key: the field that chooses it: one of :data:`SLOTS` (by the method's name), or one of its own options (switched
            on by any value but 0, false and empty).
        options: its own options.
        shared: names of the slot's common options that it uses.
        refused: combinations that are refused.
        warned: combinations that work but may surprise.
        looks_at: for an initialisation: what it measures.
        sets: for an initialisation: what its function returns.
        plugin: ``"module:class"`` of its :class:`~adapters.plugin.Plugin`, if the method's entry is something else.
    """

    key: str
    options: tuple[Option, ...] = ()
    shared: tuple[str, ...] = ()
    refused: tuple[Rule, ...] = ()
    warned: tuple[Rule, ...] = ()
    looks_at: LooksAt = "nothing"
    sets: Sets = "nothing"
    plugin: str = ""


@dataclass(frozen=True)
class Slot:
    """A place in training for one method at a time.

    Attributes:
        key: the field that names the method.
        stage: the stage of its methods.
        off: the value for no method (or for the usual one).
        help: one sentence.
        options: common options, for the methods that list them as ``shared``.
        refused, warned: rules for every method in this place except ``off``.
        logits: whether it is only for models with logits.
        plugin: ``"module:class"`` of the plugin that applies all its methods; empty if each has its own.
    """

    key: str
    stage: Literal["initialise", "learn", "layers"]
    off: str
    help: str
    options: tuple[Option, ...] = ()
    refused: tuple[Rule, ...] = ()
    warned: tuple[Rule, ...] = ()
    logits: bool = False
    plugin: str = ""


SLOTS: tuple[Slot, ...] = (
    Slot(
        key="init",
        stage="initialise",
        off="default",
        help="How A and B are initialised. In every case the base is not changed and an ordinary LoRA is saved.",
        options=(
            Option(
                "init_batches", 8, ge=1, help="Batches that a data-driven init measures before the first step."
            ),
        ),
        refused=(
            Rule(
                "sets == 'offset' and use_dora",
                "with DoRA, an init whose update does not start at zero cannot be saved as an ordinary adapter: set "
                "init to 'default' or switch use_dora off",
            ),
            Rule("continue_from", "continue_from loads A and B, which an init would replace: set init to 'default'"),
        ),
        warned=(
            Rule("sets == 'offset'", "The saved adapter has twice the rank: it holds the change since the start."),
        ),
        plugin="adapters.initialise.start:StartPlugin",
    ),
    Slot("grad_rule", "learn", off="plain", help="How the gradients of A and B are scaled."),
    Slot(
        key="perturb",
        stage="learn",
        off="none",
        help="Train at slightly perturbed weights, for flatter minima and a smoother loss.",
        options=(Option("perturb_every", 1, ge=1, help="Perturb every this many steps."),),
        refused=(
            Rule("use_dora", "perturbed weights are not defined for DoRA layers: switch use_dora or perturb off"),
        ),
    ),
    Slot(
        "reg", "learn", off="none", help="A term on the logits that is added to the loss.", logits=True,
    ),
    Slot(
        key="method",
        stage="layers",
        off="lora",
        help="What is trained: an ordinary LoRA, or a mixture of LoRA experts, of which each token uses some.",
        options=(
            Option(
                "experts",
                None,
                type="str",
                advanced=False,
                help="Experts per layer: a number, numbers for blocks of layers from bottom to top (2,4,6,8), or a "
                "shape (triangle, inverted-triangle, hourglass, rectangle, diamond); empty = the method's own. x-lora: "
                "the adapters to mix, separated by commas.",
            ),
            Option("experts_per_token", None, type="int", ge=1, help="How many experts a token uses; empty = 2."),
            Option(
                "router_loss",
                None,
                type="float",
                ge=0,
                finite=True,
                help="Weight of the loss that balances the experts; empty = the method's own; 0 = none.",
            ),
            Option(
                "router_loss_scope",
                None,
                choices=("module", "layer", "model"),
                help="What is balanced together: each router, a layer's routers, or the whole model; empty = layer.",
            ),
        ),
        refused=(
            Rule("init != 'default'", "an init is for a LoRA, and experts have their own start: set init to 'default'"),
            Rule("freeze_a", "freeze_a is for a LoRA, not for a mixture of experts: switch it off"),
            Rule("grad_rule != 'plain'", "a grad_rule is for a LoRA, not for a mixture of experts: set it to 'plain'"),
            Rule("perturb != 'none'", "perturb is for a LoRA, not for a mixture of experts: set it to 'none'"),
            Rule("intruders_every > 0", "intruders_every measures a LoRA, not a mixture of experts: set it to 0"),
            Rule("rank_pattern or alpha_pattern", "experts have one rank: leave rank_pattern and alpha_pattern empty"),
            Rule("continue_from", "a mixture of experts starts anew: leave continue_from empty"),
        ),
        logits=True,
    ),
)  # fmt: skip
"""The places in training; the methods for them are in the methods' modules."""
