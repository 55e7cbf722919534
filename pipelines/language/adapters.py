"""PEFT adapters of language models: does one belong to this base, and laying several on it with weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer as PeftLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from adapters.errors import FamilyError, InputError
from adapters.formats.fit import check_copy
from adapters.formats.keys import split_role
from adapters.formats.peft_directory import CONFIG, COPY, PREFIX, WEIGHTS

Weights = Mapping[str, float]
"""Adapter name -> strength; an empty mapping is the base alone."""


def check_fits(path: Path, model: nn.Module, base: str = "this base model") -> dict[str, Any]:
    """Compare every layer of the adapter in ``path`` with the model; returns its configuration.

    Raises:
        InputError: it is no PEFT adapter, or damaged.
        FamilyError: a module the model does not have, or of another shape.
    """
    config = read_config(path)
    file = path / WEIGHTS[0]
    if not file.is_file():
        raise InputError(f"The adapter '{path.name}' has no {WEIGHTS[0]}: save it as safetensors.")
    modules = dict(model.named_modules())
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                found = split_role(key)
                if key.endswith(COPY):  # PEFT would lay it over the base's own
                    name = key.removeprefix(PREFIX).removesuffix(COPY)
                    check_copy(opened.get_tensor(key), modules.get(name), name, f"'{path.name}'", base)
                if found is None or found[1] not in ("A", "B", "table_A", "table_B"):
                    continue
                name, side = found[0].removeprefix(PREFIX), found[1][-1]
                module = modules.get(name)
                if module is None or not hasattr(module, "weight"):
                    raise FamilyError(
                        f"The adapter '{path.name}' does not fit {base}: it adapts '{name}', which that model does not "
                        f"have{_made_for(config)}."
                    )
                if isinstance(module, nn.Embedding) is not found[1].startswith("table"):
                    raise FamilyError(
                        f"The adapter '{path.name}' does not fit {base}: its layer '{name}' is of another kind than "
                        f"that model's {type(module).__name__}{_made_for(config)}."
                    )
                _check_shape(path.name, base, name, side, opened.get_slice(key).get_shape(), module, config)
    except SafetensorError as error:
        raise InputError(f"The adapter '{path.name}' is damaged ({error}).") from None
    return config


def read_config(path: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a PEFT directory; raises :class:`InputError` when there is none or it is no LoRA."""
    file = path / CONFIG
    if not file.is_file():
        raise InputError(f"'{path}' is no PEFT adapter: a folder with {CONFIG} is expected.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"'{file}' is not JSON ({error}).") from None
    if not isinstance(config, dict) or str(config.get("peft_type")).upper() != "LORA":
        raise InputError(f"'{path.name}' is no LoRA adapter of PEFT.")
    return config


def _check_shape(
    adapter: str, base: str, name: str, side: str, shape: list[int], module: Any, config: Mapping[str, Any]
) -> None:
    outputs, inputs = sizes(module)
    wanted, found = (inputs, shape[-1]) if side == "A" else (outputs, shape[0])
    if wanted != found:
        raise FamilyError(
            f"The adapter '{adapter}' does not fit {base}: its layer '{name}' is for {found} "
            f"{'inputs' if side == 'A' else 'outputs'}, the model has {wanted}{_made_for(config)}."
        )


def sizes(module: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer, whatever kind it is (GPT-2's Conv1D stores its weight transposed).

    A table of embeddings has one input per token.
    """
    if hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)
    if type(module).__name__ == "Conv1D" or isinstance(module, nn.Embedding):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return int(module.weight.shape[0]), int(module.weight[0].numel())


def _made_for(config: Mapping[str, Any]) -> str:
    base = config.get("base_model_name_or_path")
    return f" (it was made for '{base}')" if base else ""


class Laid:
    """A model with adapters on it, of which any may speak at a time.

    Args:
        model: a loaded causal language model; it is wrapped in place by PEFT when the first adapter comes.
        base: what to call it in messages.
    """

    def __init__(self, model: Any, base: str = "this base model") -> None:
        self.base = base
        self._bare = model
        self._wrapped: Any = None
        self._scales: dict[str, dict[str, float]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._scales)

    def add(self, name: str, path: Path) -> None:
        """Load the adapter in ``path`` as ``name``; raises as :func:`check_fits`."""
        from peft import PeftModel

        if name in self._scales:
            return
        config = check_fits(path, self._bare if self._wrapped is None else self._plain(), self.base)
        if config.get("task_type") not in (None, "CAUSAL_LM"):
            raise FamilyError(f"The adapter '{path.name}' is for {config['task_type']}, not for writing text.")
        if self._wrapped is None:
            self._wrapped = PeftModel.from_pretrained(self._bare, str(path), adapter_name=name)
        else:
            self._wrapped.load_adapter(str(path), adapter_name=name)
        self._wrapped.eval().requires_grad_(False)
        self._scales[name] = {where: module.scaling[name] for where, module in self._lora(name)}

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        if len(self._scales) == 1:
            self._bare = self._wrapped.unload()
            self._wrapped = None
        else:
            self._wrapped.delete_adapter(name)
        del self._scales[name]

    @contextmanager
    def speaking(self, weights: Weights) -> Iterator[Any]:
        """Inside, the model answers with these adapters (their updates added, each times its weight).

        Raises:
            InputError: an adapter that was not added.
        """
        unknown = [name for name in weights if name not in self._scales]
        if unknown:
            raise InputError(f"The adapter '{unknown[0]}' is not loaded.")
        if self._wrapped is None:
            yield self._bare
        elif not weights:
            with self._wrapped.disable_adapter():
                yield self._wrapped
        else:
            self._wrapped.base_model.set_adapter(list(weights))
            self._wrapped.requires_grad_(False)
            for name, weight in weights.items():
                for where, module in self._lora(name):
                    module.scaling[name] = self._scales[name][where] * weight
            yield self._wrapped

    def _lora(self, name: str) -> Iterator[tuple[str, Any]]:
        for where, module in self._wrapped.named_modules():
            if isinstance(module, PeftLayer) and name in module.scaling:  # attention has a number of this name
                yield where, module

    def _plain(self) -> nn.Module:
        """The module names of the base as they were before the adapters came."""
        return _Names(
            {_without_wrapper(name): module for name, module in self._wrapped.base_model.model.named_modules()}
        )


def _without_wrapper(name: str) -> str:
    return name.removesuffix(".base_layer")


class _Names(nn.Module):
    """Modules under given names, for looking up only."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._given = modules

    def named_modules(self, *args: Any, **options: Any) -> Any:
        return iter(self._given.items())
