"""Properties of a composition method that the rest of the program uses; declared in the method's ``METHOD``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Properties:
    """Properties of a composition method; the defaults are those of one prediction per adapter.

    Attributes:
        position: order in lists of methods; the smallest is the default (of those with regions, and of those without).
        text: "own": each prediction uses the prompt as encoded with its own adapter; "together": all adapters act in
            the text encoders at once, because they share a prediction.
        official_text: the adapters in the text encoders with te_mode "official": all, or the first.
        constant: every adapter acts in every prediction at its strength, so the composition is a sum (it can be
            exported as one LoRA) and a distilled adapter can be used.
        turns: it uses ``tau``.
        order_matters: the picture depends on the order of the adapters.
        needs_prompt: it depends on the prompt and on trigger words.
        pair: it takes one concept and one style.
        regions: "none"; "predictions": one prediction per region; "network": regions act inside the network.
        transformers: it also works on SD3 and Flux.
        scope: for regions in the network, the layers of an adapter that act: all ("spatial") or cross-attention.
        any_scope: the scope can be chosen.
        parts: LoRA-Composer's isolation, re-initialisation and refinement are on by default.
        hard: a cell belongs to a region entirely or not at all; otherwise it has a share.
    """

    position: int = 99
    text: Literal["own", "together"] = "own"
    official_text: Literal["together", "first"] = "together"
    constant: bool = False
    turns: bool = False
    order_matters: bool = False
    needs_prompt: bool = False
    pair: bool = False
    regions: Literal["none", "predictions", "network"] = "none"
    transformers: bool = True
    scope: Literal["spatial", "cross"] = "spatial"
    any_scope: bool = False
    parts: bool = False
    hard: bool = False

    @property
    def regional(self) -> bool:
        """Whether it uses regions."""
        return self.regions != "none"

    @property
    def layer_text(self) -> bool:
        """Whether each cross-attention layer can have its own text (ED-LoRA)."""
        return self.regions == "network"
