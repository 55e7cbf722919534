"""Starts that change nothing and need nothing: PEFT's own.

default: A Kaiming-uniform, B = 0. gaussian: A normal with deviation 1/r, B = 0. orthogonal: A and B random, B A = 0.
"""

from __future__ import annotations

from typing import Literal

from adapters.catalogue import Method
from adapters.options import Rule, Training

METHODS = (
    Method(
        name="default",
        title="Kaiming-uniform",
        summary="A random, B zero: the usual start, for everything.",
        stage="initialise",
        makes="ordinary LoRA",
        paper="LoRA, arXiv 2106.09685",
        entry="adapters.initialise.plain:in_peft",
        training=Training(key="init"),
    ),
    Method(
        name="gaussian",
        title="Gaussian",
        summary="A normal with deviation 1/r, B zero: a smaller, gentler start.",
        stage="initialise",
        makes="ordinary LoRA",
        paper="LoRA, arXiv 2106.09685",
        entry="adapters.initialise.plain:in_peft",
        training=Training(key="init"),
    ),
    Method(
        name="orthogonal",
        title="Orthogonal",
        summary="A and B both random but with product zero, so that both learn from the first step.",
        stage="initialise",
        makes="ordinary LoRA",
        paper="",
        entry="adapters.initialise.plain:in_peft",
        training=Training(
            key="init",
            refused=(
                Rule(
                    "freeze_a",
                    "the orthogonal start shares its directions between A and B: with freeze_a choose another init",
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
    """PEFT's ``init_lora_weights`` for an init: its own where the start changes nothing, else its default."""
    return PEFT_NAMES.get(name, True)
