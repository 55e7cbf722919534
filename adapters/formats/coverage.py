"""Which share of a model's linear layers an adapter changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Coverage:
    """The layers of one model that an adapter changes.

    Attributes:
        linear: how many of its linear layers.
        of: how many linear layers it has.
        others: changed layers of other kinds (convolutions, embeddings).
    """

    linear: int
    of: int
    others: int = 0

    @property
    def share(self) -> float:
        """Part of the linear layers, 0 to 1."""
        return self.linear / self.of if self.of else 0.0

    def __str__(self) -> str:
        rest = f" and {self.others} other{'s' * (self.others > 1)}" if self.others else ""
        return f"{self.linear} of {self.of} linear layers ({self.share:.0%}){rest}"


def coverage(model: nn.Module, changed: Collection[str]) -> Coverage:
    """The coverage of ``model`` by an adapter on the modules named ``changed``."""
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return Coverage(len(linear.intersection(changed)), len(linear), len(set(changed) - linear))


def trained(model: nn.Module) -> Coverage:
    """The coverage of ``model`` by the adapters that PEFT has put into it."""
    tuners = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    bases = [tuner.get_base_layer() for tuner in tuners]
    inside = {part for tuner in tuners for part in tuner.modules()} - set(bases)
    linear = {part for part in model.modules() if isinstance(part, nn.Linear | Conv1D)} - inside
    reached = sum(base in linear for base in bases)
    return Coverage(reached, len(linear), len(bases) - reached)


def told(found: Mapping[str, Coverage]) -> str:
    """Coverages by component, as text."""
    return "; ".join(f"{component} {one}" for component, one in found.items())
