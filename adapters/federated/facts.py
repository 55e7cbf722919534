"""What callers must know of a server rule, without loading torch: what it trains and sends, and what it allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adapters import catalogue
from adapters.catalogue import Method
from adapters.errors import InputError


@dataclass(frozen=True)
class Facts:
    """What the engine must know of a rule (``Method.properties``).

    Attributes:
        trains: what clients train and send of a layer: A and B, B alone, or the core R alone.
        linear: the server needs only the weighted sum of what clients send, so secure aggregation can hide the rest.
        changes_base: every round adds a product to W0, which clients receive as factors.
        redraws: clients begin every round with A drawn anew and B = 0.
        ragged: clients may have different ranks.
    """

    trains: Literal["A and B", "B", "R"] = "A and B"
    linear: bool = False
    changes_base: bool = False
    redraws: bool = False
    ragged: bool = False


def rules() -> tuple[Method, ...]:
    """The server rules of the catalogue."""
    return catalogue.stage("federated")


def facts(method: Method) -> Facts:
    """What the engine must know of a rule."""
    return method.typed(Facts)


def refuse_secure_aggregation(method: Method) -> None:
    """Raise :class:`InputError` for a rule that needs every client's factors, which secure aggregation hides."""
    if not facts(method).linear:
        linear = ", ".join(rule.name for rule in rules() if facts(rule).linear)
        raise InputError(
            f"Secure aggregation shows the server only the sum of what clients send, but '{method.name}' needs each "
            f"client's A and B: choose one of {linear}, or switch secure_aggregation off."
        )


def sent(found: Facts, out: int, inputs: int, rank: int, clients: int) -> tuple[int, int]:
    """Numbers per round, client and layer: (up, down).

    A rule that changes the base sends every client the factors of all; the means of FedEx and the deviations of the
    others are together as many as the stacked factors of FLoRA.
    """
    up = {"A and B": rank * (out + inputs), "B": rank * out, "R": rank * rank}[found.trains]
    return up, clients * up if found.changes_base else up
