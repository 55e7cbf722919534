"""What both jobs of a transfer share: opening a base, the names of the adapters on the source, a remark."""

from __future__ import annotations

import hashlib

from pipelines.language.loading import LanguageModel, open_model
from studio import devices
from studio.transfer.schema import TransferFields

TEACHER, JUDGE = "teacher", "judge"
"""Names of both adapters on the source."""

FEW_SEEDS = 3


def open_base(config: TransferFields, source: str, chat_template: str, quantization: str = "none") -> LanguageModel:
    """A base on the job's device in its precision; raises as :func:`~pipelines.language.loading.open_model`."""
    return open_model(
        source, dtype=config.dtype, device=devices.resolve(config.device), chat_template=chat_template,
        quantization=quantization,
    )  # fmt: skip


def digest(*parts: str) -> str:
    """SHA-256 of texts in this order."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def on_seeds(count: int) -> list[str]:
    """A remark if there are few."""
    few = f"There are only {count} seeds: {FEW_SEEDS} or more make more varied inputs."
    return [few] if count < FEW_SEEDS else []
