"""The base of a compression: its weights read from files one at a time, and what rows of text say about them."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adapters import files
from adapters.compression.structure import read_pruning
from adapters.errors import InputError
from adapters.initialise.statistics import capture_squares
from adapters.progress import Monitor, Progress, check
from pipelines.language.compressed import read_manifest
from studio import library
from studio.compression.schema import RowsFields
from studio.library import adopt, scan
from studio.library.records import Record

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack")
_BITS = re.compile(r"\d+")
"""In a file's names of precisions: F32, BF16 ..."""

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Base:
    """A transformers directory whose weights are safetensors.

    Attributes:
        name: in the library, or the folder's.
        folder: where it is.
        places: tensor -> its file.
        matrices: module path -> (out, in), of the linear layers except the output layer.
        licence: as its card says.
    """

    name: str
    folder: Path
    places: Mapping[str, Path]
    matrices: Mapping[str, tuple[int, int]]
    licence: str = ""

    @classmethod
    def of(cls, name: str) -> Base:
        """The base called ``name``.

        Raises:
            InputError: no language model, one that is quantised, compressed or pruned unevenly already, or weights that
                are not in safetensors files.
        """
        folder = Path(library.resolve_language(name))
        if not folder.is_dir():
            raise InputError(f"'{name}' is not on this computer: download it into a folder first.")
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        if read_manifest(folder) is not None:
            raise InputError(f"'{name}' is compressed already: start from the model it was made from.")
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise InputError(f"The configuration in '{folder}' cannot be read ({error}).") from None
        if getattr(config, "quantization_config", None):
            raise InputError(f"'{name}' is quantised already: start from the model in full precision.")
        pruning = read_pruning(folder)
        if pruning is not None and not pruning.uniform:
            raise InputError(f"'{name}' is pruned to blocks of different sizes, which cannot be compressed further.")
        places = _places(folder, name)
        with init_empty_weights():
            kind: Any = AutoModelForCausalLM
            model: Any = kind.from_config(config)
        matrices = {
            path: (module.out_features, module.in_features)
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
        }
        missing = [path for path in matrices if f"{path}.weight" not in places]
        if missing or not matrices:
            raise InputError(
                f"The files of '{name}' lack {len(missing)} of its matrices ('{missing[0]}')." if missing
                else f"'{name}' has no linear layers to compress."
            )  # fmt: skip
        record = scan.record(folder, "base")
        own = next((known.name for known in library.bases() if known.path == folder), folder.name)
        return cls(own, folder, places, matrices, str(record.notes.get("license", "")))

    @property
    def names(self) -> list[str]:
        """All tensors."""
        return list(self.places)

    @property
    def count(self) -> int:
        """Weights in the matrices."""
        return sum(out * inputs for out, inputs in self.matrices.values())

    @property
    def bytes(self) -> int:
        """Of the files."""
        return sum(place.stat().st_size for place in sorted(set(self.places.values())))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the files."""
        return files.sha256(*sorted(set(self.places.values())))

    def read(self, name: str) -> Tensor:
        """One tensor, in the file's precision."""
        with safe_open(self.places[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    def nbytes(self, name: str) -> int:
        """Bytes of one tensor, from the file's head."""
        with safe_open(self.places[name], framework="pt") as opened:
            part = opened.get_slice(name)
            bits = _BITS.search(str(part.get_dtype()))
            return int(math.prod(part.get_shape())) * int(bits.group() if bits else 32) // 8

    def copy_beside(self, target: Path) -> None:
        """Copy everything but weights and card: configuration, tokenizer, chat template."""
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and file.suffix not in WEIGHTS and file.name not in (INDEX, "README.md", "card.md"):
                shutil.copyfile(file, target / file.name)

    def adopt(self, place: Path, wanted: str) -> Record:
        """Bring the new base in ``place`` into the library, under ``wanted`` or the next free name."""
        return library.import_base(place, adopt.free_name(wanted, "base"))


def _places(folder: Path, name: str) -> dict[str, Path]:
    """Tensor -> file.

    Raises:
        InputError: no safetensors, or a damaged file.
    """
    index = folder / INDEX
    try:
        if index.is_file():
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {key: folder / file for key, file in sorted(listed.items())}
        found: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"The weights of '{name}' are damaged ({error}).") from None
    if not found:
        raise InputError(f"'{name}' has no .safetensors weights: save it with transformers' save_pretrained first.")
    return found


def squares(config: RowsFields, base: Base, monitor: Monitor) -> dict[str, Tensor]:
    """The Fisher information of every matrix on the rows of ``config.data``: module path -> F (out, in), fp32.

    Raises:
        InputError: rows that cannot be used.
        Cancelled: ``monitor`` asked to stop.
    """
    from pipelines.language.loading import open_model
    from studio import devices
    from studio.datasets.seeds import rng
    from studio.training.language.data import Collate
    from studio.training.schemas.language import TrainLanguageConfig
    from studio.training.tasks.language import task_for

    asked = TrainLanguageConfig.parse({"base": str(base.folder), "data": config.data, "max_length": config.max_length,
                                       "too_long": "cut", "loss_on": "all", "seed": config.seed})  # fmt: skip
    task = task_for(asked)
    task.rows()
    device = torch.device(devices.resolve(config.device))
    opened = open_model(base.folder, dtype="fp32", device=device)
    samples = list(task.tokens(opened.tokenizer, opened.longest).shown)
    rng(config.seed, "compress").shuffle(samples)
    samples = samples[: config.samples]
    collate = Collate(opened.tokenizer.pad_token_id)
    layers = {name: opened.model.get_submodule(name) for name in base.matrices}

    def losses() -> Iterator[Callable[[], Tensor]]:
        for number, sample in enumerate(samples):
            check(monitor)
            batch = {name: value.to(device) for name, value in collate([sample]).items()}
            yield lambda batch=batch: opened.model(**batch).loss  # type: ignore[misc]
            monitor.report(Progress("looking at rows", number + 1, len(samples)))

    return capture_squares(layers, losses())
