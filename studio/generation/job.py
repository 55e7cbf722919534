"""The jobs: a generator from snapshots and task vectors, and adapters from a generator, added to the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapters.errors import InputError
from adapters.generation.settings import Settings
from adapters.progress import Monitor, Progress, check
from studio import library
from studio.generation.schema import GenerateSampleConfig, GenerateTrainConfig
from studio.library import adopt

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats import LoraFile

STATE = "training.pt"
"""The state of a stopped training, in the job's folder."""


def train(config: GenerateTrainConfig, folder: Path, monitor: Monitor, resume: bool = False) -> dict[str, Any]:
    """Train a generator; it lies in ``folder``.

    Returns:
        ``generator`` (path) and the figures of :class:`~adapters.generation.icm_lora.Generator`.

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
    vectors = {task: _vector_file(Path(place)) for task, place in config.vectors.items()}
    vectors |= _vectors(config.base, config.examples, config.limit, config.layer, config.position, monitor)
    settings = Settings(**{one.name: getattr(config, one.name) for one in fields(Settings)})
    made = fit(snapshots, vectors, settings, monitor, folder / STATE)
    if config.examples:
        made.figures["vectors"] = {"base": base_name(config.base), "layer": config.layer, "position": config.position,
                                   "limit": config.limit}  # fmt: skip
    path = made.save(folder / f"{config.name}.safetensors")
    (folder / STATE).unlink(missing_ok=True)
    return {"generator": str(path), **made.figures}


def sample(config: GenerateSampleConfig, folder: Path, monitor: Monitor) -> dict[str, Any]:
    """Make adapters and add them to the library.

    Returns:
        ``library``: their names there.

    Raises:
        adapters.errors.InputError: a generator, task or base that cannot be used.
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    from adapters import formats
    from adapters.generation.icm_lora import Generator

    monitor.report(Progress("loading"))
    generator = Generator.load(Path(config.generator))
    task = config.task or _of_other_task(config, generator.figures.get("vectors"), monitor)
    reference = formats.read(library.resolve_adapter(config.reference)) if config.reference else None
    kept = []
    for number in range(config.count):
        check(monitor)
        made = generator.generate(task, config.seed + number, config.temperature, reference)
        free = adopt.free_name(config.name or config.task or "generated")
        kept.append(library.import_adapter(_write(made, folder / free), free).name)
        monitor.report(Progress("generating", number + 1, config.count))
    return {"library": kept}


def _of_other_task(config: GenerateSampleConfig, trained: Any, monitor: Monitor) -> Tensor:
    """The vector of a task by its file or examples; examples are read as in the training."""
    from studio.training.cards import base_name

    if config.vector:
        return _vector_file(Path(config.vector))
    if not trained:
        raise InputError("The generator was trained with vectors of your own: give vector instead of examples.")
    if base_name(config.base) != trained["base"]:
        raise InputError(f"The task vectors were made by '{trained['base']}': give it as base, not '{config.base}'.")
    found = _vectors(
        config.base, {"": config.examples}, trained["limit"], trained["layer"], trained["position"], monitor
    )
    return found[""]


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


def _vector_file(path: Path) -> Tensor:
    from adapters.formats.tensors import read_tensors

    tensors = read_tensors(path)[0]
    if len(tensors) != 1 or next(iter(tensors.values())).ndim != 1:
        raise InputError(f"'{path}' must hold one vector, the task's.")
    return next(iter(tensors.values()))


def _vectors(
    base: str,
    examples: Mapping[str, str],
    limit: int,
    layer: int,
    position: Literal["last", "mean"],
    monitor: Monitor,
) -> dict[str, Tensor]:
    """Task -> vector, made by the base from the lines of a text file."""
    if not examples:
        return {}
    from adapters.generation.icm_lora import task_vector
    from pipelines.language.loading import open_model

    lines = {task: _lines(Path(place))[:limit] for task, place in examples.items()}
    opened = open_model(library.resolve_base(base))
    return {
        task: task_vector(opened.model, opened.tokenizer, own, layer, position, monitor) for task, own in lines.items()
    }


def _lines(path: Path) -> list[str]:
    try:
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' cannot be read as text with one example per line: {error}") from None
    if not found:
        raise InputError(f"'{path}' holds no examples: write one per line.")
    return found


def _write(file: LoraFile, place: Path) -> Path:
    """A PEFT folder for a language model's adapter, else one .safetensors file."""
    from adapters.formats import write_diffusers
    from adapters.formats.lora import MODEL
    from adapters.formats.peft_directory import write_directory

    if set(file.parts) == {MODEL}:
        return write_directory(place, file.parts[MODEL], file.own_metadata(), file.config)
    return write_diffusers(file, place.with_name(f"{place.name}.safetensors"))
