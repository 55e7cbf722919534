"""What the rest of the program must know of a composition method; each method says it in its ``METHOD``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Properties:
    """Properties of a composition method; the defaults are those of one prediction per adapter.

    Attributes:
        position: place in lists of methods; the smallest one is the usual choice (with regions, without regions).
        text: "own": each prediction reads the prompt as its own adapter's text encoder has it; "together": all
            adapters act in the text encoders at once, because they share a prediction.
        official_text: which adapters' text encoders te_mode "official" uses: all, or the first one's.
        constant: every adapter acts in every prediction, at its strength: it has a sum form (export as one LoRA), and a
            distilled adapter can be used.
        turns: it uses ``tau``.
        order_matters: adapters in another order give another picture.
        needs_prompt: what it does depends on the prompt and on trigger words.
        pair: it takes one concept and one style.
        regions: "none"; "predictions": every region predicts alone; "network": regions act inside the network.
        transformers: it works on SD3 and Flux, too.
        scope: with regions in the network: which layers of an adapter act, all ("spatial") or cross-attention's.
        any_scope: the scope can be chosen.
        parts: LoRA-Composer's isolation, re-initialisation and refinement are on unless switched off.
        hard: a cell belongs to a region or not; else it has a share.
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
        """It uses regions."""
        return self.regions != "none"

    @property
    def layer_text(self) -> bool:
        """Each cross-attention layer may read a text of its own (ED-LoRA)."""
        return self.regions == "network"
