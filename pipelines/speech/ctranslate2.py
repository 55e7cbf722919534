"""Whisper in CTranslate2's format (faster-whisper), read and written as an ordinary transformers directory.

``model.bin`` (version 6), little endian: uint32 version; name of the specification; uint32 revision; uint32 number of
variables, each a name, uint8 rank, uint32 dimensions, uint8 type, uint32 bytes and its data; then the aliases. A name
is uint16 length (with a closing zero) and its bytes. Names map as

    X/layer_i/self_attention/linear_0 = q | k | v (rows; k has no bias), linear_1 = out_proj
    decoder/layer_i/attention/linear_0 = q, linear_1 = k | v, linear_2 = out_proj
    X/layer_i/ffn/linear_0, linear_1 = fc1, fc2;   gamma, beta = weight, bias of a LayerNorm
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.errors import InputError
from pipelines.speech.loading import FRAMES_PER_SECOND

VERSION, SPECIFICATION = 6, "WhisperSpec"
TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
"""CTranslate2's numbers of types."""

END, LAST_TEXT = "<|endoftext|>", "<|startoftranscript|>"


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, kind: str) -> int:
        (found,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += struct.calcsize(kind)
        return int(found)

    def bytes(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise struct.error("the file is shorter than it says")
        self.at += count
        return self.data[self.at - count : self.at]

    def name(self) -> str:
        return self.bytes(self.number("H")).rstrip(b"\0").decode()


def read(file: Path) -> dict[str, np.ndarray]:
    """The variables of a Whisper's ``model.bin`` by name.

    Raises:
        InputError: another version or model, numbers in few bits, or a damaged file.
    """
    reader = _Reader(file.read_bytes())
    try:
        version, specification, _ = reader.number("I"), reader.name(), reader.number("I")
        if (version, specification) != (VERSION, SPECIFICATION):
            raise InputError(
                f"'{file}' is version {version} of '{specification}', and only version {VERSION} of {SPECIFICATION} "
                "is read."
            )
        found = {}
        for _ in range(reader.number("I")):
            name = reader.name()
            shape = [reader.number("I") for _ in range(reader.number("B"))]
            kind = reader.number("B")
            data = reader.bytes(reader.number("I"))
            if kind not in TYPES:
                raise InputError(f"'{file}' stores '{name}' in a type that is not read ({kind}).")
            found[name] = np.frombuffer(data, TYPES[kind]).reshape(shape)
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"'{file}' is not a CTranslate2 model, or is damaged ({error}).") from None
    if quantised := next((name for name in found if name.endswith("weight_scale")), None):
        raise InputError(f"'{file}' is stored in few bits ('{quantised}'): use a model in float16 or float32.")
    return found


def to_transformers(variables: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The state dict of ``WhisperForConditionalGeneration``."""
    state: dict[str, Tensor] = {}
    for name, value in variables.items():
        if value.ndim == 0:
            continue
        tensor = torch.from_numpy(value.copy())
        for theirs, part in _named(name, tensor):
            state[theirs] = part
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


def _named(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    stack, _, rest = name.partition("/")
    end = rest.rpartition("/")[2]
    kind = {"gamma": "weight", "beta": "bias"}.get(end, end)
    layer = re.fullmatch(r"layer_(\d+)/(.*)/\w+", rest)
    prefix = f"model.{stack}"
    if layer is None:
        own = {"embeddings/weight": "embed_tokens.weight", "position_encodings/encodings": "embed_positions.weight"}
        other = rest.rpartition("/")[0].replace("/", ".")
        return [(f"{prefix}.{own.get(rest, f'{other}.{kind}')}", tensor)]
    prefix = f"{prefix}.layers.{layer[1]}"
    part, _, piece = layer[2].partition("/")
    attention = {"self_attention": "self_attn", "attention": "encoder_attn"}.get(part, "")
    if piece == "layer_norm":
        norm = f"{attention}_layer_norm" if attention else "final_layer_norm"
        return [(f"{prefix}.{norm}.{kind}", tensor)]
    if not attention:
        return [(f"{prefix}.fc{int(piece[-1]) + 1}.{kind}", tensor)]
    places = {
        ("self_attn", "linear_0"): "qkv", ("self_attn", "linear_1"): "o", ("encoder_attn", "linear_0"): "q",
        ("encoder_attn", "linear_1"): "kv", ("encoder_attn", "linear_2"): "o",
    }[attention, piece]  # fmt: skip
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    return [
        (f"{prefix}.{attention}.{names[letter]}.{kind}", rows.contiguous())
        for letter, rows in zip(places, tensor.chunk(len(places)), strict=True)
        if not (letter == "k" and kind == "bias")  # zero, and Whisper has none
    ]


def convert(folder: Path, target: Path) -> None:
    """Write the CTranslate2 Whisper in ``folder`` (with ``config.json`` and ``tokenizer.json``) as a transformers
    directory ``target``, in the precision it has.

    Raises:
        InputError: a file is missing, damaged or of another kind.
    """
    import transformers

    whisper: Any = transformers
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer: Any = whisper.WhisperTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raise their own
        raise InputError(f"'{folder}' has no readable config.json and tokenizer.json ({error}).") from None
    variables = read(folder / "model.bin")
    state = to_transformers(variables)
    multilingual = "<|fr|>" in tokenizer.get_vocab() and len(state["proj_out.weight"]) >= 51865
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (END, LAST_TEXT, "<|notimestamps|>")}
    stacks = {stack: sum(f"{stack}/layer_{n}/ffn/linear_0/weight" in variables for n in range(64)) for stack in
              ("encoder", "decoder")}  # fmt: skip
    width = state["proj_out.weight"].shape[1]
    config = whisper.WhisperConfig(
        vocab_size=len(state["proj_out.weight"]), d_model=width,
        num_mel_bins=state["model.encoder.conv1.weight"].shape[1],
        max_source_positions=len(state["model.encoder.embed_positions.weight"]),
        max_target_positions=len(state["model.decoder.embed_positions.weight"]),
        encoder_layers=stacks["encoder"], decoder_layers=stacks["decoder"],
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=len(state["model.encoder.layers.0.fc1.weight"]),
        decoder_ffn_dim=len(state["model.decoder.layers.0.fc1.weight"]),
        bos_token_id=ids[END], eos_token_id=ids[END], pad_token_id=ids[END], decoder_start_token_id=ids[LAST_TEXT],
        dtype=str(state["model.encoder.conv1.weight"].dtype).removeprefix("torch."),
    )  # fmt: skip
    with torch.device("meta"):
        model = whisper.WhisperForConditionalGeneration(config)
    missing, extra = model.load_state_dict(state, strict=False, assign=True)
    if missing or extra:
        raise InputError(f"'{folder / 'model.bin'}' does not fit Whisper: {[*missing, *extra][0]} is odd.")
    model.tie_weights()
    model.generation_config = whisper.GenerationConfig(
        **_generation(told, tokenizer, ids, multilingual, config.max_target_positions)
    )
    model.save_pretrained(target)
    tokenizer.add_prefix_space = False
    extractor = whisper.WhisperFeatureExtractor(
        feature_size=config.num_mel_bins, chunk_length=config.max_source_positions // FRAMES_PER_SECOND
    )
    whisper.WhisperProcessor(extractor, tokenizer).save_pretrained(target)


def _generation(
    told: Mapping[str, Any], tokenizer: Any, ids: Mapping[str, int], multilingual: bool, longest: int
) -> dict[str, Any]:
    """What ``generate`` needs to know of a Whisper."""
    vocabulary = tokenizer.get_vocab()
    found: dict[str, Any] = {
        "bos_token_id": ids[END], "eos_token_id": ids[END], "pad_token_id": ids[END],
        "decoder_start_token_id": ids[LAST_TEXT], "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": vocabulary.get("<|startofprev|>"), "is_multilingual": multilingual,
        "max_initial_timestamp_index": 50, "max_length": longest, "return_timestamps": False,
        "alignment_heads": told.get("alignment_heads"), "suppress_tokens": told.get("suppress_ids"),
        "begin_suppress_tokens": told.get("suppress_ids_begin"),
    }  # fmt: skip
    if multilingual:
        languages = {name: number for name, number in vocabulary.items() if re.fullmatch(r"<\|[a-z]{2,3}\|>", name)}
        found |= {
            "lang_to_id": languages,
            "task_to_id": {task: vocabulary[f"<|{task}|>"] for task in ("transcribe", "translate")},
        }
    return {name: value for name, value in found.items() if value is not None}
