"""What a training method declares besides its name: its options, what it cannot be combined with, how it takes part.

All of it is plain data, read without importing the method (:mod:`adapters.discovery`). From it come the keys of the
YAML file, the flags, the form's fields, the help and the refusals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from adapters import conditions

LooksAt = Literal["nothing", "gradients", "moments", "scaled moments"]
"""What a start is given of some batches: the weights' mean gradient, or the second moment of a layer's inputs (of
inputs divided by the largest of their batch)."""

Sets = Literal["nothing", "factors", "offset", "core"]
"""What a start sets: nothing more than PEFT has; A and B; A and B with a frozen copy that is subtracted, so that the
model does not change; frozen A and B with a trained core between them."""


@dataclass(frozen=True)
class Option:
    """One option: a key of the configuration, a flag and a field of the form.

    Attributes:
        name: the key; unique among all fields of a training.
        default: value without the option; None stands for "left to the method".
        help: one sentence, the method's name first.
        type: "int", "float", "str" or "bool"; needed where the default is None.
        choices: the possible texts.
        gt, ge, lt, le: bounds of a number.
        finite: whether infinity and NaN are refused.
        advanced: whether a form shows it among the advanced ones.
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
            raise ValueError(f"'{self.name}' cannot be the key of an option")
        if self.default is None and not (self.type or self.choices):
            raise ValueError(f"option '{self.name}' needs a type")

    def annotation(self) -> Any:
        """The type of its value."""
        kinds = {"int": int, "float": float, "str": str, "bool": bool}
        kind: Any = Literal[self.choices] if self.choices else kinds[self.type or type(self.default).__name__]
        return kind | None if self.default is None else kind


@dataclass(frozen=True)
class Rule:
    """A combination, and the sentence that says what is wrong with it and what to do.

    ``when`` is a condition on the configuration's fields (:mod:`adapters.conditions`), looked at while the method is
    chosen; ``sets`` and ``looks_at`` are the method's own.
    """

    when: str
    sentence: str

    def __post_init__(self) -> None:
        conditions.names(self.when)


@dataclass(frozen=True)
class Training:
    """How a method takes part in training.

    Attributes:
        key: the field that chooses it: one of :data:`SLOTS` (by the method's name), or an option of its own (switched
            on by any value but 0, false and empty).
        options: its own.
        shared: the slot's common options that it reads.
        refused: combinations that are refused.
        warned: combinations that work but may surprise.
        looks_at: of a start: what it is given.
        sets: of a start: what its function returns.
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
    """A place in training that one method fills.

    Attributes:
        key: the field that names the method.
        stage: the stage its methods are registered in.
        off: the value that stands for no method (or for the usual one).
        help: one sentence.
        options: common options, read by the methods that list them as ``shared``.
        refused, warned: rules for every method in this place but ``off``.
        logits: whether it is for models with logits only.
        plugin: the plugin that drives all its methods, if they have none of their own.
    """

    key: str
    stage: Literal["initialise", "learn"]
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
        help="How A and B start. Whichever is chosen, the base is not touched and an ordinary LoRA is saved.",
        options=(
            Option(
                "init_batches", 8, ge=1, help="Batches of the data that the start looks at before the first step."
            ),
        ),
        refused=(
            Rule(
                "sets == 'offset' and use_dora",
                "a start away from zero with DoRA cannot be saved as an ordinary adapter: set init to 'default' or "
                "switch use_dora off",
            ),
            Rule("continue_from", "an adapter to continue from replaces the init: set init to 'default'"),
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
        help="Train at slightly disturbed weights, for flatter and smoother learning.",
        options=(Option("perturb_every", 1, ge=1, help="Number of steps between disturbances."),),
        refused=(
            Rule("use_dora", "disturbed weights are not defined for DoRA layers: switch use_dora or perturb off"),
        ),
    ),
    Slot(
        "reg", "learn", off="none", help="A term on the logits that is added to the loss.", logits=True,
    ),
)  # fmt: skip
"""The places in training; which methods fill them is in the methods' modules."""
