"""A language model with adapters of any format, any number of them active at a time, each at its own strength.

The model itself is never changed: updates are added by hooks (:mod:`adapters.layers.gated`), so without adapters, and
at strength 0, its output is exactly the base's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from adapters.errors import FamilyError, InputError
from adapters.formats import LoraFile, read
from adapters.formats.fit import fit
from adapters.formats.foreign_mixture import is_foreign
from adapters.formats.lora import MODEL
from adapters.formats.mixture import mixture_config
from adapters.layers.gated import Adapter, GatedAdapters
from pipelines.language.compressed import check_tied

if TYPE_CHECKING:
    from adapters.layers.experts.beside import ExpertsBeside

Weights = Mapping[str, float]
"""Adapter name -> strength; an empty mapping is the base alone."""


def read_fitting(path: Path, model: nn.Module, base: str = "this base model") -> LoraFile:
    """The adapter at ``path`` with the module names of ``model``, every shape checked.

    Raises:
        InputError: it cannot be read, or is not an adapter that is supported.
        FamilyError: it has a module that the model lacks, or one of another shape.
    """
    return fitted(read(path), model, base)


def fitted(file: LoraFile, model: nn.Module, base: str = "this base model") -> LoraFile:
    """``file`` with the module names of ``model``, every shape checked.

    Raises:
        FamilyError: it has a module that the model lacks, or one of another shape.
    """
    check_tied(file.metadata, file.path.name if file.path else "the adapter", model)
    made_for = file.config.get("base_model_name_or_path")
    try:
        return fit(file, {MODEL: model}, base)
    except FamilyError as error:
        if not made_for:
            raise
        raise FamilyError(f"{error} Its configuration names the base '{made_for}'.") from None


class AdaptedModel:
    """A model with adapters that can be switched.

    Args:
        model: a loaded causal language model; it is not changed.
        base: its name in messages.

    Attributes:
        tasks: PEFT's names of the tasks whose adapters it takes.
        does: what it does, for messages.
    """

    tasks: ClassVar[tuple[str | None, ...]] = (None, "CAUSAL_LM")
    does: ClassVar[str] = "writing text"

    def __init__(self, model: Any, base: str = "this base model") -> None:
        self.model = model
        self.base = base
        self._files: dict[str, LoraFile] = {}
        self._mixtures: dict[str, ExpertsBeside] = {}
        self._columns: dict[tuple[str, float], int] = {}  # the gate of each adapter; DoRA has one per strength
        self._engine: GatedAdapters | None = None

    def read(self, path: Path) -> LoraFile:
        """The adapter at ``path``, fitted to the model; raises as :func:`read_fitting`."""
        return read_fitting(path, self.model, self.base)

    @property
    def names(self) -> list[str]:
        return [*self._files, *self._mixtures]

    def add(self, name: str, path: Path) -> None:
        """Load the adapter at ``path`` as ``name``, unless that name is loaded already.

        Raises:
            InputError: as :func:`read_fitting`.
            FamilyError: as :func:`read_fitting`, or an adapter for another task than text generation.
        """
        if name in self.names:
            return
        if mixture_config(path) is not None or is_foreign(path):
            from adapters.layers.experts.beside import ExpertsBeside

            self._mixtures[name] = ExpertsBeside(self.model, path)
            return
        file = self.read(path)
        if file.config.get("task_type") not in self.tasks:
            raise FamilyError(f"The adapter '{path.name}' is for {file.config['task_type']}, not for {self.does}.")
        self._files[name] = file
        self._engine = None

    def remove(self, name: str) -> None:
        """Unload an adapter."""
        if name in self._mixtures:
            del self._mixtures[name]
            return
        del self._files[name]
        self._engine = None

    @contextmanager
    def active(self, weights: Weights) -> Iterator[Any]:
        """Inside, the yielded model computes with these adapters, each update added at its strength.

        A DoRA adapter is normalised at its strength, as PEFT does with a scaled ``lora_alpha``; at 0 it has no effect.

        A mixture of experts is either on or off, and at most one is on; LoRAs act beside it.

        Raises:
            InputError: an adapter is not loaded, or a mixture has a strength between.
        """
        unknown = [name for name in weights if name not in self.names]
        if unknown:
            raise InputError(f"The adapter '{unknown[0]}' is not loaded.")
        with ExitStack() as stack:
            for name in self._chosen_mixtures(weights):
                stack.enter_context(self._mixtures[name].active())
            yield stack.enter_context(self._with_loras({n: w for n, w in weights.items() if n in self._files}))

    def _chosen_mixtures(self, weights: Weights) -> list[str]:
        chosen = [name for name, weight in weights.items() if weight and name in self._mixtures]
        for name in chosen:
            if weights[name] != 1:
                raise InputError(
                    f"'{name}' is a mixture of experts, which has no strengths between 0 and 1: use 1, not "
                    f"{weights[name]:g}."
                )
        if len(chosen) > 1:
            raise InputError(f"'{chosen[0]}' and '{chosen[1]}' are both mixtures of experts: use one at a time.")
        return chosen

    @contextmanager
    def _with_loras(self, weights: Weights) -> Iterator[Any]:
        used = {
            (name, weight) if self._files[name].is_dora() else (name, 1.0): weight
            for name, weight in weights.items()
            if weight
        }
        if not used:
            yield self.model
            return
        engine = self._prepared(list(used))
        gates = [0.0] * len(self._columns)
        for (name, strength), weight in used.items():
            gates[self._columns[name, strength]] = 1.0 if self._files[name].is_dora() else weight
        with engine.attached() as handle:
            handle.joint(gates)
            yield self.model

    def _prepared(self, used: list[tuple[str, float]]) -> GatedAdapters:
        """The engine for at least these adapters; kept, with every plain adapter in it, until another is needed."""
        if self._engine is not None and all(one in self._columns for one in used):
            return self._engine
        plain = [(name, 1.0) for name, file in self._files.items() if not file.is_dora()]
        wanted = [*plain, *(one for one in used if one not in plain)]
        like = next(p for p in self.model.parameters() if p.is_floating_point())
        chosen = [Adapter(self._files[name].parts[MODEL], strength=strength) for name, strength in wanted]
        with torch.no_grad():
            self._engine = GatedAdapters(self.model, chosen, like.device, like.dtype)
        self._columns = {one: number for number, one in enumerate(wanted)}
        return self._engine
