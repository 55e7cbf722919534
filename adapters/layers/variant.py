"""One PEFT layer variant made of independent parts, so that training methods combine.

    y = base(x) + s (f(drop(x); A, B) - B0 A0 drop(x)) + e(x)

PEFT allows one ``LoraVariant`` per layer and adapter; ours is attached after a plain injection and holds

- an offset (A0, B0), frozen: the model starts as the pre-trained one although A and B are not zero, the base is never
  changed, and the update is s (B A - B0 A0), an ordinary LoRA of rank 2r;
- a core R (r, r) between A and B (LoRA-SB): the update is s B R A;
- a share (S2-LoRA): the pair belongs to several layers, and the update is s B diag(v) A with an own v;
- a rule f that sets how gradients flow (ALLoRA); without one, plain autograd;
- a perturbation e(x), in training mode only.

Only A, B, the core R and v are in PEFT's state dict; :func:`read_layers` gives the adapter as an ordinary LoRA. It
works on quantised bases too, since the base is only called. A layer without parts has no variant and is exactly PEFT's
own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import Conv2d as LoraConv2d
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer as PeftLayer
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers.pytorch_utils import Conv1D

from adapters.compression.storage import plain_weight
from adapters.errors import InputError
from adapters.formats.lora import LoraLayer
from adapters.layers.shared import Shares

OFFSET = "studio_offset"
CORE = "lora_R"
SHARES = "lora_shares"
PREFIX = "base_model.model."


class Rule(Protocol):
    """The product B A x with its own gradients."""

    def __call__(self, layer: Any, adapter: str, x: Tensor) -> Tensor:
        """B A x (without s) for the layer's input."""


class Perturbation(Protocol):
    """A term added to the output in training."""

    def __call__(self, layer: Any, adapter: str, x: Tensor) -> Tensor | None:
        """e(x), shaped like the layer's output, or None for nothing."""


class Offset(nn.Module):
    """The frozen start of a pair: A0 and B0 move and are cast with the model, but are not in its state dict."""

    def __init__(self, A0: Tensor, B0: Tensor) -> None:
        super().__init__()
        self.register_buffer("A0", A0, persistent=False)
        self.register_buffer("B0", B0, persistent=False)


class StudioVariant(LoraVariant):
    """The parts of one adapter on one layer."""

    def __init__(self) -> None:
        self.rule: Rule | None = None
        self.perturbation: Perturbation | None = None

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """``result`` (the base's output) plus the adapter's update."""
        if isinstance(module, LoraEmbedding):
            return _embedding(module, active_adapter, x, result)
        return self._linear(module, active_adapter, x, result)

    def _linear(self, module: Any, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        down, up, scale = module.lora_A[adapter], module.lora_B[adapter], module.scaling[adapter]
        dropped = module.lora_dropout[adapter](x)
        core = _part(module, CORE, adapter)
        shares = shares_of(module, adapter)
        if self.rule is not None:
            update = self.rule(module, adapter, dropped)
        elif shares is not None:
            update = shares(dropped)
        elif core is not None:
            update = up(_through(core, down(dropped), isinstance(module, LoraConv2d)))
        else:
            update = up(down(dropped))
        offset = _part(module, OFFSET, adapter)
        if offset is not None:  # equal products cancel exactly
            update = update - product(module, adapter, dropped, offset.A0, offset.B0)
        result = result + update * scale
        if self.perturbation is not None and module.training:
            extra = self.perturbation(module, adapter, x)
            result = result if extra is None else result + extra
        return result

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """The merged weight, a new tensor."""
        return orig_weight + delta_like(module, active_adapter, orig_weight)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        """Merge in place."""
        orig_weight.data += delta_like(module, active_adapter, orig_weight)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """The weight before merging."""
        return orig_weight - delta_like(module, active_adapter, orig_weight)


# ------------------------------------------------------------------------------------------------ layers of a model


def adapted(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """Module path in the base model -> PEFT's LoRA layer, for the layers that hold ``adapter``."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, PeftLayer)
        and not isinstance(module, AdaLoraLayer)  # its pairs are parameters of their own (adapters.learn.adalora)
        and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    }


def attach(layer: Any, adapter: str = "default") -> StudioVariant:
    """The layer's :class:`StudioVariant`, new if there is none.

    Raises:
        InputError: the layer already has one of PEFT's own variants (DoRA, ...).
    """
    present = layer.lora_variant.get(adapter)
    if present is None:
        present = layer.lora_variant[adapter] = StudioVariant()
    if not isinstance(present, StudioVariant):
        kind = type(present).__name__
        raise InputError(f"This layer already has PEFT's variant {kind}, which no training method combines with.")
    return present


def set_offset(layer: Any, A: Tensor, B: Tensor, adapter: str = "default") -> None:
    """Start the pair at A (r, in...) and B (out, r...) without changing the model: copies become its offset."""
    attach(layer, adapter)
    down, up = pair(layer, adapter)
    with torch.no_grad():
        down.copy_(A.reshape(down.shape))
        up.copy_(B.reshape(up.shape))
    _store(layer, OFFSET, adapter, Offset(down.detach().clone(), up.detach().clone()))


def set_offset_buffers(layer: Any, A0: Tensor, B0: Tensor, adapter: str = "default") -> None:
    """Restore an offset that :func:`offset_of` returned; A and B stay as they are."""
    attach(layer, adapter)
    down, up = pair(layer, adapter)
    _store(layer, OFFSET, adapter, Offset(A0.to(down).reshape(down.shape), B0.to(up).reshape(up.shape)))


def offset_of(layer: Any, adapter: str = "default") -> tuple[Tensor, Tensor] | None:
    """(A0, B0), or None."""
    offset = _part(layer, OFFSET, adapter)
    return None if offset is None else (offset.A0, offset.B0)


def set_residual(layer: Any, left: Tensor, right: Tensor, adapter: str = "default") -> None:
    """Add s left right x, frozen, to the layer's output: left (out, q), right (q, in * kernel), any q.

    Stored as an offset with the sign changed, so the base stays as it is and :func:`read_layers` includes it.

    Raises:
        InputError: the layer has an offset already.
    """
    if offset_of(layer, adapter) is not None:
        raise InputError("This layer already starts at an offset, to which nothing can be added.")
    attach(layer, adapter)
    down, up = pair(layer, adapter)
    kept = right.to(down).reshape(-1, *down.shape[1:]), -left.to(up).reshape(up.shape[0], -1, *up.shape[2:])
    _store(layer, OFFSET, adapter, Offset(*kept))


def set_core(layer: Any, R: Tensor, adapter: str = "default") -> Tensor:
    """Put a trained R (r, r) between A and B and freeze both; returns R."""
    attach(layer, adapter)
    down, _ = pair(layer, adapter)
    core = skip_init(nn.Linear, R.shape[1], R.shape[0], bias=False, device=down.device, dtype=down.dtype)
    with torch.no_grad():
        core.weight.copy_(R)
    if CORE not in layer.adapter_layer_names:  # so that PEFT freezes and activates it with the rest
        layer.adapter_layer_names = (*layer.adapter_layer_names, CORE)
    _store(layer, CORE, adapter, core)
    freeze(layer, "lora_A", adapter)
    freeze(layer, "lora_B", adapter)
    return core.weight


def core_of(layer: Any, adapter: str = "default") -> Tensor | None:
    """R, or None."""
    core = _part(layer, CORE, adapter)
    return None if core is None else core.weight


def set_shares(layer: Any, shares: Shares, adapter: str = "default") -> None:
    """Put a share in the place of the layer's own pair, which becomes empty (rank 0) and frozen.

    Raises:
        InputError: the layer is not linear, or PEFT computes it without variants.
    """
    kind = type(layer).__module__.rpartition(".")[2]
    if kind not in _WITH_VARIANTS or isinstance(layer, LoraConv2d | LoraEmbedding):
        raise InputError(
            f"A {type(layer.get_base_layer()).__name__} cannot share a pair: leave it out of the targets, or load the "
            "base without quantization."
        )
    attach(layer, adapter)
    for name, empty in (("lora_A", slice(0, 0)), ("lora_B", (slice(None), slice(0, 0)))):
        own = getattr(layer, name)[adapter]
        own.weight = nn.Parameter(own.weight.detach()[empty].clone(), requires_grad=False)
        own.out_features, own.in_features = own.weight.shape
        freeze(layer, name, adapter)
    if SHARES not in layer.adapter_layer_names:
        layer.adapter_layer_names = (*layer.adapter_layer_names, SHARES)
    _store(layer, SHARES, adapter, shares)


_WITH_VARIANTS = ("layer", "bnb", "gptq", "hqq", "torchao")
"""PEFT's modules of layers that call a variant."""


def shares_of(layer: Any, adapter: str = "default") -> Shares | None:
    """The layer's share of a pair, or None."""
    found: Shares | None = _part(layer, SHARES, adapter)
    return found


def freeze(layer: Any, weight: str, adapter: str = "default") -> None:
    """Freeze ``"lora_A"`` or ``"lora_B"`` for good: PEFT's ``set_adapter`` does not unfreeze it.

    PEFT's function for this is private. If a release drops it, the weight is still frozen, but only until the next
    ``set_adapter``; a test checks that the function exists.
    """
    getattr(layer, weight)[adapter].requires_grad_(False)
    try:
        from peft.tuners.lora.variants import _register_frozen_peft_weight
    except ImportError:
        return
    _register_frozen_peft_weight(layer, adapter, weight)


def pair(layer: Any, adapter: str = "default") -> tuple[Tensor, Tensor]:
    """The parameters A (r, in...) and B (out, r...) of a layer."""
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]


@torch.no_grad()
def effective(layer: Any, adapter: str = "default") -> tuple[Tensor, Tensor]:
    """(L, R) with update s L R: L (out, k), R (k, in * kernel), detached, in fp32 or the adapter's higher dtype."""
    if (shares := shares_of(layer, adapter)) is not None:
        found, lifted = shares.as_lora()
        return lifted, found
    down, up = (_precise(tensor.detach().flatten(1)) for tensor in pair(layer, adapter))
    core, offset = core_of(layer, adapter), offset_of(layer, adapter)
    if core is not None:
        up = up @ _precise(core.detach())
    if offset is not None:
        A0, B0 = (_precise(tensor.flatten(1)).to(down) for tensor in offset)
        down, up = torch.cat([down, A0]), torch.cat([up, -B0], dim=1)
    return up, down


def base_weight(layer: Any) -> Tensor:
    """W0 (out, in * kernel) of a layer, dequantised, outputs first even where the layer stores the transpose."""
    base = layer.get_base_layer() if isinstance(layer, PeftLayer) else layer
    weight = plain_weight(base)
    if isinstance(base, Conv1D | nn.Embedding) or getattr(layer, "fan_in_fan_out", False):
        return weight.detach().T
    return weight.detach().flatten(1)


def delta_like(layer: Any, adapter: str, weight: Tensor) -> Tensor:
    """s L R in the shape and dtype of the layer's own weight."""
    left, right = effective(layer, adapter)
    delta = layer.scaling[adapter] * (left @ right)
    if getattr(layer, "fan_in_fan_out", False) or isinstance(layer, LoraEmbedding):
        delta = delta.T
    return delta.reshape(weight.shape).to(weight)


def read_layers(model: nn.Module, adapter: str = "default") -> dict[str, LoraLayer]:
    """The adapter of ``model`` as an ordinary LoRA of the untouched base: module path -> copy of its layer (CPU).

    Layers whose share is zero are left out.
    """
    found = {}
    for name, layer in adapted(model, adapter).items():
        down, up = pair(layer, adapter)
        parts = (core_of(layer, adapter), offset_of(layer, adapter), shares_of(layer, adapter))
        plain = all(part is None for part in parts)
        if plain:
            A, B = down.detach().clone(), up.detach().clone()
        else:
            left, right = effective(layer, adapter)
            if not left.numel():
                continue
            A, B = right.reshape(-1, *down.shape[1:]), left.reshape(left.shape[0], -1, *up.shape[2:])
        rank = A.shape[0]
        rslora = bool(layer.use_rslora.get(adapter, False))
        magnitudes = getattr(layer, "lora_magnitude_vector", {})
        magnitude = magnitudes[adapter].weight.detach().clone().flatten().cpu() if adapter in magnitudes else None
        alpha = layer.scaling[adapter] * (math.sqrt(rank) if rslora else rank)
        found[name] = LoraLayer(A.to(down.dtype).cpu().contiguous(), B.to(up.dtype).cpu().contiguous(), alpha, rslora,
                                magnitude, isinstance(layer, LoraEmbedding))  # fmt: skip
    return found


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` computes what its base does: adapters, perturbations and dropout are off; restored on exit.

    PEFT's flags are set directly: its ``disable_adapter`` also changes which parameters require gradients, and walks
    the model so often that it takes as long as a small model's forward pass.
    """
    learning = [module for module in model.modules() if module.training]
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [module._disable_adapters for module in adapted]
    try:
        for module in learning:
            module.training = False
        for module in adapted:
            module._disable_adapters = True
        yield
    finally:
        for module in learning:
            module.training = True
        for module, value in zip(adapted, before, strict=True):
            module._disable_adapters = value


# ------------------------------------------------------------------------------------------------ products


def product(layer: Any, adapter: str, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """up down x with the layer's own geometry (stride, padding): down (k, in...), up (out, k...)."""
    module = layer.lora_A[adapter]
    if isinstance(module, nn.Conv2d):
        down = down.reshape(-1, *module.weight.shape[1:])
        hidden = F.conv2d(x, down, None, module.stride, module.padding, module.dilation, module.groups)
        return F.conv2d(hidden, up.reshape(up.shape[0], -1, 1, 1))
    return F.linear(F.linear(x, down), up)


def _through(core: nn.Module, hidden: Tensor, convolution: bool) -> Tensor:
    return core(hidden.movedim(1, -1)).movedim(-1, 1) if convolution else core(hidden)


def _embedding(layer: Any, adapter: str, x: Tensor, result: Tensor) -> Tensor:
    down, up = pair(layer, adapter)
    update = F.embedding(x, down.T) @ up.T
    offset = offset_of(layer, adapter)
    if offset is not None:
        update = update - F.embedding(x, offset[0].T) @ offset[1].T
    size = layer._get_embed_scale()
    update = update * layer.scaling[adapter]
    return result + (update if size is None else update * size.to(update))


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _store(layer: Any, kind: str, adapter: str, part: nn.Module) -> None:
    if not hasattr(layer, kind):
        setattr(layer, kind, nn.ModuleDict())
    getattr(layer, kind)[adapter] = part


def _part(layer: Any, kind: str, adapter: str) -> Any:
    parts = getattr(layer, kind, None)
    return parts[adapter] if parts is not None and adapter in parts else None
