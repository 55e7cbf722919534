"""The metadata of a distilled LoRA: text entries in the safetensors header.

distilled_guidance   built-in w ("fixed"); default of the UNet's input ("embedding")
w_ref                guidance at weight 1 ("strength"): weight = (w - 1) / (w_ref - 1)
w_min, w_max         trained range of w, if w can be chosen
cfg_convention       "imagen": eps_w = eps_null + w (eps_c - eps_null)
null_prompt          text used as "no prompt"; any other negative prompt has no effect
prediction_type, guidance_rescale, guidance_interval, base, base_config_hash
distilled_objective  "guidance", or "consistency" (few steps)
distilled_steps, distilled_sampler   what it is made for, if different from the base
w_embedding          file with the guidance embedding, beside the LoRA
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters.errors import InputError
from pipelines.diffusion.distillation.guidance import guidance_at

CONVENTION = "imagen"


@dataclass(frozen=True)
class Mark:
    """What is known about a distilled adapter.

    Attributes:
        mode: how w is chosen: "fixed", "strength" (by the adapter's weight) or "embedding" (an input).
        guidance: w at weight 1 (w_ref of "strength").
        low, high: trained range of w.
        null_prompt: text used as "no prompt".
        prediction_type: of the base.
        rescale: guidance rescale in training.
        interval: noise levels with guidance, from 0 to 1.
        base, config_hash: name of the base and hash of its denoiser's configuration.
        objective: "guidance" or "consistency".
        steps, sampler: what it is made for; 0 and "" = as the base.
        embedding: file name of the guidance embedding (mode "embedding" only).
    """

    mode: str
    guidance: float
    low: float
    high: float
    null_prompt: str = ""
    prediction_type: str = ""
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    base: str = ""
    config_hash: str = ""
    objective: str = "guidance"
    steps: int = 0
    sampler: str = ""
    embedding: str = ""

    def to_metadata(self) -> dict[str, str]:
        """The text entries."""
        entries: dict[str, Any] = {
            "w_ref" if self.mode == "strength" else "distilled_guidance": self.guidance,
            "w_min": self.low,
            "w_max": self.high,
            "cfg_convention": CONVENTION,
            "null_prompt": self.null_prompt,
            "prediction_type": self.prediction_type,
            "guidance_rescale": self.rescale,
            "guidance_interval": f"{self.interval[0]!r} {self.interval[1]!r}",
            "base": self.base,
            "base_config_hash": self.config_hash,
            "distilled_objective": self.objective,
            "distilled_steps": self.steps,
            "distilled_sampler": self.sampler,
            "w_embedding": self.embedding,
        }
        return {key: value if isinstance(value, str) else repr(value) for key, value in entries.items()}

    def guidance_at(self, weight: float) -> float:
        """The guidance built in at ``weight`` (exact for "strength", approximate for others)."""
        return guidance_at(weight, self.guidance)

    def outside(self, w: float) -> bool:
        """Whether ``w`` is outside the trained range."""
        return not self.low - 1e-6 <= w <= self.high + 1e-6

    def __str__(self) -> str:
        few = f" for {self.steps} steps" if self.steps else ""
        chosen = {"fixed": "", "strength": ", chosen by the weight", "embedding": ", chosen by the guidance"}[self.mode]
        return f"distilled{few}, guidance {self.guidance:g} built in{chosen}"


def read_mark(metadata: Mapping[str, str]) -> Mark | None:
    """The mark in the text entries of an adapter file; None for ordinary adapters.

    Raises:
        InputError: the entries are damaged, or use another convention for w.
    """
    if "w_ref" not in metadata and "distilled_guidance" not in metadata:
        return None
    convention = metadata.get("cfg_convention", CONVENTION)
    if convention != CONVENTION:
        raise InputError(f"The distilled adapter uses the guidance convention '{convention}'; supported is imagen.")
    try:
        mode = "strength" if "w_ref" in metadata else "embedding" if metadata.get("w_embedding") else "fixed"
        guidance = float(metadata.get("w_ref") or metadata["distilled_guidance"])
        low, _, high = metadata.get("guidance_interval", "0.0 1.0").partition(" ")
        return Mark(
            mode=mode,
            guidance=guidance,
            low=float(metadata.get("w_min", guidance)),
            high=float(metadata.get("w_max", guidance)),
            null_prompt=metadata.get("null_prompt", ""),
            prediction_type=metadata.get("prediction_type", ""),
            rescale=float(metadata.get("guidance_rescale", 0.0)),
            interval=(float(low), float(high)),
            base=metadata.get("base", ""),
            config_hash=metadata.get("base_config_hash", ""),
            objective=metadata.get("distilled_objective", "guidance"),
            steps=int(metadata.get("distilled_steps", 0)),
            sampler=metadata.get("distilled_sampler", ""),
            embedding=metadata.get("w_embedding", ""),
        )
    except ValueError as error:
        raise InputError(f"The metadata of the distilled adapter is damaged ({error}).") from None


def config_hash(model: Any) -> str:
    """Hash of a denoiser's configuration, without private fields (those that start with "_")."""
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]
