"""Loading a Whisper and its processor from a transformers directory or hub id. Its repository's code is never run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.compression import backends
from adapters.errors import FamilyError, InputError
from pipelines.language.loading import LanguageModel, incomplete, opened, outputs
from pipelines.precision import choose_dtype

FRAMES_PER_SECOND = 50
"""Positions of the encoder per second of sound."""


@dataclass
class SpeechModel(LanguageModel):
    """A loaded base.

    Attributes:
        processor: features of sound and tokens of text; ``tokenizer`` is its tokenizer.
    """

    processor: Any = None

    @property
    def window(self) -> float:
        """Seconds that the encoder hears at a time."""
        return float(self.model.config.max_source_positions / FRAMES_PER_SECOND)

    @property
    def multilingual(self) -> bool:
        """Whether it knows languages besides English, and can translate."""
        return bool(getattr(self.model.generation_config, "is_multilingual", False))

    @property
    def longest(self) -> int:
        """Largest number of tokens of a transcript with its prefix."""
        return int(self.model.config.max_target_positions)

    def prefix(self, language: str = "", task: str = "transcribe") -> list[int]:
        """Tokens in front of a transcript without times: start, and with several languages language and task.

        Raises:
            InputError: an English-only model is asked for more, or the language is unknown to it.
        """
        self.check_language(language, task)
        start, quiet = (self.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
                        ("startoftranscript", "notimestamps"))  # fmt: skip
        if not self.multilingual:
            return [start, quiet]
        told = (self.language_name(language or "en"), f"<|{task}|>")
        return [start, *self.tokenizer.convert_tokens_to_ids(list(told)), quiet]

    def check_language(self, language: str = "", task: str = "transcribe") -> None:
        """Raise :class:`InputError` for a language or task that this model does not know."""
        if task not in ("transcribe", "translate"):
            raise InputError(f"The task is transcribe or translate, not '{task}'.")
        if self.multilingual:
            if language:
                self.language_name(language)
            return
        if language not in ("", "en", "english") or task != "transcribe":
            raise InputError(
                f"'{self.source}' knows English only: leave language and task as they are, or choose a multilingual "
                "Whisper."
            )

    def language_name(self, language: str) -> str:
        """The token of a language given by code or name; raises :class:`InputError` for an unknown one."""
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
        known = getattr(self.model.generation_config, "lang_to_id", None) or {}
        if f"<|{code}|>" not in known:
            told = ", ".join(sorted(name.strip("<|>") for name in known)) or "none"
            raise InputError(f"'{self.source}' does not know the language '{language}': it knows {told}.")
        return f"<|{code}|>"


def open_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    attention: str = "auto",
    quantization: backends.Quantization = "none",
    window: float | None = None,
) -> SpeechModel:
    """Load a base.

    Args:
        source: a transformers directory or hub id.
        dtype: as for :func:`pipelines.precision.choose_dtype`.
        device: a resolved torch device.
        attention: attention implementation of transformers; "auto" = its default.
        quantization: how the linear layers are stored (:mod:`adapters.compression.backends`).
        window: seconds of sound at a time; None = the model's own (30). A shorter one is faster, but a model that was
            not adapted to it hears worse: compare only models with the same window.

    Raises:
        FamilyError: it is not a Whisper.
        InputError: no such model, damaged or missing weights, no network, or a window that is not possible.
        MissingDependencyError: the quantization's package is not installed.
    """
    import transformers

    source, device = str(source), torch.device(device)
    config = opened(source, lambda: transformers.AutoConfig.from_pretrained(source))
    if config.model_type != "whisper":
        raise FamilyError(
            f"'{source}' is a {config.model_type} model, which does not write down speech: use a Whisper."
        )
    options: dict[str, Any] = {"dtype": choose_dtype(dtype, device)}
    if attention != "auto":
        options["attn_implementation"] = attention
    backends.check_foreign(config, source)
    while_loading = backends.transformers_options(quantization, options["dtype"], device)
    options |= while_loading
    processor: Any = opened(source, lambda: transformers.WhisperProcessor.from_pretrained(source), "processor")
    kind: Any = transformers.WhisperForConditionalGeneration
    model, report = opened(source, lambda: kind.from_pretrained(source, output_loading_info=True, **options))
    missing = sorted(set(report["missing_keys"]) - {"proj_out.weight"})
    if missing:
        raise incomplete(source, missing)
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    backends.as_stored_here(model)
    if window is not None:
        cut_window(model, processor, window)
    if not while_loading:
        backends.quantize(model, quantization, options["dtype"], outputs(model))
        model.to(device)
    model.requires_grad_(False).eval()
    return SpeechModel(model, processor.tokenizer, source, processor=processor)


def cut_window(model: Any, processor: Any, seconds: float) -> None:
    """Let ``model`` hear ``seconds`` at a time: fewer positions in the encoder, shorter features.

    Raises:
        InputError: a window that is not longer than 0, not of whole frames, or longer than the model's own.
    """
    frames, own = round(seconds * FRAMES_PER_SECOND), model.config.max_source_positions
    if not 1 <= frames <= own or abs(frames - seconds * FRAMES_PER_SECOND) > 1e-6 or seconds != int(seconds):
        raise InputError(
            f"A window of {seconds:g} s is not possible: use whole seconds from 1 to {own / FRAMES_PER_SECOND:g}."
        )
    table = model.model.encoder.embed_positions
    table.weight = nn.Parameter(table.weight.detach()[:frames].clone(), requires_grad=False)
    table.num_embeddings = frames
    model.config.max_source_positions = model.model.encoder.max_source_positions = frames
    made: Any = type(processor.feature_extractor)
    told = {**processor.feature_extractor.to_dict(), "chunk_length": int(seconds)}
    for derived in ("n_samples", "nb_max_frames", "feature_extractor_type", "processor_class"):
        told.pop(derived, None)
    processor.feature_extractor = made(**told)
