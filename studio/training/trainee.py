"""Everything that learns as one module, so that one ``prepare`` and one gradient exchange serve it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from studio.training.families import Family, Tensors


class Trainee(nn.Module):
    """The denoiser and, when they learn, the text encoders.

    Args:
        family: how they are called.
        encoders: learning text encoders by name (empty: conditioning is already encoded).
    """

    def __init__(self, family: Family, encoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.denoiser: Any = family.denoiser
        self.encoders = nn.ModuleDict(encoders)
        self.text_learns = True
        self._family = [family]  # in a list, so that nothing of the pipeline is registered here

    @property
    def models(self) -> dict[str, nn.Module]:
        """Component name -> model."""
        return {self._family[0].denoiser_name: self.denoiser, **dict(self.encoders.items())}

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, given: Tensors) -> torch.Tensor:
        """The denoiser's prediction; ``given`` holds conditioning, or tokens when text encoders learn."""
        family = self._family[0]
        if self.encoders:
            tokens = {name: given[name] for name in self.encoders}
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_learns):
                given = given | family.encode(tokens, dict(self.encoders.items()))
        return family.predict(self.denoiser, noisy, times, given)
