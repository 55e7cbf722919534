"""The transcription job: a sound file in, its text with times out, once for every variant of the base."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from adapters.compression.backends import Quantization
from studio.schema import JobConfig

_SOUND = {"group": "Sound", "advanced": False}
_SOUND_MORE = {"group": "Sound", "advanced": True}
_MODEL = {"group": "Model", "advanced": False}
_MODEL_MORE = {"group": "Model", "advanced": True}


def _f(default: Any, group: dict[str, Any], description: str, **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra=group, **limits)


class TranscribeConfig(JobConfig):
    """Write down speech."""

    kind: ClassVar[str] = "transcribe"

    sound: str = _f("", _SOUND, "Sound or video file of any format.")
    name: str = _f("transcript", _SOUND_MORE, "Name of the written files.", min_length=1, max_length=80)
    reference: str = _f("", _SOUND, "What was really said: errors are counted against it.")
    language: str = _f("", _SOUND, "Language (code or name); empty = recognised. English-only models need none.")
    task: Literal["transcribe", "translate"] = _f(
        "transcribe", _SOUND, "Write down what is said, or translate it into English (multilingual models)."
    )
    times: bool = _f(
        True, _SOUND, "Let the model tell when each sentence is said. Off: times of the pieces that fit its window, as "
        "adapters are trained here."
    )  # fmt: skip
    base: str = _f("whisper-tiny.en", _MODEL, "Whisper: name in the library, directory or hub id.")
    adapters: list[str] = _f([], _MODEL, "Adapters, each NAME or NAME:STRENGTH.")
    compare: bool = _f(False, _MODEL, "Also the base alone, and each adapter by itself.")
    window: int | None = _f(
        None, _MODEL_MORE, "Seconds heard at a time; empty = the model's 30. For adapters trained with a shorter one.",
        ge=1, le=30,
    )  # fmt: skip
    quantization: Quantization = _f("none", _MODEL_MORE, "Store the base in few bits: 8bit, 4bit, int8, int4.")
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = _f("auto", _MODEL_MORE, "Precision of the weights.")
    device: str = _f("auto", _MODEL_MORE, "auto, cpu, cuda, cuda:1, mps ...")
