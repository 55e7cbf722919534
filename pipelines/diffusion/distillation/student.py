"""One model as teacher and student: the student's adapter is on, the teacher is the same weights with it off.

Only the named adapter is switched: other adapters of the model (for example a style) act in both. The adapter's layers
are looked up once, because walking a large model takes as long as a step of a small one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class Student:
    """Switches one PEFT adapter in a model that teacher and student share.

    Args:
        model: the denoiser with the adapter injected.
        adapter: its name in PEFT.
    """

    def __init__(self, model: nn.Module, adapter: str) -> None:
        self.adapter = adapter
        self.layers: list[Any] = [
            module
            for module in model.modules()
            if isinstance(module, BaseTunerLayer) and adapter in getattr(module, "lora_A", {})
        ]
        self._scales = [float(layer.scaling[adapter]) for layer in self.layers]
        self._strengths: Tensor | None = None
        self._hooks: list[Any] = []

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model is the teacher.

        PEFT's flag is set directly: its ``enable_adapters`` also changes which parameters require gradients. Do not run
        a backward pass inside, because gradient checkpointing repeats the student's forward pass there.
        """
        before = [layer._disable_adapters for layer in self.layers]
        for layer in self.layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, value in zip(self.layers, before, strict=True):
                layer._disable_adapters = value

    def set_strength(self, values: Tensor | None) -> None:
        """Set the adapter's strength per sample of the next batches to ``values`` (batch,); None = 1 for all.

        It stays until it is set again, so it also holds in forward passes repeated by gradient checkpointing.
        """
        self._strengths = values
        if values is not None and not self._hooks:
            self._hooks = [
                layer.register_forward_pre_hook(self._scale_to(scale))
                for layer, scale in zip(self.layers, self._scales, strict=True)
            ]
        if values is None:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            for layer, scale in zip(self.layers, self._scales, strict=True):
                layer.scaling[self.adapter] = scale

    def _scale_to(self, scale: float) -> Any:
        def scaled(layer: Any, args: tuple[Any, ...]) -> None:
            assert self._strengths is not None
            x = args[0]
            if x.shape[0] != len(self._strengths):
                raise RuntimeError(f"a batch of {x.shape[0]} met strengths for {len(self._strengths)} samples")
            layer.scaling[self.adapter] = scale * self._strengths.to(x.device).view(-1, *[1] * (x.ndim - 1))

        return scaled


def static_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's tensors, each storage counted once: ``frozen``, ``learning``."""
    seen: set[int] = set()
    sums = {"frozen": 0, "learning": 0}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen:
            continue
        seen.add(storage.data_ptr())
        learning = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        sums["learning" if learning else "frozen"] += storage.nbytes()
    return sums


def first_not_finite(target: Tensor) -> int | None:
    """Index of the first sample of ``target`` (batch, ...) with a value that is not finite; None if all are finite."""
    finite = torch.isfinite(target).flatten(1).all(dim=1)
    return None if bool(finite.all()) else int((~finite).nonzero()[0])
