"""Everything the library shows about one adapter or base model, gathered without reading weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from adapters.errors import InputError
from adapters.files import WORDS, WORDS_ENTRY
from adapters.formats.foreign_mixture import TITLES, MixtureFormat, Outline
from adapters.formats.format import formats, recognise
from adapters.formats.header import CONFIG, PICKLED, Header, pickled_names, read_header
from adapters.formats.header import WEIGHTS as PEFT_WEIGHTS
from adapters.formats.keys import refuse_foreign
from adapters.formats.mixture import mixture_config
from adapters.formats.peft_directory import PREFIX
from pipelines.diffusion.families import FAMILIES, of_checkpoint
from pipelines.genomics.task_file import FILE as RNA_TASK
from pipelines.language.compressed import FILE as COMPRESSED
from studio.composition import distilled_adapters
from studio.library import recognition

_MOST = 1000  # items of a list that are kept
_LONGEST = 2000  # letters of a fact
_LARGEST_TEXT = 2**20  # bytes of a card or configuration
_LONGEST_CARD = 2**16  # letters of its YAML
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C, fast on malformed input too
ACCURACY = "adapter_studio_accuracy"
"""Metadata entry of a merged or converted file (:mod:`adapters.merging.accuracy`)."""
RECIPE_KEYS = ("adapter_studio_recipe", "adapter-studio")
PICTURES = (".png", ".webp", ".jpg", ".jpeg")


def adapter(path: Path) -> dict[str, Any]:
    """Facts of the adapter at ``path`` (file or folder), as :class:`~studio.library.records.Record` names them.

    Raises:
        InputError: it is not a usable adapter; the message is the reason alone.
    """
    weights = weight_file(path)
    head = _header(weights)
    format = recognise(head)
    if isinstance(format, MixtureFormat):
        return _foreign_mixture(format.name, format.outline(head), _card(path))
    if weights.suffix in PICKLED:
        raise InputError(f"{weights.suffix} files are not opened here: studio lora convert makes .safetensors of them")
    if (config := mixture_config(path)) is not None:
        return _mixture(path, head, config)
    if not (kinds := head.kinds()):
        refuse_foreign(head.shapes, "it")
        raise InputError("holds no LoRA weights")
    card = _card(path)
    recipe = next((found for key in RECIPE_KEYS if isinstance(found := head.json(key), dict)), None)
    counts = head.ranks()
    notes: dict[str, Any] = {
        "algorithm": kinds[-1].name,
        "layers": sum(counts.values()),
        "ranks": dict(sorted(counts.items())[:_MOST]) if len(counts) > 1 else {},
        **_from_recipe(recipe or {}),
        "accuracy": _accuracy(_table(head.json(ACCURACY))),
        **{key: text for key in ("description", "license", "base_model") if (text := _line(card.get(key)))},
    }
    return {
        "family": "rna" if _for_rna(path, recipe) else recognition.adapter_family(head),
        "format": format.name if format else "",
        "rank": counts.most_common(1)[0][0] if counts else None,
        "targets": recognition.targets(head.layers)[:_MOST],
        "triggers": _triggers(card, recipe, head.metadata) or _words(head),
        "recipe": recipe,
        "notes": {key: value for key, value in notes.items() if value},
    }


def _for_rna(path: Path, recipe: Mapping[str, Any] | None) -> bool:
    """Whether an adapter belongs to a k-mer model, whose layers have the names of any BERT's."""
    return (path / RNA_TASK).is_file() or _table((recipe or {}).get("base")).get("family") == "rna"


def _foreign_mixture(format: str, outline: Outline, card: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a mixture of experts of another program."""
    notes: dict[str, Any] = {
        "algorithm": TITLES[outline.method], "experts": ", ".join(map(str, outline.experts)),
        "layers": len(outline.modules), "base_model": _line(outline.base),
        **{key: text for key in ("description", "license") if (text := _line(card.get(key)))},
    }  # fmt: skip
    return {
        "family": "language", "format": format, "rank": max(outline.ranks, default=None),
        "targets": recognition.targets(outline.modules)[:_MOST],
        "notes": {key: value for key, value in notes.items() if value},
    }  # fmt: skip


def _mixture(path: Path, head: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a mixture of LoRA experts."""
    places = {name.partition(".moeadapter_")[0] for name in head.shapes if ".moeadapter_" in name}
    if not places:
        raise InputError("holds no experts, although its configuration says so")
    recipe = next((found for key in RECIPE_KEYS if isinstance(found := head.json(key), dict)), None)
    card = _card(path)
    ranks = {shape[1] for name, shape in head.shapes.items() if name.endswith("_A") and len(shape) == 3}
    named = config.get("experts")
    named = [expert.get("name") for expert in named if isinstance(expert, dict)] if isinstance(named, list) else []
    notes: dict[str, Any] = {
        "algorithm": f"mixture of experts ({_line(config.get('preset')) or 'own choices'})", "layers": len(places),
        "experts": _line(named),
        **_from_recipe(recipe or {}),
        **{key: text for key in ("description", "license", "base_model") if (text := _line(card.get(key)))},
    }  # fmt: skip
    return {
        "family": "rna" if _for_rna(path, recipe) else recognition.adapter_family(head), "format": "peft",
        "rank": max(ranks, default=None),
        "targets": recognition.targets(places)[:_MOST], "triggers": _triggers(card, recipe, head.metadata),
        "recipe": recipe, "notes": {key: value for key, value in notes.items() if value},
    }  # fmt: skip


def _header(weights: Path) -> Header:
    if weights.suffix in PICKLED:
        return Header(weights, dict.fromkeys(pickled_names(weights), ()), peft=(weights.parent / CONFIG).is_file())
    if weights.suffix == ".safetensors":
        head = read_header(weights)
        beside = weights.name in PEFT_WEIGHTS and (weights.parent / CONFIG).is_file()
        return replace(head, peft=beside or any(name.startswith(PREFIX) for name in head.shapes))
    for format in formats().values():
        if format.suffix == weights.suffix and (found := format.header(weights)) is not None:
            return found
    ending = f"the ending '{weights.suffix}'" if weights.suffix else "no ending"
    raise InputError(f"it has {ending}; adapters are PEFT folders and files ending in .safetensors")


def _accuracy(entry: dict[str, Any]) -> str:
    """How far a merged or converted file is from the exact sum, as the file says."""
    error, place = entry.get("error"), _line(entry.get("at"))
    if isinstance(error, bool) or not isinstance(error, int | float):
        return ""
    return f"largest relative error {error:.2g}" + (f" at {place}" if place and error else "")


def _from_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """What people want to know about a training recipe."""
    wanted = {"base_model": ("base", "name"), "example": ("data", "example_prompt"), "mode": ("config", "mode")}
    return {note: _line(_table(recipe.get(part)).get(key)) for note, (part, key) in wanted.items()}


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _line(value: Any) -> str:
    """A fact, or a plain list of facts, as text; empty for anything else."""
    items = value[:_MOST] if isinstance(value, list) else [value]
    told = (item for item in items if isinstance(item, str | int | float) and not isinstance(item, bool))
    return ", ".join(str(item) for item in told)[:_LONGEST]


_LANGUAGE_HEADS = re.compile(r"(ForCausalLM|LMHeadModel|ForMaskedLM|ForSequenceClassification|ForPreTraining)$")


def is_language_model(folder: Path) -> bool:
    """Whether the folder is a transformers model that reads and writes text."""
    if not (folder / "config.json").is_file() or (folder / "model_index.json").is_file():
        return False
    try:
        heads = _json(folder / "config.json").get("architectures") or ()
    except InputError:
        return False
    return isinstance(heads, list) and any(_LANGUAGE_HEADS.search(str(head)) for head in heads)


def is_rna_model(folder: Path) -> bool:
    """Whether the folder is a transformers model whose tokens are k-mers of nucleotides."""
    from pipelines.genomics.kmers import is_kmer_folder

    return is_language_model(folder) and is_kmer_folder(folder)


def is_vision_language_model(folder: Path) -> bool:
    """Whether the folder is a transformers model that answers questions about pictures."""
    if not (folder / "config.json").is_file() or (folder / "model_index.json").is_file():
        return False
    try:
        config = _json(folder / "config.json")
    except InputError:
        return False
    heads = config.get("architectures")
    writes = isinstance(heads, list) and any(str(head).endswith("ForConditionalGeneration") for head in heads)
    return writes and isinstance(config.get("vision_config"), dict)


def is_speech_model(folder: Path) -> bool:
    """Whether the folder is a transformers model that writes down speech."""
    if not (folder / "config.json").is_file() or (folder / "model_index.json").is_file():
        return False
    try:
        return bool(_json(folder / "config.json").get("model_type") == "whisper")
    except InputError:
        return False


def _speech_model(folder: Path) -> dict[str, Any]:
    if not (folder / "preprocessor_config.json").is_file() and not (folder / "processor_config.json").is_file():
        raise InputError("its feature extractor is missing (preprocessor_config.json)")
    config, found = _json(folder / "config.json"), _language_model(folder)
    size = {"width": config.get("d_model"), "layers": config.get("decoder_layers")}
    notes = {**found["notes"], **{key: value for key, value in size.items() if value}}
    return {**found, "family": "speech", "notes": notes}


def _vision_language_model(folder: Path) -> dict[str, Any]:
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise InputError("its processor is missing (processor_config.json)")
    inside = _table(_json(folder / "config.json").get("text_config"))
    found = _language_model(folder)
    width = {"width": inside.get("hidden_size"), "layers": inside.get("num_hidden_layers")}
    notes = {**found["notes"], **{key: value for key, value in width.items() if value}}
    return {**found, "family": "vision-language", "notes": notes}


def _language_model(folder: Path) -> dict[str, Any]:
    config = _json(folder / "config.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise InputError("its tokenizer is missing (tokenizer.json)")
    if not any(folder.glob("*.safetensors")):
        raise InputError("its weights are missing (.safetensors)")
    card = _card(folder)
    notes: dict[str, Any] = {
        "architecture": config.get("model_type"), "width": config.get("hidden_size"),
        "layers": config.get("num_hidden_layers"), "heads": config.get("architectures"),
        "compressed": _compressed(folder),
        **{key: text for key in ("description", "license", "base_model") if (text := _line(card.get(key)))},
    }  # fmt: skip
    return {"family": "rna" if is_rna_model(folder) else "language", "format": "transformers",
            "notes": {key: value for key, value in notes.items() if value}}  # fmt: skip


TRANSFORMERS = (is_language_model, is_speech_model, is_vision_language_model)
"""What tells that a folder is a transformers model of a known kind."""


def _compressed(folder: Path) -> str:
    """How a compressed base was made, and its bits per weight."""
    if not (folder / COMPRESSED).is_file():
        return ""
    told = _json(folder / COMPRESSED)
    bits = told.get("bits")
    known = f", {bits:.2f} bits" if isinstance(bits, int | float) else ""
    return f"{_line(told.get('method'))}{known}"


def base(path: Path) -> dict[str, Any]:
    """Facts of the base model at ``path``: a pipeline folder, a language model's folder or a single file.

    Raises:
        InputError: it is not a usable base model; the message is the reason alone.
    """
    if path.is_dir() and is_language_model(path):
        return _language_model(path)
    if path.is_dir() and is_speech_model(path):
        return _speech_model(path)
    if path.is_dir() and is_vision_language_model(path):
        return _vision_language_model(path)
    if path.is_dir():
        index = _json(path / "model_index.json")
        name = str(index.get("_class_name", ""))
        family = next((family.name for family in FAMILIES.values() if name in (family.pipeline, *family.bases)), None)
        if family is None:
            known = ", ".join(family.pipeline for family in FAMILIES.values())
            raise InputError(f"its pipeline class '{name}' is none of {known}")
        card = _card(path)
        notes = {key: text for key in ("description", "license") if (text := _line(card.get(key)))}
        return {"family": family, "format": "diffusers", "notes": {"pipeline": name, **notes}}
    found = of_checkpoint(read_header(path).shapes)
    if found is None:
        raise InputError(f"holds no complete base model of a known family ({', '.join(FAMILIES)})")
    return {"family": found.name, "format": "single file"}


def read_start(path: Path, most: int) -> str:
    """The text of a file, up to ``most`` bytes; raises ValueError when it is not UTF-8."""
    with path.open("rb") as file:
        return file.read(most).decode("utf-8")


def weight_file(path: Path) -> Path:
    """The file with an adapter's weights; raises :class:`InputError` when a folder does not hold exactly one."""
    if not path.is_dir():
        return path
    standard = next((file for name in PEFT_WEIGHTS if (file := path / name).is_file()), None)
    if standard is not None:
        return standard
    files = sorted(file for file in path.glob("*.safetensors") if not is_companion(file.name))
    if len(files) != 1:
        raise InputError(f"a folder with {len(files) or 'no'} .safetensors files is not an adapter")
    return files[0]


def is_companion(name: str) -> bool:
    """Whether a file of this name belongs to an adapter beside it: its words, or its guidance embedding."""
    return name.endswith(WORDS) or distilled_adapters.EMBEDDING in name


def preview(path: Path) -> Path | None:
    """The preview of an adapter or base: ``preview.*`` in its folder, or a picture with the file's own name."""
    stems = [path / "preview", path / "sample"] if path.is_dir() else [
        path.with_suffix(""), path.with_name(f"{path.stem}.preview")
    ]  # fmt: skip
    candidates = (stem.with_name(stem.name + ending) for stem in stems for ending in PICTURES)
    return next((file for file in candidates if file.is_file()), None)


def _card(path: Path) -> dict[str, Any]:
    """The card beside the weights: card.yaml / card.json, or the YAML block on top of card.md / README.md."""
    places = [path / name for name in ("card.yaml", "card.json", "card.md", "README.md")] if path.is_dir() else [
        path.with_suffix(ending) for ending in (".yaml", ".json", ".md")
    ]  # fmt: skip
    for place in places:
        if place.is_file():
            try:
                values = yaml.load(_yaml_part(place)[:_LONGEST_CARD], Loader=_LOADER)
            except (yaml.YAMLError, OSError, ValueError, RecursionError, TypeError):
                continue
            if isinstance(values, dict):
                return values
    return {}


def _yaml_part(place: Path) -> str:
    text = read_start(place, _LARGEST_TEXT)
    if place.suffix != ".md":
        return text
    parts = text.split("---\n", 2)
    return parts[1] if len(parts) == 3 and not parts[0].strip() else ""


def _triggers(card: dict[str, Any], recipe: dict[str, Any] | None, metadata: Mapping[str, str]) -> list[str]:
    recipe = recipe or {}
    places = (
        recipe.get("triggers"), _table(recipe.get("config")).get("trigger"), card.get("triggers"), card.get("trigger"),
        card.get("instance_prompt"), metadata.get("modelspec.trigger_phrase"),
    )  # fmt: skip
    for place in places:
        words = [_line([word]).strip() for word in (place[:_MOST] if isinstance(place, list) else [place])]
        if any(words):
            return list(filter(None, words))
    return []


def _words(head: Header) -> list[str]:
    """The new words that come with an adapter (pivotal tuning)."""
    bundled = {key.split(".")[1] for key in head.shapes if key.startswith("bundle_emb.") and key.count(".") > 1}
    named = head.json(WORDS_ENTRY)
    return sorted(bundled)[:_MOST] or [_line([word]) for word in (named if isinstance(named, list) else [])[:_MOST]]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_start(path, _LARGEST_TEXT))
    except (OSError, ValueError, RecursionError):
        raise InputError(f"its {path.name} is missing or not JSON") from None
    return value if isinstance(value, dict) else {}
