"""Denoisers whose linear layers are stored in few bits: by bitsandbytes, torchao, or a GGUF file.

    4bit   bitsandbytes, NF4 with nested scales (QLoRA, arXiv 2305.14314): about 4.1 bits per weight
    8bit   bitsandbytes, LLM.int8 (arXiv 2208.07339): weights and inputs in 8 bits, large inputs in floating point
    int8   torchao, weights only, one scale per output: 8 bits
    int4   torchao, weights only, one scale per 32 inputs: the arithmetic of 4 bits, but 8 bits of memory, because the
           packed kernels of torchao need other packages or devices

The weights are quantised once, layer by layer, after loading, so that it works alike on every device. A denoiser may
also come from a GGUF file, which diffusers reads. Adapters act beside these layers (:mod:`adapters.layers.gated`): no
weight is ever restored for them.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    import torch
    from torch import nn

QUANTIZATIONS = ("none", "8bit", "4bit", "int8", "int4")
PACKAGES = {"8bit": "bitsandbytes", "4bit": "bitsandbytes", "int8": "torchao", "int4": "torchao"}

GROUP = 32
"""Inputs that share a scale in int4."""


def check_quantization(name: str) -> None:
    """Check a choice before anything is loaded.

    Raises:
        InputError: an unknown one.
        MissingDependencyError: its package is not installed.
    """
    if name not in QUANTIZATIONS:
        raise InputError(f"Unknown quantization '{name}': use one of {', '.join(QUANTIZATIONS)}.")
    package = PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise MissingDependencyError(package, "quantized", f"A base in {name}")


def quantize(model: nn.Module, name: str, dtype: torch.dtype) -> int:
    """Store the linear layers of ``model`` in few bits, in place; returns how many.

    Layers that the model keeps in fp32, and for int4 those whose inputs are not a multiple of 32, stay as they are.

    Args:
        name: one of :data:`QUANTIZATIONS`.
        dtype: in which the layers compute.

    Raises:
        InputError, MissingDependencyError: see :func:`check_quantization`.
    """
    from torch import nn

    check_quantization(name)
    if name == "none":
        return 0
    change = {"8bit": _eight_bits, "4bit": _four_bits, "int8": _torchao_int8, "int4": _torchao_int4}[name](dtype)
    kept = [re.escape(part) for part in getattr(model, "_keep_in_fp32_modules", None) or ()]
    keep = re.compile(rf"(^|\.)({'|'.join(kept)})(\.|$)") if kept else None
    count = 0
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or (keep and keep.search(path)):
            continue
        if name == "int4" and module.in_features % GROUP:
            continue
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, change(module))
        count += 1
    if PACKAGES[name] == "bitsandbytes":  # what PEFT and diffusers ask before they choose their layers
        setattr(model, f"is_loaded_in_{name}", True)
    return count


def _four_bits(dtype: torch.dtype) -> Callable[[nn.Linear], nn.Module]:
    bitsandbytes: Any = _bitsandbytes()

    def change(module: nn.Linear) -> nn.Module:
        made: Any = bitsandbytes.nn.Linear4bit(
            module.in_features, module.out_features, module.bias is not None, dtype,
            compress_statistics=True, quant_type="nf4", device="meta",
        )  # fmt: skip
        made.weight = bitsandbytes.nn.Params4bit(
            module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
        )
        made.bias = module.bias
        # its kernel for CPUs rounds to bf16, rewrites the weight and takes only sizes in multiples of 32 and 64
        made.support_avx512bf16_for_cpu = False
        made.train(module.training).to(module.weight.device)  # which quantises
        return made  # type: ignore[no-any-return]

    return change


def _eight_bits(dtype: torch.dtype) -> Callable[[nn.Linear], nn.Module]:
    bitsandbytes: Any = _bitsandbytes()

    def change(module: nn.Linear) -> nn.Module:
        made: Any = bitsandbytes.nn.Linear8bitLt(
            module.in_features, module.out_features, module.bias is not None, has_fp16_weights=False, threshold=6.0,
            device="meta",
        )  # fmt: skip
        made.weight = bitsandbytes.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        made.bias = module.bias
        made.train(module.training).to(module.weight.device)
        return made  # type: ignore[no-any-return]

    return change


def _torchao_int8(dtype: torch.dtype) -> Callable[[nn.Linear], nn.Module]:
    torchao: Any = _torchao()
    return _by_torchao(torchao, torchao.Int8WeightOnlyConfig(version=2))


def _torchao_int4(dtype: torch.dtype) -> Callable[[nn.Linear], nn.Module]:
    import torch

    torchao: Any = _torchao()
    kind: Any = torch
    groups = importlib.import_module("torchao.quantization.granularity").PerGroup(GROUP)
    return _by_torchao(torchao, torchao.IntxWeightOnlyConfig(weight_dtype=kind.int4, granularity=groups))


def open_denoiser(place: str | Path, source: str, kind: Any, component: str, dtype: torch.dtype) -> nn.Module:
    """A denoiser from a file of its own, GGUF or safetensors; the rest of the base stays in ``source``.

    Args:
        place: the file.
        source: hub id or directory of the base, which has the denoiser's class and configuration.
        kind: diffusers' class of the pipeline.
        component: the denoiser's attribute in it.
        dtype: in which it computes.

    Raises:
        InputError: no such file, or one that is not for this denoiser.
        MissingDependencyError: a GGUF file without the package ``gguf``.
    """
    import diffusers

    path = Path(place).expanduser()
    if not path.is_file():
        raise InputError(f"There is no denoiser '{place}': give a .gguf or .safetensors file.")
    options: dict[str, Any] = {}
    if path.suffix.lower() == ".gguf":
        if importlib.util.find_spec("gguf") is None:
            raise MissingDependencyError("gguf", "quantized", "A denoiser in a GGUF file")
        chosen: Any = diffusers.GGUFQuantizationConfig
        options["quantization_config"] = chosen(compute_dtype=dtype)
    name = kind.load_config(source)[component][1]
    try:
        model: nn.Module = getattr(diffusers, name).from_single_file(
            str(path), config=source, subfolder=component, dtype=dtype, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"The denoiser '{path.name}' could not be opened as the {name} of '{source}': {reason}") from (
            error
        )
    missing = [path for path, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise InputError(
            f"The denoiser '{path.name}' lacks {len(missing)} weights of the {name} of '{source}', such as "
            f"'{missing[0]}': it is for another model."
        )
    return model


def _bitsandbytes() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports optional kernels that it does without
    return importlib.import_module("bitsandbytes")


def _torchao() -> Any:
    for name in ("torchao", "torch.utils._pytree"):  # the same of torchao
        logging.getLogger(name).setLevel(logging.ERROR)
    return importlib.import_module("torchao.quantization")


def _by_torchao(torchao: Any, config: Any) -> Callable[[nn.Linear], nn.Module]:
    def change(module: nn.Linear) -> nn.Module:
        torchao.quantize_(module, config)
        module.requires_grad_(False)
        return module

    return change
