"""K-mer models: a new one, or a checkpoint of BERT's family with a k-mer vocabulary (DNABERT, LoRA-BERT, our own)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from adapters.errors import InputError
from pipelines.genomics.kmers import Kmers
from pipelines.language.loading import LanguageModel, incomplete, longest_input, opened
from pipelines.precision import choose_dtype

Head = Literal["masked", "classification"]

_AUTO = {"masked": "AutoModelForMaskedLM", "classification": "AutoModelForSequenceClassification"}

HEADS = ("pooler", "classifier")
"""Modules of a classifier that learn as a whole; a model that has only learnt hidden k-mers has no pooler of use."""


class RnaModel(LanguageModel):
    """A loaded base whose tokens are k-mers."""

    @property
    def kmers(self) -> Kmers:
        found: Kmers = self.tokenizer
        return found


def new_model(
    kmers: Kmers, head: Head, *, width: int = 768, depth: int = 12, heads: int = 12, labels: Sequence[str] = ()
) -> RnaModel:
    """An untrained BERT that reads ``kmers.longest`` tokens; the defaults are the paper's (86.9 M parameters).

    Args:
        width: of the hidden states; the feed-forward layers have four times as much.
        labels: for classification, the classes in the order of the outputs.

    Raises:
        InputError: a width that the heads do not divide.
    """
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    if width % heads:
        raise InputError(f"The width {width} cannot be divided among {heads} heads.")
    config = BertConfig(
        vocab_size=len(kmers), hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=kmers.longest, pad_token_id=kmers.number("[PAD]"),
        **_named(labels),
    )  # fmt: skip
    made: Any = (BertForMaskedLM if head == "masked" else BertForSequenceClassification)(config)
    return RnaModel(made.eval(), kmers, "new", ())


def open_base(
    source: str | Path,
    head: Head,
    *,
    labels: Sequence[str] = (),
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    attention: str = "auto",
    longest: int | None = None,
    stride: int | None = None,
) -> RnaModel:
    """Load a checkpoint with a k-mer vocabulary; every parameter is frozen.

    Args:
        source: directory with ``config.json``, ``vocab.txt`` (or ``tokenizer.json``) and weights; of a
            ``pytorch_model.bin`` only tensors are read.
        labels: for classification, the classes in the order of the outputs; empty = as the checkpoint says.
        dtype: as for :func:`pipelines.precision.choose_dtype`.
        longest: tokens of one input; above what the checkpoint reads, new rows of positions are added at random. None =
            the checkpoint's.
        stride: letters between tokens; None = the checkpoint's.

    Raises:
        InputError: no such model, damaged, no k-mer vocabulary, or more positions than it can be given.
    """
    folder, device = Path(source), torch.device(device)
    if not folder.is_dir():
        raise InputError(f"'{source}' is no folder: k-mer models are opened from folders, fetch it first.")
    config = opened(str(folder), lambda: read_config(folder))
    reads = longest_input(config)
    kmers = Kmers.read(folder, longest or reads or 512, stride)
    if config.vocab_size < len(kmers):
        raise InputError(
            f"The vocabulary in '{folder}' has {len(kmers)} tokens, the model {config.vocab_size}: they do not belong "
            "together."
        )
    options: dict[str, Any] = {"dtype": choose_dtype(dtype, device), "config": config}
    if attention != "auto":
        options["attn_implementation"] = attention
    for name, value in _named(labels).items():
        setattr(config, name, value)
    import transformers

    auto: Any = getattr(transformers, _AUTO[head])
    model, report = opened(
        str(folder), lambda: auto.from_pretrained(folder, output_loading_info=True, **options)
    )  # fmt: skip
    fresh = sorted({key.rsplit(".", 1)[0] for key in report["missing_keys"]})
    inner = [name for name in fresh if not any(part in name.split(".") for part in (*HEADS, "cls", "lm_head"))]
    if inner or (head == "masked" and fresh):
        raise incomplete(folder, inner or fresh)
    if reads is not None and kmers.longest > reads:
        longer_positions(model, kmers.longest)
    return RnaModel(model.to(device).requires_grad_(False).eval(), kmers, str(folder), tuple(fresh))


def longer_positions(model: Any, longest: int) -> str:
    """Give a BERT rows for ``longest`` positions, new ones at random; returns the path of its position embeddings.

    Raises:
        InputError: it has no absolute positions that could be lengthened.
    """
    path = positions(model)
    if path is None:
        raise InputError(f"The positions of a {model.config.model_type} model cannot be lengthened: lower max_length.")
    old: Any = model.get_submodule(path)
    new = nn.Embedding(longest, old.weight.shape[1], dtype=old.weight.dtype, device=old.weight.device)
    with torch.no_grad():
        new.weight.normal_(0.0, float(getattr(model.config, "initializer_range", 0.02)))
        new.weight[: len(old.weight)] = old.weight
    around: Any = model.get_submodule(path.rpartition(".")[0])
    around.position_embeddings = new
    around.register_buffer("position_ids", torch.arange(longest, device=new.weight.device)[None], persistent=False)
    if hasattr(around, "token_type_ids"):
        kinds = torch.zeros(1, longest, dtype=torch.long, device=new.weight.device)
        around.register_buffer("token_type_ids", kinds, persistent=False)
    model.config.max_position_embeddings = longest
    return path


def positions(model: nn.Module) -> str | None:
    """Path of the absolute position embeddings; None if there are none."""
    return next((name for name, _ in model.named_modules() if name.endswith("embeddings.position_embeddings")), None)


def head_modules(model: nn.Module) -> list[str]:
    """Paths of pooler and classifier, which learn as a whole."""
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in HEADS]


def encoder_digest(model: Any) -> str:
    """Fingerprint of what a base has learnt: every weight but those of heads and pooler, in fp32."""
    total = hashlib.blake2b(digest_size=20)
    for name, value in sorted(model.base_model.state_dict().items()):
        if not any(part in name.split(".") for part in HEADS):
            total.update(f"{name} {tuple(value.shape)}".encode())
            total.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _named(labels: Sequence[str]) -> dict[str, Any]:
    if not labels:
        return {}
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)}}  # fmt: skip


def read_config(folder: Path) -> Any:
    """The configuration; files from before transformers 3 do not say that they are BERT's."""
    from transformers import AutoConfig, BertConfig

    file = folder / "config.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    heads = " ".join(map(str, told.get("architectures") or ())) if isinstance(told, dict) else ""
    if isinstance(told, dict) and "model_type" not in told and ("Bert" in heads or "hidden_size" in told):
        return BertConfig.from_pretrained(folder)
    return AutoConfig.from_pretrained(folder)
