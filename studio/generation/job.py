"""The jobs: a generator from snapshots and task vectors, and adapters from a generator, added to the library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError
from adapters.generation.settings import Settings
from adapters.progress import Monitor, Progress, check
from studio import library
from studio.generation import vectors
from studio.generation.schema import GenerateSampleConfig, GenerateTrainConfig
from studio.library import adopt

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats import LoraFile
    from adapters.generation.icm_lora import Generator

STATE = "training.pt"
"""The state of a stopped training, in the job's folder."""


def train(config: GenerateTrainConfig, folder: Path, monitor: Monitor, resume: bool = False) -> dict[str, Any]:
    """Train a generator; it lies in ``folder``.

    Returns:
        ``generator`` (path), the figures of :class:`~adapters.generation.icm_lora.Generator` and ``remarks``, sentences
        about what will not work well.

    Raises:
        adapters.errors.InputError: snapshots, examples or a base that cannot be used.
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    from adapters.generation.icm_lora import fit
    from studio.training.cards import base_name

    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        (folder / STATE).unlink(missing_ok=True)
    monitor.report(Progress("loading"))
    snapshots = {task: _snapshots(task, Path(place), monitor) for task, place in config.snapshots.items()}
    known = {task: vectors.read(Path(place)) for task, place in config.vectors.items()}
    read: dict[str, Any] = {}
    if config.examples:
        base = vectors.Base.open(config.base)
        how = vectors.Reading(config.limit, config.layer, config.position, config.shots)
        known |= base.vectors(config.examples, how, monitor)
        read = {"vectors": {"base": base_name(config.base), "digest": base.digest, **asdict(how)}}
    settings = Settings(**{one.name: getattr(config, one.name) for one in fields(Settings)})
    made = fit(snapshots, known, settings, monitor, folder / STATE)
    remarks = [*_other_starts(snapshots), *_untold(made)]
    made.figures |= {**read, "triggers": {task: _triggers(own) for task, own in snapshots.items()}, "remarks": remarks}
    for remark in remarks:
        monitor.report(Progress("training", config.steps, config.steps, message=remark))
    path = made.save(folder / f"{config.name}.safetensors")
    (folder / STATE).unlink(missing_ok=True)
    return {"generator": str(path), **made.figures}


def sample(config: GenerateSampleConfig, folder: Path, monitor: Monitor) -> dict[str, Any]:
    """Make adapters and add them to the library.

    Returns:
        ``library``: their names there.

    Raises:
        adapters.errors.InputError: a generator, task or base that cannot be used.
        adapters.errors.FamilyError: a base with other weights than that of the snapshots.
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    from adapters import formats
    from adapters.generation.icm_lora import Generator

    monitor.report(Progress("loading"))
    generator = Generator.load(Path(config.generator))
    base = vectors.Base.open(config.base) if config.base else None
    if base is not None and config.task:  # for examples, the base may be another one: that which made the vectors
        generator.codec.check_base(Path(config.base).name, base.digest, "The wanted adapter")
    task = config.task or _other_task(config, generator, base, monitor)
    reference = formats.read(library.resolve_adapter(config.reference)) if config.reference else None
    kept = []
    for number in range(config.count):
        check(monitor)
        made = generator.generate(task, config.seed + number, config.temperature, reference)
        free = adopt.free_name(config.name or config.task or "generated")
        told = _recipe(generator, config, config.seed + number, free)
        made = replace(made, metadata={**made.metadata, **told})
        kept.append(library.import_adapter(_write(made, folder / free), free).name)
        monitor.report(Progress("generating", number + 1, config.count))
    return {"library": kept}


def _other_task(
    config: GenerateSampleConfig, generator: Generator, base: vectors.Base | None, monitor: Monitor
) -> Tensor:
    """The vector of a task by its file or examples; examples are read as in the training, by the same weights."""
    if config.vector or base is None:
        return vectors.read(Path(config.vector))
    trained = generator.figures.get("vectors")
    if not trained:
        raise InputError("The generator was trained with vectors of your own: give vector instead of examples.")
    if trained.get("digest", base.digest) != base.digest:
        raise InputError(
            f"The task vectors were made by '{trained['base']}', whose weights are not those of '{config.base}': give "
            "that base."
        )
    how = vectors.Reading(**{one.name: trained.get(one.name, 0) for one in fields(vectors.Reading)})
    return base.vector(Path(config.examples), how, monitor)


def _snapshots(task: str, folder: Path, monitor: Monitor) -> list[LoraFile]:
    """The adapters in a folder: its .safetensors files and PEFT folders, in the order of their names."""
    from adapters import formats
    from adapters.formats.peft_directory import is_peft_directory

    if not folder.is_dir():
        raise InputError(f"The snapshots of '{task}' are no folder: '{folder}'.")
    places = [one for one in sorted(folder.iterdir())
              if (one.is_dir() and is_peft_directory(one)) or one.suffix == ".safetensors"]  # fmt: skip
    if not places or is_peft_directory(folder):
        raise InputError(
            f"'{folder}' must hold the snapshots of '{task}', each a PEFT folder or a .safetensors file of its own."
        )
    found = []
    for number, place in enumerate(places):
        check(monitor)
        found.append(formats.read(place))
        monitor.report(Progress(f"reading {task}", number + 1, len(places)))
    return found


def _triggers(snapshots: Sequence[LoraFile]) -> list[str]:
    """The trigger words of a task, from the recipe of its last snapshot."""
    found = snapshots[-1].recipe().get("triggers")
    return [str(word) for word in found] if isinstance(found, list) else []


def _other_starts(snapshots: Mapping[str, Sequence[LoraFile]]) -> list[str]:
    """A remark if the tasks' trainings began from different seeds, and so in different coordinates."""
    recipes = {task: own[0].recipe().get("config") for task, own in snapshots.items()}
    seeds = {task: config.get("seed") for task, config in recipes.items() if isinstance(config, dict)}
    if len(set(seeds.values())) < 2:
        return []
    told = ", ".join(f"{task} {seed}" for task, seed in seeds.items())
    return [f"The trainings began from different seeds ({told}): from one seed, adapters of different tasks have more "
            "in common, and a generator learns them better."]  # fmt: skip


def _untold(generator: Generator) -> list[str]:
    """A remark if the generator hardly tells its tasks apart."""
    from adapters.generation.icm_lora import untold

    tasks = untold(generator.figures)
    if not tasks:
        return []
    return [f"What is generated for {', '.join(tasks)} is hardly nearer to the task's own adapters than the mean over "
            "all tasks is: take more steps, a wider network or more examples."]  # fmt: skip


def _recipe(generator: Generator, config: GenerateSampleConfig, seed: int, name: str) -> dict[str, str]:
    """The recipe of a generated adapter as an entry of its metadata; the base is that of the snapshots."""
    from studio.training.export import RECIPE_ENTRY, make_recipe

    given = config.model_copy(update={"seed": seed, "count": 1, "name": name})
    training = {"generator": Path(config.generator).name, "settings": asdict(generator.settings)}
    recipe = make_recipe(given, base=generator.codec.origin, data={}, training=training)
    triggers = generator.figures.get("triggers", {}).get(config.task, [])
    return {RECIPE_ENTRY: json.dumps({**recipe, "triggers": triggers}, ensure_ascii=False)}


def _write(file: LoraFile, place: Path) -> Path:
    """A PEFT folder for a language model's adapter, else one .safetensors file."""
    from adapters.formats import write_diffusers
    from adapters.formats.lora import MODEL
    from adapters.formats.peft_directory import write_directory

    if set(file.parts) == {MODEL}:
        return write_directory(place, file.parts[MODEL], file.own_metadata(), file.config)
    return write_diffusers(file, place.with_name(f"{place.name}.safetensors"), file.own_metadata())
