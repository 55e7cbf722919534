"""The ways to store a frozen base in few bits: what each needs, whether it works here, layers stored that way.

    4bit   bitsandbytes, NF4 with nested scales (QLoRA, arXiv 2305.14314)
    8bit   bitsandbytes, LLM.int8 (arXiv 2208.07339): weights and inputs in 8 bits, large inputs in floating point
    int8   torchao, weights only, one scale per output
    int4   torchao, weights only, one scale per 32 inputs: the arithmetic of 4 bits, but 8 bits of memory, because the
           packed kernels of torchao need other packages or devices

The image pipeline, the language models (training and chat) and the benchmarks store layers only by this module; what is
read of a stored weight, and its bytes, is :mod:`adapters.compression.storage`. Adapters act beside the layers: no
weight is ever restored for them. Importing this module imports no torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from adapters.errors import InputError, MissingDependencyError, StudioError

if TYPE_CHECKING:
    import torch
    from torch import nn

PACKAGES = {"8bit": "bitsandbytes", "4bit": "bitsandbytes", "int8": "torchao", "int4": "torchao"}
"""Way to store -> the package that does it."""

QUANTIZATIONS = ("none", *PACKAGES)
"""The choices of a configuration."""

if TYPE_CHECKING:
    Quantization = str
else:
    Quantization = Literal[QUANTIZATIONS]

FOREIGN = {"gptq": "gptqmodel", "awq": "gptqmodel", "hqq": "hqq", "quanto": "optimum-quanto"}
"""Checkpoints that were stored in few bits by others: method of transformers -> the package that reads it."""

MODULES = {"optimum-quanto": "optimum.quanto"}
"""Package -> the module that it installs, where the name differs."""

GROUP = 32
"""Inputs that share a scale in int4."""

LOST = 0.1
"""A merge that moves the stored weight by less than this share of the update, along it, is refused."""


# ------------------------------------------------------------------------------------------------ what works here


@dataclass(frozen=True)
class Probe:
    """Whether one way of storing works here.

    Attributes:
        name: one of :data:`QUANTIZATIONS`, or of :data:`FOREIGN`.
        package, version: what does it; the version is empty if it is not installed.
        works: a layer of 64 x 64 was stored, computed an output and a gradient; for foreign ones: it can be imported.
        reason: why not.
        bits: bits per weight of a layer of 1024 x 1024, counted from its tensors.
    """

    name: str
    package: str
    version: str
    works: bool
    reason: str = ""
    bits: float = 0.0


@cache
def probe(name: str) -> Probe:
    """Try ``name`` once (cached): nothing is said to work that did not."""
    package = PACKAGES.get(name) or FOREIGN[name]
    version = _version(package)
    if not version:
        return Probe(name, package, "", False, "not installed")
    if name in FOREIGN:
        try:
            importlib.import_module(MODULES.get(package, package))
        except Exception as error:
            return Probe(name, package, version, False, f"importing it fails: {_first_line(error)}")
        return Probe(name, package, version, True)
    try:
        return Probe(name, package, version, True, bits=_tried(name))
    except Exception as error:
        return Probe(name, package, version, False, f"a layer of 64 x 64 fails: {_first_line(error)}")


def probes() -> list[Probe]:
    """All ways of storing, in the order of the tables."""
    return [probe(name) for name in (*PACKAGES, *FOREIGN)]


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


def check_works(name: str) -> None:
    """As :func:`check_quantization`, and that a small layer works.

    Raises:
        InputError: it does not; the sentence names package, version and what failed.
    """
    check_quantization(name)
    if name != "none" and not (found := probe(name)).works:
        raise InputError(
            f"A base in {name} does not work here ({found.package} {found.version}: {found.reason}): choose another "
            "quantization, or install another version."
        )


def check_foreign(config: Any, source: str) -> None:
    """Refuse a checkpoint whose weights were stored by a package that does not work here.

    Args:
        config: the model's transformers configuration.
        source: the model's name, for the sentence.

    Raises:
        InputError: GPTQ, AWQ, HQQ or quanto weights without their package.
    """
    entry: Any = getattr(config, "quantization_config", None) or {}
    method = entry.get("quant_method", "") if isinstance(entry, dict) else getattr(entry, "quant_method", "")
    method = str(getattr(method, "value", method)).lower()
    if method not in FOREIGN or (found := probe(method)).works:
        return
    torch = _version("torch")
    needs = f", which needs torch 2.14.1 or newer (here is {torch})" if found.package == "gptqmodel" else ""
    raise InputError(
        f"The weights of '{source}' are stored as {method.upper()}; reading them needs the package {found.package}"
        f"{needs}, and here {found.reason}: take the unquantised model and set quantization to 4bit."
    )


def _tried(name: str) -> float:
    """Store a layer, use it, and count a larger one; raises whatever the backend raises."""
    import torch
    from torch import nn

    from adapters.compression.storage import plain_weight, stored_bytes

    generator = torch.Generator().manual_seed(0)

    def layer(size: int) -> Any:
        made: Any = nn.Sequential(nn.Linear(size, size, bias=False))
        with torch.no_grad():
            made[0].weight.copy_(torch.randn(size, size, generator=generator) / size**0.5)
        _store_all(made.requires_grad_(False), name, torch.float32)
        return made

    small: Any = layer(64)
    x = torch.randn(3, 64, generator=generator, requires_grad=True)
    y = small(x)
    y.square().sum().backward()
    y = y.detach()
    weight = plain_weight(small[0])
    if x.grad is None or not (y.isfinite().all() and x.grad.isfinite().all()):
        raise InputError("no finite output and gradient")
    if float((y - x.detach() @ weight.T).norm() / y.norm()) > 0.05:  # LLM.int8 rounds the inputs too
        raise InputError("its output is not that of its weight")
    large = layer(1024)
    return 8 * stored_bytes(large) / 1024**2


# ------------------------------------------------------------------------------------------------ storing layers


def quantize(model: nn.Module, name: str, dtype: torch.dtype, skip: Collection[str] = ()) -> int:
    """Store the linear layers of ``model`` in few bits, in place; returns how many.

    Layers that the model keeps in fp32, and for int4 those whose inputs are not a multiple of 32, stay as they are.

    Args:
        name: one of :data:`QUANTIZATIONS`.
        dtype: in which the layers compute.
        skip: paths of layers that stay as they are (the output layer of a language model).

    Raises:
        InputError, MissingDependencyError: see :func:`check_works`.
    """
    check_works(name)
    return 0 if name == "none" else _store_all(model, name, dtype, skip)


def storable(model: nn.Module, name: str, skip: Collection[str] = ()) -> dict[str, nn.Linear]:
    """Path -> layer, of the layers that :func:`quantize` stores in few bits."""
    from torch import nn

    kept = [re.escape(part) for part in getattr(model, "_keep_in_fp32_modules", None) or ()]
    keep = re.compile(rf"(^|\.)({'|'.join(kept)})(\.|$)") if kept else None
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and path not in skip
        and not (keep and keep.search(path))
        and not (name == "int4" and module.in_features % GROUP)
    }


def _store_all(model: nn.Module, name: str, dtype: torch.dtype, skip: Collection[str] = ()) -> int:
    change = _change(name, dtype)
    layers = storable(model, name, skip)
    for path, module in layers.items():
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, change(module))
    if PACKAGES[name] == "bitsandbytes":  # what PEFT and diffusers ask before they choose their layers
        setattr(model, f"is_loaded_in_{name}", True)
    return len(layers)


def transformers_options(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Options of transformers' ``from_pretrained`` that store the layers while loading, so that the whole model never
    has to fit; empty for ways that :func:`quantize` does after loading.

    Raises:
        InputError, MissingDependencyError: see :func:`check_works`.
    """
    check_works(name)
    if PACKAGES.get(name) != "bitsandbytes":
        return {}
    _bitsandbytes()  # quiet
    kind: Any = importlib.import_module("transformers").BitsAndBytesConfig
    chosen = kind(load_in_8bit=True) if name == "8bit" else kind(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )  # fmt: skip
    return {"quantization_config": chosen, "device_map": {"": device}}


def as_stored_here(model: nn.Module) -> None:
    """Make the layers that transformers stored compute as those of :func:`quantize`."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            _without_packing(module)


def _without_packing(module: Any) -> None:
    """No bitsandbytes kernel for CPUs: it rounds to bf16, rewrites the weight, and takes only certain sizes."""
    module.support_avx512bf16_for_cpu = False


def merge(layer: Any, adapter: str = "default") -> float:
    """Add a PEFT layer's update to its base weight and store the sum as the weight was stored.

    Returns:
        |stored sum - exact sum| / |update| (Frobenius): at 1 the rounding is as large as the update, so a merge that
        looks like success can cost more than the adapter gained.

    Raises:
        InputError: the weight is stored in a way into which nothing can be merged, or the update was lost.
    """
    import torch

    from adapters.compression.storage import plain_weight, storage
    from adapters.layers.variant import delta_like

    base, how = layer.get_base_layer(), storage(layer.get_base_layer())
    before = plain_weight(base).detach().clone()
    delta = delta_like(layer, adapter, before.float())
    exact = before.float() + delta
    name = {"nf4": "4bit", "int8": "8bit", "torchao int8": "int8", "torchao int4": "int4"}.get(how)
    if how == "" and type(base) is torch.nn.Linear:
        with torch.no_grad():
            base.weight.copy_(exact)
    elif name is None and not hasattr(base, "store"):
        kind = how or f"{type(base).__module__.split('.')[0]}'s {type(base).__name__}"
        raise InputError(
            f"No adapter can be merged into a weight stored as {kind}: keep the adapter beside the base, or merge it "
            "into the unquantised model."
        )
    elif name is None:
        base.store(exact)
    else:
        plain = torch.nn.Linear(base.in_features, base.out_features, base.bias is not None, device=exact.device)
        plain.weight, plain.bias = torch.nn.Parameter(exact.to(before), requires_grad=False), base.bias
        layer.base_layer = _change(name, before.dtype)(plain)
    after = plain_weight(layer.get_base_layer()).float()
    size = float(delta.norm())
    if size and float(((after - before.float()) * delta).sum()) < LOST * size**2:
        raise InputError(
            "Merging lost the update: it is smaller than the steps of the stored weight. Keep the adapter beside "
            "the base, or merge it into the unquantised model."
        )
    return float((after - exact).norm()) / size if size else 0.0


def _change(name: str, dtype: torch.dtype) -> Callable[[Any], nn.Module]:
    return {"8bit": _eight_bits, "4bit": _four_bits, "int8": _torchao_int8, "int4": _torchao_int4}[name](dtype)


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
        _without_packing(made)
        made.train(module.training).to(module.weight.device)  # which quantises
        return made

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
        return made

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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _first_line(error: BaseException) -> str:
    if isinstance(error, StudioError):
        return str(error)
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"[:300]
