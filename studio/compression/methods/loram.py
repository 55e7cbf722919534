"""``studio compress loram``: an adapter for a base that fits to run, but not to train (LoRAM, arXiv 2502.13533).

Prune, align if asked, train an ordinary LoRA on what is left (with ``quantization`` it is QLoRAM), recover. The folder
has the steps: ``pruned/`` or ``aligned/`` (a base), ``NAME-small/`` (its adapter), ``NAME/`` (the adapter of the whole
base). A resumed job goes on with the step that was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from adapters import files
from adapters.compression import importance, loram, sparsity
from adapters.compression.slicing import small_model
from adapters.compression.structure import Kept, Pruning, read_pruning, sizes_of
from adapters.errors import InputError
from adapters.progress import Monitor, Progress, check
from pipelines.language.adapters import AdaptedModel
from pipelines.language.loading import LanguageModel, open_model
from studio import devices, library
from studio.compression import alignment, recovery, small_bases
from studio.compression.pruning_schema import LoramConfig
from studio.datasets.cache import fingerprint
from studio.jobs.kinds import Kind
from studio.library import adopt
from studio.training.drivers.trainer import RunSampler, SampleSet
from studio.training.language.data import Batch, Collate
from studio.training.language.measure import measure
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.session import SILENT
from studio.training.tasks import language
from studio.training.tasks.language import task_for

KIND = Kind(
    "compress-loram", "studio.compression.pruning_schema:LoramConfig", "studio.compression.methods.loram:run",
    continues=True, ready="studio.compression.ready:pruning", afterwards="studio.compression.methods.loram:adopted",
    title="LoRAM", compress="loram",
    forecast="studio.compression.pruning_estimate:of_loram",
    help="Train a LoRA on a pruned copy of a base and use it with the whole base.",
    example="studio compress loram smollm2 --data facts.jsonl --prune 0.65 --name facts",
)  # fmt: skip

PRUNED, ALIGNED = "pruned", "aligned"


def run(
    config: LoramConfig, folder: Path, monitor: Monitor = SILENT, resume: bool = False, keep: bool | int = False
) -> dict[str, Any]:
    """Prune, align, train and recover in ``folder``.

    Returns:
        As a language training's result, with ``adapter`` (of the whole base), ``small_adapter``, ``pruned`` (folder),
        ``picture``, ``ratios``, ``uniform``, ``aligned`` (loss or None), and ``losses`` of four models on the rows held
        out, if there are any: the whole base, the pruned one, each with its adapter.

    Raises:
        InputError: what cannot be pruned or trained, in one sentence.
        Cancelled: stopped on request.
    """
    pruned = folder / PRUNED
    if not resume or read_pruning(pruned) is None:
        prune(config, pruned, monitor)
    aligned = _aligned(config, folder, monitor, resume) if config.align_data else None
    small = folder / (ALIGNED if config.align_data else PRUNED)
    pruning = read_pruning(small)
    assert pruning is not None
    drawn = {} if pruning.mask else {"picture": str(small_bases.draw(pruning, folder))}
    training = small_training(config, small)
    result = language.run(training, folder, monitor, resume, keep=keep)
    monitor.report(Progress("recovering"))
    place = recovery.recover(Path(result["adapter"]), pruning, folder / config.name, config.base, config)
    files.write_text(folder / "config.yaml", config.to_yaml())
    files.write_text(Path(result["card"]), (place / "README.md").read_text(encoding="utf-8"))
    losses = compare(config, small, Path(result["adapter"]), place, monitor)
    return {
        **result, "small_adapter": result["adapter"], "adapter": str(place), "pruned": str(small),
        **drawn, "aligned": aligned, "losses": losses, "zeros": pruning.zeros,
        **small_bases.figures(pruning, config.quantization == "4bit"),
    }  # fmt: skip


def adopted(config: LoramConfig, result: dict[str, Any]) -> dict[str, Any]:
    """Put the recovered adapter into the library, and the pruned base if that is asked."""
    found = adopt.trained(config, result)
    if config.keep_pruned:
        name = adopt.free_name(f"{config.name}-pruned", "base")
        found["library_base"] = library.import_base(result["pruned"], name).name
    return {**found, "told": _told(config, found)}


def _told(config: LoramConfig, result: Mapping[str, Any]) -> str:
    """What was made, in a sentence or two."""
    ratios = result["ratios"]
    share = ratios["small"] / ratios["whole"]
    name = result.get("library") or result["adapter"]
    losses = ", ".join(f"{key.replace('_', ' + ')} {value:.4f}" for key, value in result["losses"].items())
    cut = (
        f"{share:.0%} of the parameters of {config.base} ({ratios['nominal']:.2f} times smaller, "
        f"{ratios['counted']:.2f} in bytes)"
        if config.pattern == "groups"
        else f"{config.base} with {result['zeros']:.0%} zeros in the pruned layers (no smaller in memory)"
    )
    return (
        f"'{name}' learnt on {cut}" + (f"; losses on held-out rows: {losses}" if losses else "")
        + f". Try it with  studio chat {config.base} -a '{name}'"
    )  # fmt: skip


def small_training(config: LoramConfig, small: Path) -> TrainLanguageConfig:
    """The language training on the pruned base in ``small``."""
    values = {name: getattr(config, name) for name in TrainLanguageConfig.model_fields}
    return TrainLanguageConfig.parse({**values, "preset": "", "base": str(small), "name": f"{config.name}-small"})


# ------------------------------------------------------------------------------------------------ steps


def prune(config: LoramConfig, target: Path, monitor: Monitor) -> Pruning:
    """Write the pruned base into ``target``.

    Raises:
        InputError: as :func:`run`.
        Cancelled: ``monitor`` asked to stop.
    """
    monitor.report(Progress("loading", message=f"Loading the base model {config.base}"))
    whole = small_bases.open_whole(config)
    sizes = sizes_of(whole.model.config)
    chosen = loram.blocks(sizes, config.prune, config.whole_first, config.whole_last)
    if config.pattern != "groups":
        return _zeroed(config, whole, chosen, target, monitor)
    loram.kept_counts(sizes, config.prune)
    scores = _scores(config, whole, chosen, monitor)
    made = loram.plan(sizes, scores, config.prune, config.importance)
    pruning = replace(made, base=fingerprint(whole.model), base_name=config.base)
    monitor.report(Progress("pruning"))
    small = small_model(whole.model, pruning)
    told = f"A part of {config.base} on which adapters for the whole of it are trained (LoRAM)."
    small_bases.write(small, whole.tokenizer, pruning, target, config, told)
    return pruning


def _zeroed(config: LoramConfig, whole: LanguageModel, chosen: range, target: Path, monitor: Monitor) -> Pruning:
    """Write the base with zeros in place into ``target``; all shapes stay."""
    base, sizes = fingerprint(whole.model), sizes_of(whole.model.config)
    norms: dict[str, Tensor] = {}
    if config.importance == "wanda" and chosen:
        norms = sparsity.input_norms(whole.model, chosen, _runs(config, whole, monitor))
    generator = torch.Generator().manual_seed(config.seed)

    def score(name: str, weight: Tensor) -> Tensor:
        if config.importance == "random":
            return torch.rand(weight.shape, generator=generator).to(weight.device)
        found = weight.detach().float().abs()
        return found * norms[name].to(weight.device) if norms else found

    monitor.report(Progress("pruning"))
    zeros, mask = sparsity.put_zeros(whole.model, chosen, config.pattern, config.prune, score)
    layers = tuple(Kept() for _ in range(sizes.layers))
    method = f"loram {config.pattern} {config.importance}"
    pruning = Pruning(sizes, layers, method, config.prune, base, config.base, zeros=zeros, mask=mask)
    told = f"{config.base} with zeros in place, on which adapters for the whole of it are trained (LoRAM)."
    small_bases.write(whole.model, whole.tokenizer, pruning, target, config, told)
    return pruning


def _scores(
    config: LoramConfig, whole: LanguageModel, chosen: range, monitor: Monitor
) -> Mapping[int, importance.Scores]:
    sizes = sizes_of(whole.model.config)
    if config.importance == "random":
        return importance.random(sizes, chosen, config.seed)
    if config.importance == "magnitude" or not chosen:
        return importance.magnitude(whole.model, sizes, chosen)

    return importance.taylor(whole.model, sizes, chosen, _runs(config, whole, monitor))


def _runs(config: LoramConfig, whole: LanguageModel, monitor: Monitor) -> Iterator[Callable[[], Tensor]]:
    """The losses of the batches that importance is measured on."""
    for number, batch in enumerate(_first_batches(config, whole)):
        check(monitor)
        monitor.report(Progress("measuring importance", number, config.importance_batches))
        given = {name: value.to(whole.device) for name, value in batch.items()}
        yield lambda given=given: whole.model(**given).loss  # type: ignore[misc]


def _first_batches(config: LoramConfig, whole: LanguageModel) -> Iterator[Batch]:
    """The batches of the first steps of the training."""
    task = task_for(small_training(config, Path(config.base)))
    task.rows()
    samples = task.tokens(whole.tokenizer, whole.longest).shown
    collate, size = Collate(whole.tokenizer.pad_token_id, config.packing), config.batch_size
    order = list(RunSampler(len(samples), config.importance_batches * size, config.seed))
    for start in range(0, len(order), size):
        yield collate([samples[number] for number in order[start : start + size]])


def _aligned(config: LoramConfig, folder: Path, monitor: Monitor, resume: bool) -> float | None:
    """Write ``aligned/``, unless it is there; returns the last loss, None if it was there."""
    target = folder / ALIGNED
    if resume and read_pruning(target) is not None:
        return None
    pruned = folder / PRUNED
    pruning = read_pruning(pruned)
    assert pruning is not None
    small = open_model(pruned, dtype="fp32", device=devices.resolve(config.device), attention=config.attention)
    loss = alignment.align(small, config, folder, monitor, resume)
    told = (
        f"A part of {config.base}, trained further on {Path(config.align_data).name}, on which adapters for the whole "
        "of it are trained (LoRAM)."
    )
    small_bases.write(small.model, small.tokenizer, replace(pruning, aligned=True), target, config, told)
    return loss


def compare(config: LoramConfig, small: Path, small_adapter: Path, adapter: Path, monitor: Monitor) -> dict[str, float]:
    """Losses on the held-out rows: ``whole``, ``recovered``, ``pruned``, ``pruned_adapter``; {} without such rows."""
    if not (config.validation_data or config.validation_split):
        return {}
    found: dict[str, float] = {}
    task = task_for(small_training(config, small))
    task.rows()
    places = (("whole", "recovered", library.resolve_language(config.base), adapter),
              ("pruned", "pruned_adapter", str(small), small_adapter))  # fmt: skip
    for alone, together, place, own in places:
        monitor.report(Progress("comparing", message=f"Measuring {alone} and {together.replace('_', ' + ')}"))
        base = open_model(place, dtype=config.dtype, device=torch.device(devices.resolve(config.device)),
                          chat_template=task.template)  # fmt: skip
        rows = SampleSet(task.tokens(base.tokenizer, base.longest).held_out)
        collate = Collate(base.tokenizer.pad_token_id, config.packing)
        model = AdaptedModel(base.model, config.base)
        model.add("own", own)
        for name, weights in ((alone, {}), (together, {"own": 1.0})):
            check(monitor)
            with model.active(weights) as active:
                batches = DataLoader(rows, config.batch_size, collate_fn=collate)
                found[name] = measure(active, batches, shifted=True)[0]["validation_loss"]
    return found


__all__ = ["KIND", "InputError", "adopted", "compare", "prune", "run", "small_training"]
