"""PEFT's own initialisations, which do not change the model and need no data.

default: A Kaiming-uniform, B = 0. gaussian: A normal with standard deviation 1/r, B = 0. orthogonal: A and B random,
B A = 0.
"""

from __future__ import annotations

from typing import Literal

from adapters.catalogue import Method
from adapters.options import Rule, Training

METHODS = (
    Method(
        name="default",
        title="Kaiming-uniform",
        summary="A random, B zero: the usual initialisation.",
        stage="initialise",
        makes="ordinary LoRA",
        paper="LoRA, arXiv 2106.09685",
        entry="adapters.initialise.plain:in_peft",
        training=Training(key="init"),
    ),
    Method(
        name="gaussian",
        title="Gaussian",
        summary="A normal with standard deviation 1/r, B zero: a smaller, gentler start.",
        stage="initialise",
        makes="ordinary LoRA",
        paper="LoRA, arXiv 2106.09685",
        entry="adapters.initialise.plain:in_peft",
        training=Training(key="init"),
    ),
    Method(
        name="orthogonal",
        title="Orthogonal",
        summary="A and B both random with product zero, so that both learn from the first step.",
        stage="initialise",
        makes="ordinary LoRA",
        paper="",
        entry="adapters.initialise.plain:in_peft",
        training=Training(
            key="init",
            refused=(
                Rule(
                    "freeze_a",
                    "orthogonal splits its directions between A and B: choose another init with freeze_a",
                ),
            ),
        ),
    ),
)

PEFT_NAMES: dict[str, bool | Literal["gaussian", "orthogonal"]] = {
    "default": True,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
}


def in_peft(name: str) -> bool | Literal["gaussian", "orthogonal"]:
    """PEFT's ``init_lora_weights`` for an init: PEFT's own if it has it here, else its default."""
    return PEFT_NAMES.get(name, True)
