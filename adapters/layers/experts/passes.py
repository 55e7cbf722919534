"""X-LoRA's two passes: the base alone gives every token's gates, then the model runs with the gated experts.

The first pass needs only the body of the model (no head, no loss), runs without gradients and without dropout, and its
hidden state is a constant: the classifier learns through the gates in the second pass alone.

Decoding keeps two caches. Attention is causal, so what was computed for earlier tokens never changes, in either pass: a
new token costs two passes over one token, instead of two over the whole text.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from adapters.errors import InputError

if TYPE_CHECKING:
    from adapters.layers.experts.classifier import Classifier
    from adapters.layers.experts.frozen import FrozenExperts
    from adapters.layers.experts.routing import Routing

_OF_THE_HEAD = (
    "labels", "logits_to_keep", "num_logits_to_keep", "num_items_in_batch", "shift_labels", "output_hidden_states",
    "output_attentions", "return_dict", "past_key_values", "use_cache", "next_sentence_label",
)  # fmt: skip


class PairedCache(DynamicCache):
    """The cache of the adapted pass; ``first`` is that of the base pass. Whatever is done to one is done to both."""

    first: DynamicCache

    @classmethod
    def of(cls, cache: DynamicCache) -> PairedCache:
        """``cache`` itself (which must be empty), from now on with a second one beside it."""
        first = copy.deepcopy(cache)
        cache.__class__ = cls
        assert isinstance(cache, PairedCache)
        cache.first = first
        return cache

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.first.reorder_cache(beam_idx)

    def crop(self, *args: Any, **options: Any) -> None:
        super().crop(*args, **options)
        self.first.crop(*args, **options)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.first.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.first.batch_select_indices(indices)

    def reset(self) -> None:
        super().reset()
        self.first.reset()


class GatesFromBase:
    """Called before every forward pass of the base model: sets the gates in the routing context.

    Attributes:
        owners: adapter -> the layer that keeps its classifier.
        fixed: gates to use instead of the classifier's, (N,) or (L, N); None = the classifier's.
        last: the gates of the last pass (batch, length, [L,] N), detached.
    """

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self.owners: dict[str, FrozenExperts] = {}
        self.fixed: Tensor | None = None
        self.last: Tensor | None = None

    def __call__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the second pass."""
        adapter = self._active()
        if adapter is None:
            self.routing.external_gates = None
            return args, kwargs
        if self.fixed is not None:
            shape = (1, 1, *self.fixed.shape)
            self.routing.external_gates = self.last = self.fixed.view(shape)
            return args, kwargs
        given = dict(zip(_names(type(model)), args, strict=False)) | kwargs
        cache = self._pair(model, given)
        hidden = self._base_pass(model, given, cache, adapter)
        gates = self._classifier(adapter)(hidden)
        self.routing.external_gates, self.last = gates, gates.detach()
        return (), given

    def _active(self) -> str | None:
        """The X-LoRA adapter that acts; None if none does."""
        found = [
            name
            for name, owner in self.owners.items()
            if name in owner.active_adapters and name in owner.moeadapter_router and not owner.disable_adapters
        ]
        if not found:
            return None
        if len(found) > 1:
            raise InputError(f"'{found[0]}' and '{found[1]}' are both X-LoRAs, with gates of their own: activate one.")
        return found[0]

    def _classifier(self, adapter: str) -> Classifier:
        return cast("Classifier", self.owners[adapter].moeadapter_router[adapter])

    def _pair(self, model: Any, given: dict[str, Any]) -> DynamicCache | None:
        """The base pass's cache, if this call keeps one; gives the call a pair of caches where it has none."""
        cache = given.get("past_key_values")
        if isinstance(cache, PairedCache):
            return cache.first
        if cache is None:
            wanted = given.get("use_cache")
            wanted = getattr(model.config, "use_cache", False) if wanted is None else wanted
            causal = "past_key_values" in inspect.signature(type(model).forward).parameters
            if not (wanted and causal) or torch.is_grad_enabled():
                return None
            cache = given["past_key_values"] = DynamicCache(config=model.config)
        if type(cache) is not DynamicCache:
            raise InputError(
                f"X-LoRA keeps two caches that grow with the text, not a {type(cache).__name__}: leave "
                "cache_implementation empty."
            )
        if cache.get_seq_length():
            raise InputError(
                "This cache was filled without X-LoRA, whose gates need the base's own states too: begin with an empty "
                "cache."
            )
        return PairedCache.of(cache).first

    @torch.no_grad()
    def _base_pass(self, model: Any, given: Mapping[str, Any], cache: DynamicCache | None, adapter: str) -> Tensor:
        """The last hidden state after the final norm: (batch, length, d)."""
        body = body_of(model)
        options = {name: value for name, value in given.items() if name not in _OF_THE_HEAD and value is not None}
        parameters = inspect.signature(type(body).forward).parameters
        if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            options = {name: value for name, value in options.items() if name in parameters}
        if "use_cache" in parameters:
            options |= {"use_cache": cache is not None, "past_key_values": cache}
        owner, routing = self.owners[adapter], self.routing
        value = float(owner.settings[adapter].classifier.get("pass_value", 0.0))
        with _still(body):
            routing.resting = value == 0
            routing.external_gates = owner.moeadapter_A[adapter].new_full((1, 1, owner.places[adapter].experts), value)
            try:
                found = body.forward(**options)  # not called: hooks are for the second pass
            finally:
                routing.resting, routing.external_gates = False, None
        hidden = getattr(found, "last_hidden_state", None)
        if not isinstance(hidden, Tensor):
            raise InputError(
                f"X-LoRA reads the last hidden state of the base, but {type(body).__name__} gives none: choose a base "
                "whose body returns last_hidden_state."
            )
        return hidden.clone() if hidden.is_inference() and not torch.is_inference_mode_enabled() else hidden


def body_of(model: Any) -> nn.Module:
    """The part of a transformers model that gives the hidden states, without its head."""
    prefix = getattr(model, "base_model_prefix", "")
    found = getattr(model, prefix, None) if prefix else None
    return found if isinstance(found, nn.Module) else model


def width_of(model: Any) -> int:
    """Numbers per token in the last hidden state.

    Raises:
        InputError: the model's configuration does not say.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", None) or getattr(config, "n_embd", None) or getattr(config, "d_model", None)
    if not isinstance(width, int):
        raise InputError(f"The configuration of {type(model).__name__} has no hidden_size: set the classifier's width.")
    return width


@contextmanager
def _still(body: nn.Module) -> Iterator[None]:
    """Inside, the body is in evaluation mode, each module as before afterwards."""
    learning = [module for module in body.modules() if module.training]
    for module in learning:
        module.training = False
    try:
        yield
    finally:
        for module in learning:
            module.training = True


def _names(kind: type) -> list[str]:
    """Names of the arguments of a model's forward, without self."""
    return list(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]
