"""Loading a language model and its tokenizer from a transformers directory or hub id, for a task and precision.

Code from the model's repository is never run (``trust_remote_code`` stays off).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from adapters.compression import backends
from adapters.compression.structure import read_pruning
from adapters.errors import FamilyError, InputError, MissingDependencyError
from pipelines.language.compressed import Manifest, open_compressed, read_manifest
from pipelines.precision import choose_dtype

Task = Literal["causal", "classification", "masked"]


@dataclass
class LanguageModel:
    """A loaded base.

    Attributes:
        model: the transformers model, frozen and in evaluation mode.
        tokenizer: with a padding token and, if there is one, a chat template.
        source: the path or hub id it was loaded from.
        fresh: modules without weights in the checkpoint (a new classification head), which must be trained and saved.
    """

    model: Any
    tokenizer: Any
    source: str
    fresh: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.model.parameters()).device
        return found

    @property
    def architecture(self) -> str:
        """The model type of transformers ("llama", "bert", ...)."""
        return str(self.model.config.model_type)

    @property
    def longest(self) -> int | None:
        """Largest number of tokens the model can read; None if its configuration does not say."""
        return longest_input(self.model.config)


def longest_input(config: Any) -> int | None:
    """Largest number of tokens that a model with this transformers configuration can read; None if it does not say."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config  # of a vision-language model
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        found = getattr(config, name, None)
        if isinstance(found, int) and found > 0:
            # RoBERTa's positions start after the padding index
            return found - (2 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0)
    return None


def open_model(
    source: str | Path,
    task: Task = "causal",
    *,
    labels: Sequence[str] = (),
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    attention: str = "auto",
    quantization: str = "none",
    chat_template: str = "",
) -> LanguageModel:
    """Load a base for a task.

    Args:
        source: a transformers directory or hub id.
        task: causal, classification or masked.
        labels: for classification, the names of the classes in the order of the head's outputs.
        dtype: as for :func:`pipelines.precision.choose_dtype`.
        device: a resolved torch device.
        attention: attention implementation of transformers; "auto" = its default.
        quantization: store the linear layers, except the output layer, in few bits, see
            :mod:`adapters.compression.backends`.
        chat_template: Jinja text that replaces the tokenizer's own.

    Raises:
        FamilyError: the model cannot do the task.
        InputError: no such model, damaged or missing weights, no network, fewer than two labels, a quantization that
            does not work here, or weights stored by a package that does not.
        MissingDependencyError: the quantization's package is not installed.
    """
    source, device = str(source), torch.device(device)
    config = opened(source, lambda: _auto().AutoConfig.from_pretrained(source))
    kind = {"causal": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification",
            "masked": "AutoModelForMaskedLM"}[task]  # fmt: skip
    auto = getattr(_auto(), kind)
    if type(config) not in auto._model_mapping or (task == "causal" and _is_masked(config)):
        raise FamilyError(
            f"'{source}' is a {config.model_type} model, which cannot do the task '{task}': {_OTHER_TASK[task]}."
        )
    options: dict[str, Any] = {"dtype": choose_dtype(dtype, device)}
    if attention != "auto":
        options["attn_implementation"] = attention
    if task == "classification":
        if len(labels) < 2:
            raise InputError(f"Classification needs at least two labels, found {len(labels)}.")
        options |= {"num_labels": len(labels), "id2label": dict(enumerate(labels)),
                    "label2id": {label: number for number, label in enumerate(labels)}}  # fmt: skip
    backends.check_foreign(config, source)
    manifest = read_manifest(source)
    if manifest is not None:
        return _compressed(source, manifest, auto, config, device, quantization, chat_template, options)
    while_loading = backends.transformers_options(quantization, options["dtype"], device)
    options |= while_loading
    tokenizer = open_tokenizer(source, chat_template)
    opener = _opener(source, auto, config)
    model, report = opened(source, lambda: opener.from_pretrained(source, output_loading_info=True, **options))
    fresh = sorted({key.rsplit(".", 1)[0] for key in report["missing_keys"]})
    if fresh and task != "classification":
        raise incomplete(source, fresh)
    backends.as_stored_here(model)
    if not while_loading:
        backends.quantize(model, quantization, options["dtype"], outputs(model))
        model.to(device)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return LanguageModel(model.requires_grad_(False).eval(), tokenizer, source, tuple(fresh))


def _compressed(
    source: str, manifest: Manifest, auto: Any, config: Any, device: torch.device, quantization: str,
    chat_template: str, options: dict[str, Any],
) -> LanguageModel:  # fmt: skip
    """A base of :mod:`pipelines.language.compressed`."""
    if quantization != "none":
        raise InputError(f"'{source}' is compressed already ({manifest.bits:.2f} bits): leave quantization at 'none'.")
    for name in ("num_labels", "id2label", "label2id"):
        if name in options:
            setattr(config, name, options.pop(name))
    tokenizer = open_tokenizer(source, chat_template)
    model, fresh = open_compressed(Path(source), manifest, auto, config, **options)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return LanguageModel(model.to(device).requires_grad_(False).eval(), tokenizer, source, tuple(fresh))


def _opener(source: str, auto: Any, config: Any) -> Any:
    """What loads the weights: transformers' automatic class; for a pruned model whose blocks have different sizes, one
    that is built with them."""
    pruning = read_pruning(Path(source))
    if pruning is None or pruning.uniform:
        return auto
    from adapters.compression.slicing import narrowed

    return narrowed(auto._model_mapping[type(config)], pruning)


def natural_task(source: str | Path) -> Task:
    """The task a model was pre-trained for: "masked" for BERT and its relatives, else "causal".

    Raises:
        InputError: no such model, or no network.
    """
    config = opened(str(source), lambda: _auto().AutoConfig.from_pretrained(str(source)))
    return "masked" if _is_masked(config) else "causal"


def _is_masked(config: Any) -> bool:
    """Whether a model attends to both sides of a token; transformers would load it as causal too."""
    return type(config) in _auto().AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)


_OTHER_TASK = {
    "causal": "choose a generative model (Llama, Qwen, SmolLM, GPT ...), or the task 'masked' or 'classification'",
    "classification": "choose another base",
    "masked": "choose a masked language model (BERT, RoBERTa ...), or the task 'causal'",
}


def open_tokenizer(source: str, chat_template: str = "") -> Any:
    """The tokenizer of ``source``, with a padding token.

    Raises:
        InputError: it cannot be loaded, or it has neither a padding nor an end token.
    """
    tokenizer = opened(source, lambda: _auto().AutoTokenizer.from_pretrained(source), "tokenizer")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"The tokenizer of '{source}' has neither a padding nor an end token: choose another base."
            )
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template:
        tokenizer.chat_template = chat_template
    tokenizer.padding_side = "right"
    return tokenizer


def outputs(model: Any) -> list[str]:
    """Paths of the layers that give the model's results; they stay in full precision."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head or name in _HEADS]


_HEADS = ("score", "classifier")


def _auto() -> Any:
    import transformers

    return transformers


def incomplete(source: str | Path, missing: Sequence[str]) -> InputError:
    """The error about weights that a checkpoint lacks."""
    more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
    return InputError(f"The weights in '{source}' are incomplete: '{missing[0]}'{more} missing.")


def opened(source: str, load: Callable[[], Any], what: str = "model") -> Any:
    """The result of ``load``; errors of loading become one sentence."""
    place = Path(source)
    if place.is_dir() and not (place / "config.json").is_file():
        other = " (it is an image pipeline)" if (place / "model_index.json").is_file() else ""
        raise InputError(f"'{source}' is not a language model: it has no config.json{other}.")
    if place.is_file():
        raise InputError(f"'{source}' is a single file: give the directory of a transformers model.")
    try:
        return load()
    except MissingDependencyError:
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if place.exists():
            raise InputError(f"The {what} in '{source}' cannot be loaded ({reason}).") from None
        raise InputError(
            f"'{source}' is not a local model and cannot be fetched from the hub ({reason}): check the name and the "
            "network."
        ) from None
    except pickle.UnpicklingError:
        raise InputError(
            f"The {what} in '{source}' is a pickle that holds more than tensors, which is never opened: save it as "
            ".safetensors."
        ) from None
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise InputError(f"The {what} in '{source}' is damaged ({error}).") from None
        raise
