"""Writes the trained layers: an ordinary LoRA with its recipe, and a readable card."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapters.errors import InputError
from adapters.files import whole, write_text
from adapters.formats import LoraFile, LoraLayer, write_diffusers, write_kohya, write_peft
from adapters.formats.lora import RECIPE_ENTRY as RECIPE_ENTRY
from adapters.formats.peft_directory import PREFIX, write_directory
from adapters.plugin import Layers
from pipelines.precision import DTYPES
from studio import privacy
from studio.schema import JobConfig
from studio.training.cards import base_lines, base_name, card_words, front_matter
from studio.training.samples import Pair
from studio.training.schemas.image import TrainImageConfig


def make_recipe(
    config: JobConfig, *, base: Mapping[str, Any], data: Mapping[str, Any], training: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything needed to make the adapter again, and to know what it is for.

    Adapters are shared, so files are given by name only; ``config.yaml`` in the job's folder has their paths.
    """
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    made: dict[str, Any] = privacy.names_only({
        "version": 1,
        "job": config.kind,
        "name": getattr(config, "name", ""),
        "triggers": [word] if (word := getattr(config, "trigger", "")) else [],
        "config": config.model_dump(mode="json"),
        "base": dict(base),
        "data": dict(data),
        "training": dict(training),
        "versions": {"adapter-studio": _version("adapter-studio")} | {name: _version(name) for name in packages},
    })  # fmt: skip
    return made


def write_adapter(
    layers: Layers,
    folder: Path,
    name: str,
    config: TrainImageConfig,
    recipe: Mapping[str, Any],
    notes: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Write the adapter in every requested format, with ``notes`` as more metadata; returns format -> path.

    Raises:
        InputError: numbers that are not finite, or a disk that is full.
    """
    dtype = DTYPES[config.save_dtype]
    file = LoraFile({c: {n: _cast(layer, dtype) for n, layer in part.items()} for c, part in layers.items() if part})
    for component, module, layer in file.layers():
        if not (layer.A.isfinite().all() and layer.B.isfinite().all()):
            raise InputError(f"The adapter holds numbers that are not finite in '{component}.{module}': not saved.")
    metadata = {RECIPE_ENTRY: json.dumps(recipe, ensure_ascii=False), **(notes or {})}
    paths = {"diffusers": folder / f"{name}.safetensors"}
    with whole(paths["diffusers"]) as part:
        write_diffusers(file, part, metadata)
    if "kohya" in config.export:
        paths["kohya"] = folder / f"{name}-kohya.safetensors"
        with whole(paths["kohya"]) as part:
            write_kohya(file, part, metadata)
    if "peft" in config.export:
        paths["peft"] = folder / f"{name}-peft"
        with whole(paths["peft"]) as part:
            write_peft(replace(file, metadata=metadata), part)
    return {kind: str(path) for kind, path in paths.items()}


def write_model_adapter(
    layers: Mapping[str, LoraLayer],
    target: Path,
    config: Any,
    recipe: Mapping[str, Any],
    beside: Mapping[str, str],
    options: Mapping[str, Any] | None = None,
    heads: Mapping[str, torch.Tensor] | None = None,
    more_files: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> Path:
    """Write the adapter of a single model (not a diffusion pipeline) as the PEFT directory ``target``; returns it.

    Args:
        layers: module path -> layer.
        config: an :class:`~studio.training.schemas.base.AdapterTrainConfig` with a base.
        beside: text files of the directory by name (its card as README.md).
        options: entries of ``adapter_config.json`` that only the task knows.
        heads: whole trained modules (a classification head), tensors by PEFT's keys.
        more_files: further files of the directory by name, with their tensors.

    Raises:
        InputError: numbers that are not finite, or a disk that is full.
    """
    dtype, heads = DTYPES[config.save_dtype], heads or {}
    kept = {name: _cast(layer, dtype) for name, layer in layers.items()}
    more = {name: tensor.detach().cpu().to(dtype) for name, tensor in heads.items()}
    for name, numbers in [*more.items(), *((name, tensor) for name, layer in kept.items() for tensor in _of(layer))]:
        if not numbers.isfinite().all():
            raise InputError(f"The adapter holds numbers that are not finite in '{name}': not saved.")
    entries = {
        **(options or {}),
        "base_model_name_or_path": base_name(config.base),
        "modules_to_save": sorted({name.removeprefix(PREFIX).rsplit(".", 1)[0] for name in heads}) or None,
    }
    with whole(target) as part:
        part.mkdir()
        write_directory(part, kept, {RECIPE_ENTRY: json.dumps(recipe, ensure_ascii=False)}, entries, more)
        for name, text in beside.items():
            write_text(part / name, text)
        for name, tensors in (more_files or {}).items():
            save_file(dict(tensors), part / name)
    return target


def _of(layer: LoraLayer) -> list[torch.Tensor]:
    return [layer.A, layer.B, *([] if layer.magnitude is None else [layer.magnitude])]


def write_card(folder: Path, recipe: Mapping[str, Any], samples: list[Path], pairs: Sequence[Pair] = ()) -> Path:
    """Write ``card.md``: what the adapter is, its trigger words, how it was made."""
    config, training, data = recipe["config"], recipe["training"], recipe["data"]
    trigger = ", ".join(f"`{word}`" for word in recipe["triggers"]) or "none"
    base, name = str(recipe["base"]["name"]), str(recipe["name"])
    lines = [
        *image_front_matter(recipe),
        f"# {name}",
        "",
        f"A {config['mode']} LoRA for **{base_name(base)}** ({recipe['base']['family']}).",
        "",
        f"- Trigger words: {trigger}",
        f"- Example prompt: `{data['example_prompt']}`",
        f"- Rank {config['rank']}, layers: {config['target_regex'] or config['targets']}"
        + (", text encoder too" if config["train_text_encoder"] else "")
        + "".join(f"; {part} {told}" for part, told in training.get("layers", {}).items()),
        f"- {training['steps']} steps of {training['batch']} pictures on {data['pictures']} pictures, "
        f"{config['optimizer']} at {config['learning_rate']:g}, final loss {training['loss']:.4f}",
        f"- Digest of the base weights: `{recipe['base']['digest']}`",
        f"- Data digest: `{data['digest']}`",
        "",
        *(pair_lines(folder, pairs) or [f"![sample]({path.relative_to(folder).as_posix()})" for path in samples]),
        "",
        *loading_lines(base, f"{name}.safetensors", str(data["example_prompt"]), config["resolution"]),
        "",
        "Made with adapter-studio; the whole recipe is in the file's metadata "
        f"(`{RECIPE_ENTRY}`) and in `config.yaml`.",
        "",
    ]
    target = folder / "card.md"
    with whole(target) as part:
        part.write_text("\n".join(lines), encoding="utf-8")
    return target


def pair_lines(folder: Path, pairs: Sequence[Pair]) -> list[str]:
    """A table of pictures without and with the adapter."""

    def shown(words: str, file: str) -> str:
        return f"![{words}]({Path(file).relative_to(folder).as_posix()})"

    rows = [
        f"| `{pair.prompt}`, seed {pair.seed} | {shown('without', pair.without)} | {shown('with', pair.with_)} |"
        for pair in pairs
    ]
    return ["| prompt | without | with |", "|---|---|---|", *rows] if rows else []


def image_front_matter(recipe: Mapping[str, Any]) -> list[str]:
    """The front matter of an image adapter's card."""
    tags = ["lora", "text-to-image", "diffusers", "adapter-studio"]
    return front_matter(
        str(recipe["base"]["name"]), "diffusers", tags, instance_prompt=card_words(recipe), pipeline_tag="text-to-image"
    )


def loading_lines(
    base: str, file: str, prompt: str, size: int | None, steps: int = 20, guidance: float | None = None,
    scheduler: str = "",
) -> list[str]:  # fmt: skip
    """The lines that load an image adapter from its own folder and draw with it.

    Args:
        size: pixels of a side; None = the base's own.
        guidance: guidance of the call; None = the pipeline's own.
        scheduler: class of the diffusers scheduler that replaces the base's.
    """
    options = f"num_inference_steps={steps}" + (f", height={size}, width={size}" if size else "")
    options += "" if guidance is None else f", guidance_scale={guidance}"
    whole_pipeline = not base.endswith((".safetensors", ".ckpt"))
    kind, opener = ("DiffusionPipeline", "from_pretrained") if whole_pipeline else (
        "StableDiffusionPipeline", "from_single_file"
    )  # fmt: skip
    return [
        "```python",
        "import torch",
        f"from diffusers import {', '.join(filter(None, [kind, scheduler]))}",
        *base_lines(base),
        "",
        f"pipe = {kind}.{opener}(base).to(torch.float32)  # torch.float16 on a GPU",
        *([f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config)"] if scheduler else []),
        f'pipe.load_lora_weights(".", weight_name={file!r})',
        f"picture = pipe({prompt!r}, {options}).images[0]",
        "```",
    ]


def _cast(layer: LoraLayer, dtype: torch.dtype) -> LoraLayer:
    magnitude = None if layer.magnitude is None else layer.magnitude.to(dtype)
    return replace(layer, A=layer.A.to(dtype), B=layer.B.to(dtype), magnitude=magnitude)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
