"""The scene training job: photos of one or several scenes in, one ordinary PEFT adapter of a pointmap network out.

LoRA3D (arXiv 2412.07746) as in its paper: rank 16 on q, k and v, 10 epochs, 2 pairs at a time, AdamW with a rate that
falls from 1e-3 to 1e-5, no clipping. Fields shared with a reconstruction take their help and default from there.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from studio.reconstruction.schema import ADAPTER, ReconstructConfig
from studio.training.schemas import combinations
from studio.training.schemas.base import AdapterTrainConfig, changed, option
from studio.training.schemas.method import MethodFields

_MODEL = option("Model")
_MODEL_MORE = option("Model", advanced=True)
_DATA = option("Data")
_DATA_MORE = option("Data", advanced=True)
_LABELS = option("Labels", advanced=True)
_MEMORY_MORE = option("Memory and speed", advanced=True)

FINAL_RATE = 1e-5
"""The learning rate at the end of a reconstruction's calibration."""


def _same(name: str, group: dict[str, Any], **changes: Any) -> Any:
    """A field of the reconstruction, in another section."""
    return changed(ReconstructConfig, name, json_schema_extra=group, **changes)


def _default(name: str) -> Any:
    return ReconstructConfig.model_fields[name].default


class TrainSceneConfig(MethodFields, AdapterTrainConfig):
    """Calibrate a pointmap network to scenes with a LoRA that learns from its own, robustly aligned predictions."""

    kind: ClassVar[str] = "train-scene"

    # ---------------------------------------------------------------- Model
    base: str = _same("model", _MODEL)
    accept_licence: bool = _same("accept_licence", _MODEL)
    size: int | None = _same("size", _MODEL_MORE)
    device: str = _same("device", _MODEL_MORE)
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = _same("dtype", _MODEL_MORE)

    # ---------------------------------------------------------------- Data
    data: list[str] = Field(
        default_factory=list,
        description="Folder of a scene's pictures, or its video; repeatable: the adapter learns from all.",
        json_schema_extra=_DATA,
    )
    seconds_per_frame: float = _same("seconds_per_frame", _DATA_MORE)
    graph: str = _same("graph", _DATA_MORE)
    many: bool = _same("many", _DATA_MORE)
    validation_split: float = Field(
        0.0, ge=0, lt=1, description="Share of the labelled pairs held out for validation.",
        json_schema_extra=_DATA_MORE,
    )  # fmt: skip

    # ---------------------------------------------------------------- Labels
    mu: float = _same("mu", _LABELS)
    cutoff: float = _same("cutoff", _LABELS)
    share: bool = _same("share", _LABELS)
    verify: bool = _same("verify", _LABELS)
    align_steps: int = _same("steps", _LABELS)

    # ---------------------------------------------------------------- LoRA3D's own defaults
    rank: int = changed(AdapterTrainConfig, "rank", default=_default("rank"))
    targets: Literal["paper-18mb", "all-attention"] = _same("preset", option("Adapter"))
    learning_rate: float = changed(AdapterTrainConfig, "learning_rate", default=_default("lr"))
    min_lr_ratio: float = changed(AdapterTrainConfig, "min_lr_ratio", default=FINAL_RATE / _default("lr"))
    max_grad_norm: float = changed(AdapterTrainConfig, "max_grad_norm", default=0.0)
    epochs: int | None = changed(
        AdapterTrainConfig, "epochs", default=_default("epochs"),
        description="Passes over all pairs; empty: as many as steps need.",
    )  # fmt: skip
    batch_size: int = changed(
        AdapterTrainConfig, "batch_size", default=2, description="Pairs per forward pass and process."
    )
    chunk: int = _same("chunk", _MEMORY_MORE)
    tf32: bool = changed(AdapterTrainConfig, "tf32", default=False)  # points lose digits
    checkpoint_every: int = changed(AdapterTrainConfig, "checkpoint_every", default=50)
    validation_every: int = changed(
        AdapterTrainConfig, "validation_every", description="Validate every N steps, if pairs are held out."
    )

    # ---------------------------------------------------------------- of the others, what a scene has no use for
    sample_prompts: ClassVar[list[str]] = []  # type: ignore[misc]
    sample_every: ClassVar[int] = 0  # type: ignore[misc]
    sample_at_start: ClassVar[bool] = False  # type: ignore[misc]
    skip_broken: ClassVar[bool] = False  # type: ignore[misc]
    workers: ClassVar[int] = 0  # type: ignore[misc]

    @classmethod
    def of(cls, config: ReconstructConfig) -> TrainSceneConfig:
        """The training for a calibrating reconstruction."""
        same = {name: getattr(config, name) for name in cls.model_fields.keys() & type(config).model_fields.keys()}
        return cls(**{
            **same, "preset": "", "name": ADAPTER, "base": config.model, "targets": config.preset,
            "align_steps": config.steps,
            "steps": cls.model_fields["steps"].default, "learning_rate": config.lr,
            "min_lr_ratio": min(1.0, FINAL_RATE / config.lr), "save_every": 0,
        })  # fmt: skip

    @model_validator(mode="after")
    def _combinations(self) -> TrainSceneConfig:
        combinations.refuse(self)
        return self
