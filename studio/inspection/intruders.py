"""Intruder dimensions and forgetting for adapters and bases by name: opens, measures and plots them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError
from adapters.progress import Monitor

if TYPE_CHECKING:
    from PIL import Image

    from adapters.formats import LoraFile
    from adapters.inspection.forgetting import Row
    from adapters.inspection.intruders import Report, Side

CELL, ROW, LEFT, TOP, GAP = 18, 14, 470, 46, 64
"""Sizes of the picture, in pixels."""


@dataclass
class Base:
    """An opened base: the parts that adapters change, and how its loss on old data is measured."""

    name: str
    models: dict[str, Any]
    unet_config: Any = None
    pipe: Any = None
    tokenizer: Any = None
    masked: bool = False
    """Whether it is a masked language model (BERT) instead of a causal one."""

    def fit(self, file: LoraFile) -> LoraFile:
        """``file`` with this base's module names."""
        from adapters.formats.fit import fit

        if self.unet_config is not None:
            from pipelines.diffusion.loading import modern_blocks

            file = modern_blocks(file, self.unet_config)
        return fit(file, self.models, f"'{self.name}'")


def open_base(name: str) -> Base:
    """Open a diffusion pipeline or a language model in fp32 on the CPU.

    Raises:
        InputError: there is no such base, or it cannot be read.
    """
    from adapters.formats.lora import COMPONENTS, MODEL
    from studio import library
    from studio.library import facts

    source = library.resolve_base(name)
    if Path(source).is_dir() and facts.is_language_model(Path(source)):
        from pipelines.language.loading import natural_task, open_model

        task = natural_task(source)
        opened = open_model(source, task, dtype="fp32")
        return Base(name, {MODEL: opened.model}, tokenizer=opened.tokenizer, masked=task == "masked")
    from pipelines.diffusion.loading import open_pipeline

    pipe = open_pipeline(source, dtype="fp32", device="cpu")[0]
    models = {part: getattr(pipe, part) for part in COMPONENTS if getattr(pipe, part, None) is not None}
    return Base(name, models, models["unet"].config if "unet" in models else None, pipe=pipe)


def open_files(name: str) -> Base:
    """Read a base's weights from its files, without building the model.

    Raises:
        InputError: there is no such base here, or its weights are not in .safetensors files with current names.
    """
    from adapters.inspection.weight_files import models_in
    from studio import library

    given = Path(name).expanduser()
    path = given if given.exists() else Path(library.resolve_base(name))
    if not path.exists():
        raise InputError(
            f"'{name}' is not on this computer: name a folder or a .safetensors file, or leave --files out."
        )
    config = path / "unet" / "config.json"
    unet = SimpleNamespace(**json.loads(config.read_text(encoding="utf-8"))) if config.is_file() else None
    return Base(name, models_in(path), unet)


def read_adapter(adapter: str, base: Base) -> LoraFile:
    """An adapter by name or path, with the base's module names."""
    from adapters import formats
    from studio import library

    return base.fit(formats.read(library.resolve_adapter(adapter)))


def intruders(
    adapter: str = "",
    base: str = "",
    tuned: str = "",
    k: int = 10,
    eps: float = 0.5,
    side: Side = "left",
    monitor: Monitor | None = None,
    from_files: bool = False,
) -> Report:
    """The report on an adapter of ``base``, or on a whole model ``tuned`` from it.

    Args:
        k: how many of the largest singular directions to compare.
        eps: an intruder's cosines with the base's directions are below this.
        from_files: read weights from files without building models: faster, less memory, and a base may be any
            .safetensors file with the model's names.

    Raises:
        InputError: neither an adapter nor a tuned model (or both), or something that cannot be read.
    """
    from adapters.inspection.intruders import between, inspect, weights_of

    if bool(adapter) == bool(tuned):
        raise InputError("Say what to look at: one adapter, or a tuned model with --tuned.")
    opener = open_files if from_files else open_base
    opened = opener(base)
    file = read_adapter(adapter, opened) if adapter else between(opened.models, opener(tuned).models, k)
    return inspect(file, weights_of(opened.models), k, eps, side, monitor)[0]


def plain_report(adapter: str, base: str, k: int = 10) -> dict[str, Any]:
    """:func:`intruders` as plain values; a base in a folder is read from its files, a single file by its pipeline."""
    from studio import library

    return intruders(adapter, base, k=k, from_files=Path(library.resolve_base(base)).is_dir()).to_dict()


def shrink_factor(report: Mapping[str, Any], eps: float, strength: float) -> float:
    """|dW| with intruders below ``eps`` scaled by ``strength``, over |dW|: the factor of the control.

    Args:
        report: the report of :func:`intruders` as plain values; no weights are read, so a slider can follow.
    """
    whole = changed = 0.0
    for layer in report["layers"]:
        whole += layer["norm"] ** 2
        changed += layer["norm"] ** 2
        for cosine, value, overlap in zip(layer["cosines"], layer["values"], layer["overlaps"], strict=True):
            if cosine < eps:
                changed += 2 * (strength - 1) * value * overlap + (strength - 1) ** 2 * value**2
    return math.sqrt(max(0.0, changed) / whole) if whole else 1.0


def soften(
    adapter: str,
    base: str,
    strength: float,
    k: int = 10,
    eps: float = 0.5,
    recompress: bool = False,
    monitor: Monitor | None = None,
) -> tuple[LoraFile, LoraFile, dict[str, Any]]:
    """The adapter with its intruders scaled, the control (the whole update shrunk to the same size), and figures."""
    from adapters.inspection import intruders as core

    opened = open_base(base)
    file = read_adapter(adapter, opened)
    report, found = core.inspect(file, core.weights_of(opened.models), k, eps, "left", monitor)
    made, errors = core.soften(file, found, strength, recompress)
    norm, before = core.update_norm(made), core.update_norm(file)
    factor = norm / before if before else 1.0
    facts = {
        "parent": file.sha256, "lambda": strength, "k": k, "eps": eps, "side": "left", "intruders": report.total,
        "norm_before": before, "norm": norm, "control_factor": factor,
        "largest_recompression_error": max(errors.values(), default=0.0),
    }  # fmt: skip
    noted = {**file.metadata, "adapter_studio_softened": json.dumps(facts)}
    return replace(made, metadata=noted), core.shrink(file, factor), facts


def forgetting(
    adapter: str,
    base: str,
    old: str,
    new: str = "",
    strengths: Sequence[float] = (1.0, 0.75, 0.5, 0.25, 0.0),
    k: int = 10,
    eps: float = 0.5,
    monitor: Monitor | None = None,
) -> list[Row]:
    """Losses on old (and new) data of the base, the adapter, its softened versions and their controls.

    Args:
        old, new: a folder of pictures (diffusion) or a text file (language models).
        monitor: told of every layer and measurement; may cancel.

    Raises:
        InputError: data that is missing, empty or of the wrong kind.
    """
    from adapters.inspection import forgetting as core
    from adapters.inspection.intruders import inspect, weights_of

    opened = open_base(base)
    measures = {name: measure(opened, path) for name, path in (("old", old), ("new", new)) if path}
    file = read_adapter(adapter, opened)
    _, found = inspect(file, weights_of(opened.models), k, eps, monitor=monitor)
    return core.sweep(opened.models, file, found, measures, strengths, monitor)


def measure(base: Base, data: str) -> Callable[[], float]:
    """A function that measures the base's loss on the same data, with the same noise, whenever it is called."""
    path = Path(data).expanduser()
    if base.tokenizer is not None:
        if not path.is_file():
            raise InputError(f"A language model's loss is measured on a text file; '{data}' is not one.")
        return _text_loss(base, path)
    if not path.is_dir():
        raise InputError(f"An image model's loss is measured on a folder of pictures; '{data}' is not one.")
    return _picture_loss(base, path)


def _text_loss(base: Base, path: Path, length: int = 128, most: int = 64) -> Callable[[], float]:
    """Mean token loss of the first ``most`` pieces of a text; for a masked model, always of the same tokens."""
    import torch

    from adapters.formats.lora import MODEL
    from pipelines.language.loading import longest_input
    from studio.datasets.encoding import IGNORED
    from studio.training.tasks.masked import masked

    ids = base.tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    length = min(length, longest_input(base.models[MODEL].config) or length)
    pieces = [piece for piece in ids.split(length)[:most] if len(piece) > 1]
    if not pieces:
        raise InputError(f"'{path}' holds too little text to measure a loss on.")
    model, batches = base.models[MODEL], [{"input_ids": piece[None], "labels": piece[None]} for piece in pieces]
    counted = [len(piece) - 1 for piece in pieces]
    if base.masked:
        batches = [masked(batch, base.tokenizer, 0.15, 0, "forgetting", n) for n, batch in enumerate(batches)]
        counted = [int((batch["labels"] != IGNORED).sum()) for batch in batches]

    @torch.no_grad()
    def loss() -> float:
        total = sum(float(model(**batch).loss) * count for batch, count in zip(batches, counted, strict=True))
        return total / sum(counted)

    return loss


def _picture_loss(base: Base, path: Path) -> Callable[[], float]:
    """Mean denoising loss at four fixed noise levels with fixed noise, of pictures with their captions (or none)."""
    import torch

    from studio.datasets.plan import Plan
    from studio.training.base import settle
    from studio.training.families import family_of
    from studio.training.forward import validation_loss
    from studio.training.ready import read_folder
    from studio.training.schemas.image import TrainImageConfig
    from studio.training.supply import (
        Supply,
        augmentation,
        bucket_rule,
        picture_set,
        validation_picks,
    )
    from studio.training.trainee import Trainee

    config = TrainImageConfig.parse(
        {"data": str(path), "mode": "captioned", "allow_missing_captions": True, "cache_text": "none"}
    )
    family = family_of(settle(base.pipe))
    pictures = picture_set(read_folder(config), bucket_rule(config, family), config)
    plan = Plan(pictures, None, batch_size=1, repeats=1, augmentation=augmentation(config), seed=0, processes=1, rank=0)
    supply = Supply(family, plan, config, path)
    trainee, device = Trainee(family, {}), torch.device("cpu")
    picks = validation_picks(pictures)

    def loss() -> float:
        batches = [supply.assemble([pick], 1) for pick in picks]  # each time: an adapter may change the text encoder
        return validation_loss(trainee, family, batches, config, device, torch.float32)

    return loss


def picture(report: Report) -> Image.Image:
    """Plot every layer's directions as a row of cells, dark where the base has such a direction, intruders framed."""
    from PIL import Image, ImageDraw, ImageFont

    width = LEFT + report.k * CELL + 150
    image = Image.new("RGB", (width, TOP + ROW * len(report.layers) + GAP), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    title = f"{report.total} intruders among {report.k * len(report.layers)} directions (eps {report.eps:g})"
    draw.text((10, 8), title, fill="black", font=ImageFont.load_default(15))
    for j in range(report.k):
        draw.text((LEFT + CELL * j + CELL // 2, TOP - 4), str(j), fill="#555", font=font, anchor="ms")
    for number, layer in enumerate(report.layers):
        y = TOP + ROW * number
        name = layer.name if len(layer.name) < 72 else "..." + layer.name[-69:]
        draw.text((LEFT - 8, y + ROW // 2), name, fill="black", font=font, anchor="rm")
        for j, cosine in enumerate(layer.cosines):
            box = (LEFT + CELL * j, y, LEFT + CELL * (j + 1) - 1, y + ROW - 1)
            draw.rectangle(box, fill=_shade(cosine), outline="#c22" if j in layer.positions else None, width=2)
        if layer.intruders:
            text = f"{layer.intruders} intruder{'s' if layer.intruders > 1 else ''}"
            draw.text((LEFT + CELL * report.k + 8, y + ROW // 2), text, fill="#c22", font=font, anchor="lm")
    y = TOP + ROW * len(report.layers) + 16
    for step in range(11):
        box = (LEFT + CELL * step, y, LEFT + CELL * (step + 1) - 1, y + ROW)
        draw.rectangle(box, fill=_shade(step / 10))
    draw.text((LEFT - 8, y + ROW // 2), "largest |cos| with a base direction: 0", fill="black", font=font, anchor="rm")
    draw.text((LEFT + CELL * 11 + 6, y + ROW // 2), "1", fill="black", font=font, anchor="lm")
    draw.text((LEFT - 8, y + 3 * ROW // 2 + 4), "framed red: intruder", fill="#c22", font=font, anchor="rm")
    return image


def _shade(cosine: float) -> tuple[int, int, int]:
    """White (0) to dark blue (1)."""
    part = min(1.0, max(0.0, cosine))
    return tuple(round(255 + part * (end - 255)) for end in (24, 60, 120))  # type: ignore[return-value]
