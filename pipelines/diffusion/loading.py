"""Loading a base model of any family from a hub id, directory or single file, with sensible default settings."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.compression.backends import check_quantization, quantize
from adapters.errors import InputError, MissingDependencyError
from adapters.formats.lora import LoraFile
from pipelines.diffusion.denoiser_file import open_denoisers
from pipelines.diffusion.families import Family, detect, find, opened_as, tensor_names
from pipelines.diffusion.families.configuration import check_base
from pipelines.diffusion.memory import PRESETS, apply_preset

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ATTENTION = ("auto", "sdpa", "xformers")


@dataclass(frozen=True)
class Settings:
    """The resolved settings of a base model (no "auto" left)."""

    source: str
    family: str
    dtype: str
    device: str
    attention: str
    memory: str
    notes: tuple[str, ...] = ()
    quantization: str = "none"
    denoiser: str = ""

    def __str__(self) -> str:
        line = f"{self.source}: {self.family}, {self.dtype} on {self.device}, {self.attention}, memory {self.memory}"
        if self.denoiser:
            line += f", denoiser {Path(self.denoiser).name}"
        if self.quantization != "none":
            line += f", quantization {self.quantization}"
        return f"{line} ({'; '.join(self.notes)})" if self.notes else line


def open_pipeline(
    source: str | Path,
    family: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    attention: str = "auto",
    memory: str = "none",
    quantization: str = "none",
    denoiser: str | Path = "",
    **options: Any,
) -> tuple[Any, Family, Settings]:
    """Load a diffusers pipeline; returns it with its family and settings.

    Args:
        source: hub id, pipeline directory or single file.
        family: name of the family; "auto" = detected.
        dtype: "auto", "fp32", "fp16" or "bf16".
        device: "auto" or a torch device.
        attention: "auto", "sdpa" or "xformers".
        memory: preset, see :mod:`pipelines.diffusion.memory`.
        quantization: how the denoiser's linear layers are stored, see :mod:`adapters.compression.backends`.
        denoiser: file (GGUF or safetensors) whose denoiser replaces the base's, of two the one or the other; "" = the
            base's own.
        options: for diffusers' ``from_pretrained`` or ``from_single_file`` (``config=``, ``revision=``, ...).

    Raises:
        InputError: the base does not exist, cannot be loaded or is of another family, or a setting is not possible.
        MissingDependencyError: xformers or a quantisation is chosen whose package is not installed.
    """
    import diffusers

    if memory not in PRESETS:
        raise InputError(f"Unknown memory preset '{memory}': use one of {', '.join(PRESETS)}.")
    _check_together(memory, quantization, denoiser, source)
    check_quantization(quantization)
    chosen_family = choose_family(family, source)
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device, chosen_family)
    chosen_attention = choose_attention(attention)
    kind = getattr(diffusers, opened_as(chosen_family, source))
    if "processor" in inspect.signature(kind.__init__).parameters and importlib.util.find_spec("torchvision") is None:
        raise InputError(f"The text encoder of '{source}' reads pictures with torchvision: install torchvision.")
    if Path(source).is_file() and not chosen_family.single_file:
        raise InputError(
            f"diffusers opens {chosen_family.title} from a directory or hub id only: a single file such as "
            f"'{Path(source).name}' has no text encoder."
        )
    if denoiser:
        options |= open_denoisers(denoiser, str(source), kind, chosen_family, DTYPES[chosen_dtype])
    notes: list[str] = []
    try:
        if Path(source).is_file():
            names = tensor_names(Path(source))
            pipe = kind.from_single_file(str(source), dtype=DTYPES[chosen_dtype], **options)
            pipe.register_to_config(_name_or_path=str(source))
            notes += chosen_family.opened(pipe, names, str(source))
        else:
            pipe = _from_pretrained(kind, str(source), chosen_dtype, options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"Base model '{source}' could not be opened as {chosen_family.title}: {reason}") from error
    check_base(pipe, chosen_family)
    if chosen_attention == "xformers":
        pipe.enable_xformers_memory_efficient_attention()
    denoisers = [one.name for one in chosen_family.present(pipe)]
    layers = sum(quantize(getattr(pipe, name), quantization, DTYPES[chosen_dtype]) for name in denoisers)
    notes += [f"{layers} linear layers quantised"] if layers else []
    notes += apply_preset(pipe, memory, denoisers, chosen_device, DTYPES[chosen_dtype])
    settings = Settings(
        str(source), chosen_family.name, chosen_dtype, str(chosen_device), chosen_attention, memory, tuple(notes),
        quantization, str(denoiser),
    )  # fmt: skip
    return pipe, chosen_family, settings


def _check_together(memory: str, quantization: str, denoiser: str | Path, source: str | Path) -> None:
    """Refuse settings that exclude each other."""
    quantised = str(denoiser).lower().endswith(".gguf")
    if quantization != "none" and memory == "low":
        raise InputError("The memory preset 'low' stores the denoiser in 8 bits by itself: use 'balanced' or 'none'.")
    if not denoiser:
        return
    if memory == "low" and quantised:
        raise InputError("The memory preset 'low' changes how the denoiser is stored: use 'balanced' or 'none'.")
    if quantization != "none" and quantised:
        raise InputError(f"The denoiser '{Path(denoiser).name}' is quantised already: leave quantization at 'none'.")
    if Path(source).is_file():
        raise InputError("A denoiser of its own needs a base that is a directory or hub id, not a single file.")


FITTING = ("block_out_channels", "cross_attention_dim", "joint_attention_dim", "num_attention_heads")
"""Fields in which a ControlNet's configuration must equal its denoiser's."""


def open_controlnet(source: str | Path, pipe: Any, family: Family, dtype: str) -> Any:
    """Load a ControlNet (directory or hub id) for the models of ``pipe``, in precision ``dtype`` and on their device.

    Raises:
        InputError: it does not exist, cannot be loaded, or was made for another model.
    """
    import diffusers

    kind = getattr(diffusers, family.controlnet)
    try:
        config = kind.load_config(str(source))
        found = config.get("_class_name", family.controlnet)
        if found != family.controlnet:
            raise InputError(f"'{source}' is a {found}; {family.title} needs a {family.controlnet}.")
        denoiser = getattr(pipe, family.denoiser).config
        for name in FITTING:
            one, other = config.get(name), denoiser.get(name)
            if one is not None and other is not None and _listed(one) != _listed(other):
                raise InputError(
                    f"The ControlNet '{source}' is for another model: its {name} is {one}, the base's is {other}."
                )
        network = kind.from_pretrained(str(source), torch_dtype=DTYPES[dtype])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"The ControlNet '{source}' could not be opened: {reason}") from error
    return network.to(pipe._execution_device)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _from_pretrained(kind: Any, source: str, dtype: str, options: dict[str, Any]) -> Any:
    """Load a directory or hub id; of two variants take the one for ``dtype``, else the one there is."""
    if "variant" in options:
        return kind.from_pretrained(source, dtype=DTYPES[dtype], **options)
    first, second = (None, "fp16") if dtype == "fp32" else ("fp16", None)
    try:
        return kind.from_pretrained(source, dtype=DTYPES[dtype], variant=first, **options)
    except (OSError, ValueError) as error:
        try:
            return kind.from_pretrained(source, dtype=DTYPES[dtype], variant=second, **options)
        except (OSError, ValueError) as other:
            raise (error if first is None else other) from None  # the error of the files without a variant


def choose_family(name: str, source: str | Path) -> Family:
    """The family called ``name``, or that of ``source`` for "auto".

    Raises:
        InputError: no such family, or the folder contains a model of another one.
    """
    if name == "auto":
        return detect(source)
    family = find(name)
    if Path(source).is_dir() and (found := detect(source)).name != name:
        raise InputError(f"The base '{source}' is of the family {found.name}, not {name}: leave family at 'auto'.")
    return family


def choose_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is an accelerator if there is one, else the CPU.

    Raises:
        InputError: the device cannot be used here.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"The device '{name}' cannot be used here: {reason}") from None
    return device


def choose_dtype(name: str, device: torch.device, family: Family) -> str:
    """The precision called ``name``; "auto" is fp32 on a CPU, else bf16 for flow models (fp16 overflows) or fp16.

    Raises:
        InputError: an unknown name.
    """
    if name == "auto":
        if device.type == "cpu":
            return "fp32"
        return "bf16" if family.flow else "fp16"
    if name not in DTYPES:
        raise InputError(f"Unknown dtype '{name}': use one of auto, {', '.join(DTYPES)}.")
    return name


def choose_attention(name: str) -> str:
    """The attention backend called ``name``; "auto" is torch's own.

    Raises:
        InputError: an unknown name.
        MissingDependencyError: xformers is not installed.
    """
    if name not in ATTENTION:
        raise InputError(f"Unknown attention backend '{name}': use one of {', '.join(ATTENTION)}.")
    if name == "xformers":
        try:
            import xformers  # noqa: F401
        except ImportError:
            raise MissingDependencyError("xformers", "xformers", "The attention backend 'xformers'") from None
    return "sdpa" if name == "auto" else name


SGM_BLOCKS = {"input_blocks": "down_blocks", "middle_block": "mid_block", "output_blocks": "up_blocks"}
SGM_LAYERS = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
    "downsamplers_0_op": "downsamplers_0_conv",
}
SGM_OUTSIDE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}


def modern_blocks(file: LoraFile, unet_config: Any) -> LoraFile:
    """A kohya file for SDXL with the original code's block names (``input_blocks_4_1``), in diffusers' names.

    Block numbers are mapped by diffusers' own converter; files with other names are returned unchanged.

    Raises:
        InputError: block names that SDXL does not have.
    """
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    layers = file.parts.get("unet", {})
    if not file.flat or not any(name.startswith(tuple(SGM_BLOCKS)) for name in layers):
        return file
    inside = {f"lora_unet_{name}": layer for name, layer in layers.items() if name not in SGM_OUTSIDE}
    renamed = {SGM_OUTSIDE[name]: layer for name, layer in layers.items() if name in SGM_OUTSIDE}
    try:
        rename: Any = _maybe_map_sgm_blocks_to_diffusers
        mapped = rename(inside, unet_config)
    except (ValueError, IndexError) as error:
        raise InputError(f"The block names of this kohya file are not SDXL's: {error}") from None
    for key, layer in mapped.items():
        name = key.removeprefix("lora_unet_")
        for old, new in (*SGM_BLOCKS.items(), *SGM_LAYERS.items()):
            name = name.replace(old, new)
        renamed[name] = layer
    return file.with_parts({**file.parts, "unet": renamed}, flat=True)
