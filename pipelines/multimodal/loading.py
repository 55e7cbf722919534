"""Loading a vision-language model and its processor: what transformers opens as ``AutoModelForImageTextToText``.

LLaVA, LLaVA-NeXT, Qwen2-VL and Qwen2.5-VL, Idefics3 and SmolVLM and their relatives, by path or hub id. Code from the
model's repository is never run (``trust_remote_code`` stays off).
"""

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

PARTS = ("language_model", "text_model")
"""What families call the language model inside."""


@dataclass
class VisionLanguageModel(LanguageModel):
    """A loaded base.

    Attributes:
        processor: turns a conversation with pictures into the model's inputs; ``tokenizer`` is its tokenizer.
        language: name of the language model inside ``model``: adapters belong under it.
    """

    processor: Any = None
    language: str = ""


def open_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    attention: str = "auto",
    quantization: backends.Quantization = "none",
) -> VisionLanguageModel:
    """Load a base.

    Args:
        source: a transformers directory or hub id.
        dtype: as for :func:`pipelines.precision.choose_dtype`.
        device: a resolved torch device.
        attention: attention implementation of transformers; "auto" = its default.
        quantization: how the linear layers are stored (:mod:`adapters.compression.backends`).

    Raises:
        FamilyError: the model does not answer questions about pictures.
        InputError: no such model, damaged or missing weights, no network, or a processor without a chat template.
        MissingDependencyError: the quantization's package is not installed.
    """
    import transformers

    source, device = str(source), torch.device(device)
    config = opened(source, lambda: transformers.AutoConfig.from_pretrained(source))
    auto = transformers.AutoModelForImageTextToText
    if type(config) not in auto._model_mapping:
        raise FamilyError(
            f"'{source}' is a {config.model_type} model, which does not look at pictures: choose a vision-language "
            "model (LLaVA, Qwen2.5-VL, SmolVLM ...)."
        )
    options: dict[str, Any] = {"dtype": choose_dtype(dtype, device)}
    if attention != "auto":
        options["attn_implementation"] = attention
    backends.check_foreign(config, source)
    while_loading = backends.transformers_options(quantization, options["dtype"], device)
    options |= while_loading
    processor = open_processor(source)
    model, report = opened(source, lambda: auto.from_pretrained(source, output_loading_info=True, **options))
    if missing := sorted(report["missing_keys"]):
        raise incomplete(source, missing)
    language = language_part(model)
    backends.as_stored_here(model)
    if not while_loading:
        seeing = [name for name, _ in model.named_modules() if name and not f"{name}.".startswith(f"{language}.")]
        backends.quantize(model, quantization, options["dtype"], [*outputs(model), *seeing])
        model.to(device)
    model.requires_grad_(False).eval()
    return VisionLanguageModel(model, processor.tokenizer, source, processor=processor, language=language)


def open_processor(source: str) -> Any:
    """The processor of ``source``, whose tokenizer has a padding token and pads on the right.

    Raises:
        InputError: it cannot be loaded, or it has no chat template, tokenizer or padding token.
    """
    import transformers

    auto: Any = transformers.AutoProcessor
    processor: Any = opened(source, lambda: auto.from_pretrained(source), "processor")
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise InputError(f"'{source}' has no processor for pictures and texts: choose another base.")
    if not (processor.chat_template or tokenizer.chat_template):
        raise InputError(f"The processor of '{source}' has no chat template: choose a base that has one.")
    processor.chat_template = processor.chat_template or tokenizer.chat_template
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"The tokenizer of '{source}' has neither a padding nor an end token: choose another base."
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return processor


def language_part(model: nn.Module) -> str:
    """Name of the language model inside a vision-language model ("model.language_model").

    Raises:
        FamilyError: there is none (the names that were searched are given).
    """
    named: dict[str, nn.Module] = dict(model.named_modules())
    found: Any = getattr(model, "get_decoder", lambda: None)()
    for name, module in named.items():
        if name and module is found and module is not model:
            return name
    for name in sorted(named, key=len):
        if name.rpartition(".")[2] in PARTS:
            return name
    raise FamilyError(
        f"A {type(model).__name__} has no language model that adapters could belong to (searched "
        f"{', '.join(PARTS)} among {len(named)} modules): choose another base."
    )
