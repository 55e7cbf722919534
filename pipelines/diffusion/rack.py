"""The adapters loaded on a base model, and their joined matrices for a composition."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.errors import FamilyError, InputError, nearest
from adapters.formats import LoraFile, read
from adapters.formats.coverage import coverage
from adapters.formats.fit import fit
from adapters.formats.lora import LoraLayer
from adapters.layers.gated import Adapter, GatedAdapters
from pipelines.diffusion import halves
from pipelines.diffusion.checks import block_factor, check_blocks, check_weight
from pipelines.diffusion.distillation.use import Distilled, distilled
from pipelines.diffusion.families import Family, family_of_adapter
from pipelines.diffusion.loading import DTYPES, Settings, modern_blocks
from pipelines.diffusion.regions.region import CROSS_LAYERS, Region, check_own_region
from pipelines.diffusion.report import LoraReport
from pipelines.diffusion.schedule import By, Keyframes, check_keyframes


@dataclass(frozen=True)
class Loaded:
    """A loaded adapter: its report, and its layers fitted to the model."""

    report: LoraReport
    file: LoraFile
    distilled: Distilled | None = None

    @property
    def active_distilled(self) -> Distilled | None:
        """Its distillation, unless its weight is 0."""
        return self.distilled if self.report.weight != 0 else None

    def text_strength(self) -> float:
        """Its gate in the text encoders (a DoRA adapter's strength is part of its matrices)."""
        return 1.0 if self.report.dora else self.report.te_weight


@dataclass
class Joined:
    """The joined adapters of one composition: for the denoiser and for each text encoder."""

    key: tuple[Any, ...]
    denoiser: GatedAdapters
    text: dict[str, GatedAdapters] = field(default_factory=dict)


class Rack:
    """The loaded adapters, by name.

    Args:
        pipe: the diffusers pipeline they are for; it is never changed.
        family: its family.
        settings: its settings.
    """

    def __init__(self, pipe: Any, family: Family, settings: Settings) -> None:
        self.pipe, self.family, self.settings = pipe, family, settings
        self.loaded: dict[str, Loaded] = {}
        self._joined: Joined | None = None

    @property
    def denoiser(self) -> Any:
        """The first denoising network."""
        return getattr(self.pipe, self.family.denoiser)

    @property
    def denoisers(self) -> dict[str, Any]:
        """Attribute -> denoising network, for all that this base has."""
        return {one.name: getattr(self.pipe, one.name) for one in self.family.present(self.pipe)}

    @property
    def components(self) -> tuple[str, ...]:
        """The parts of the pipeline that an adapter may change."""
        return (*self.denoisers, *self.family.text_encoders)

    def load(
        self,
        path: str | Path | LoraFile,
        name: str | None,
        weight: float,
        te_weight: float | None,
        triggers: Sequence[str],
        blocks: Mapping[str, float] | None,
        schedule: Keyframes | None,
        schedule_by: By,
        region: Region | Mapping[str, Any] | None,
        denoiser: str = "",
    ) -> LoraReport:
        """See :meth:`pipelines.diffusion.pipeline.MultiLoRAPipeline.load_lora`."""
        parts = self.family.present(self.pipe)
        file = path if isinstance(path, LoraFile) else read(halves.pair_in(Path(path), parts) or path)
        chosen = name or (file.path.stem if file.path else "adapter")
        if chosen in self.loaded:
            raise InputError(f"An adapter named '{chosen}' is already loaded: give this one another name.")
        weight = check_weight(weight, f"The weight of '{chosen}'")
        te_weight = weight if te_weight is None else check_weight(te_weight, f"The te_weight of '{chosen}'")
        keyframes = check_keyframes(schedule or (), chosen, schedule_by)
        place = None if region is None else check_own_region(region, chosen)
        modern = modern_blocks(file, getattr(getattr(self.pipe, "unet", None), "config", None))
        file = halves.whole(self.family.named(modern, self.pipe), parts, denoiser, self._named)
        fitted = self._fitted(file)
        factors = check_blocks(blocks or {}, fitted.parts, self.family.denoiser)
        self._check_words(file, chosen)
        special = distilled(file, chosen, self.pipe, self.family.denoiser)
        report = LoraReport(
            name=chosen,
            path=str(file.path or ""),
            sha256=file.sha256,
            format=file.format,
            layers=fitted.counts(),
            ranks=fitted.ranks(),
            dora=fitted.is_dora(),
            parameters=fitted.parameters(),
            weight=weight,
            te_weight=te_weight,
            triggers=tuple(triggers) or (*file.words, *file.embeddings),
            blocks=factors,
            schedule=keyframes,
            schedule_by=schedule_by,
            distilled=special.mark if special else None,
            region=place,
            coverage={name: coverage(getattr(self.pipe, name), layers) for name, layers in fitted.parts.items()},
        )
        self.loaded[chosen] = Loaded(report, fitted, special)
        self._joined = None
        return report

    def _fitted(self, file: LoraFile) -> LoraFile:
        """``file`` with the layers of this base.

        Raises:
            FamilyError: it is for another base; the message names the family it is for, if that is known.
            InputError: it adapts a text encoder without which this base was opened.
        """
        models, name = self._models(), file.path.name if file.path else "The adapter"
        for component in file.parts:
            if component in self.components and component not in models:
                raise InputError(
                    f"'{name}' changes the {component}, without which this base was opened: add that part to the base."
                )
        try:
            return fit(file, models, f"the base model ({self.family.title})", tables=False)
        except FamilyError as error:
            meant = family_of_adapter(file)
            if meant is None or meant.name == self.family.name:
                raise
            raise FamilyError(
                f"'{name}' is an adapter for {meant.title}, but this base is {self.family.title}: use it with a "
                f"base of its own family. ({error})"
            ) from error

    def _named(self, file: LoraFile) -> LoraFile:
        return self.family.named(file, self.pipe)

    def unload(self, name: str) -> None:
        """Unload an adapter; raises :class:`InputError` if there is none of that name."""
        self.check(name)
        del self.loaded[name]
        self._joined = None

    def clear(self) -> None:
        """Unload all adapters."""
        self.loaded.clear()
        self._joined = None

    def check(self, name: str) -> None:
        """Raise :class:`InputError` if no adapter has this name."""
        if name not in self.loaded:
            known = ", ".join(self.loaded) or "none"
            raise InputError(f"No adapter '{name}' is loaded{nearest(name, self.loaded)}: loaded are {known}.")

    @contextmanager
    def at(self, strengths: Mapping[str, tuple[float, float]]) -> Iterator[None]:
        """Inside, adapters have other strengths (weight, te_weight)."""
        own, joined = dict(self.loaded), self._joined
        inside = any(self.loaded[name].report.dora for name in strengths)  # its strength is part of its matrices
        try:
            for name, (weight, te_weight) in strengths.items():
                report = replace(self.loaded[name].report, weight=weight, te_weight=te_weight)
                self.loaded[name] = replace(self.loaded[name], report=report)
            if inside:
                self._joined = None
            yield
        finally:
            self.loaded = own
            if inside:
                self._joined = joined

    def chosen(self, names: Sequence[str] | None) -> list[Loaded]:
        """The adapters with these names, in this order; None = all."""
        return list(self.loaded.values()) if names is None else [self.loaded[name] for name in names]

    def joined(self, names: Sequence[str] | None, cross_only: Collection[str] = ()) -> Joined:
        """The joined matrices of these adapters, cached until something changes.

        Args:
            names: of the adapters, in order; None = all.
            cross_only: adapters of which only the cross-attention layers are used in the denoiser.
        """
        loaded = self.chosen(names)
        key = (tuple(sorted(cross_only)), *((item.report.name, item.report.sha256) for item in loaded))
        if self._joined is None or self._joined.key != key:
            made = Joined(key, self._join(tuple(self.denoisers), "weight", loaded, cross_only))
            for component in self.family.text_encoders:
                if any(component in item.file.parts for item in loaded):
                    made.text[component] = self._join((component,), "te_weight", loaded)
            self._joined = made
        return self._joined

    def layers(self, item: Loaded) -> Mapping[str, LoraLayer]:
        """An adapter's layers in the denoiser by module path; with several denoisers, each behind its name."""
        return joined_layers(item.file, tuple(self.denoisers))

    def _join(
        self, components: tuple[str, ...], strength: str, loaded: Sequence[Loaded], cross_only: Collection[str] = ()
    ) -> GatedAdapters:
        """The matrices for one model, or for several that share their gates (named as by :func:`joined_layers`)."""
        models = {component: getattr(self.pipe, component) for component in components}
        model = models[components[0]] if len(models) == 1 else nn.ModuleDict(models)
        prefix = f"{components[0]}." if len(models) == 1 else ""
        parts = [
            Adapter(
                layers := {
                    name: layer
                    for name, layer in joined_layers(item.file, components).items()
                    if item.report.name not in cross_only or name.endswith(CROSS_LAYERS)
                },
                {name: block_factor(f"{prefix}{name}", item.report.blocks) for name in layers},
                getattr(item.report, strength) if item.report.dora else 1.0,
            )
            for item in loaded
        ]
        keep = torch.device("cpu") if self.settings.memory == "low" else self.pipe._execution_device
        return GatedAdapters(model, parts, keep, _compute_dtype(models[components[0]], self.settings))

    def _models(self) -> dict[str, nn.Module]:
        """Component -> model, for the parts that an adapter may change."""
        parts = {component: getattr(self.pipe, component, None) for component in self.components}
        return {component: model for component, model in parts.items() if isinstance(model, nn.Module)}

    def _check_words(self, file: LoraFile, name: str) -> None:
        """Raise :class:`InputError` for words that this model cannot use, or that are taken."""
        from pipelines.diffusion.regions.concepts import check_layer_words, check_taken, check_words
        from pipelines.diffusion.regions.unet import ordered_blocks

        known = {word for item in self.loaded.values() for word in (*item.file.words, *item.file.embeddings)}
        if file.words:
            widths = {part: getattr(self.pipe, part).config.hidden_size for part in self.family.text_encoders}
            check_words(file.words, {} if self.family.flow else widths, self.family.title, name)
            check_taken(file.words, known, name)
        if file.embeddings:
            if self.family.name != "sd":
                raise FamilyError(
                    f"'{name}' is an ED-LoRA, made for Stable Diffusion 1.x, but this is {self.family.title}."
                )
            layers, width = len(ordered_blocks(self.denoiser)), self.pipe.text_encoder.config.hidden_size
            check_layer_words(file.embeddings, layers, width, name)
            check_taken(file.embeddings, known | set(self.pipe.tokenizer.get_vocab()), name)


def joined_layers(file: LoraFile, components: Sequence[str]) -> Mapping[str, LoraLayer]:
    """The layers of one component by module path; of several, each behind its component's name."""
    if len(components) == 1:
        return file.parts.get(components[0], {})
    return {f"{part}.{name}": layer for part in components for name, layer in file.parts.get(part, {}).items()}


def _compute_dtype(model: Any, settings: Settings) -> torch.dtype:
    """The precision in which a model computes (its weights may be stored in fewer bits)."""
    stored: torch.dtype = model.dtype
    return stored if stored in DTYPES.values() else DTYPES[settings.dtype]
