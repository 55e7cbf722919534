"""Adapters of any format on a Whisper, any number of them at strengths of their own."""

from __future__ import annotations

from typing import ClassVar

from pipelines.language.adapters import AdaptedModel
from pipelines.speech.loading import SpeechModel


class AdaptedSpeech(AdaptedModel):
    """A Whisper with adapters that can be switched.

    Args:
        base: a loaded model; it is not changed.
        name: its name in messages.
    """

    tasks: ClassVar[tuple[str | None, ...]] = (None, "SEQ_2_SEQ_LM")
    does: ClassVar[str] = "writing down speech"

    def __init__(self, base: SpeechModel, name: str = "this base model") -> None:
        super().__init__(base.model, name)
