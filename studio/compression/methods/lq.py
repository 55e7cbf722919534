"""``studio compress lq``: a language model as Q + L1 L2 (LQ-LoRA, arXiv 2311.12023), one matrix at a time.

The base's weights are read from its files, never all at once, and what is done is kept in the job's folder, so that a
stopped job goes on where it was and a model larger than memory can be decomposed. Only the Fisher information (when
rows are given) needs the whole model with its gradients, once.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import files
from adapters.compression.lq_lora import Allocation, Decomposition, allocate, decompose, first_errors
from adapters.compression.normal_float import PARTS, Configuration, every_configuration
from adapters.errors import InputError
from adapters.formats.lora import LoraLayer
from adapters.formats.peft_directory import write_directory
from adapters.progress import Monitor, Progress, check
from pipelines.language import compressed
from pipelines.language.compressed import Manifest, Matrix
from studio.compression.base import Base, squares
from studio.compression.estimate import estimated as budget
from studio.compression.schema import CompressLqConfig
from studio.jobs.kinds import Kind

KIND = Kind(
    "compress-lq", "studio.compression.schema:CompressLqConfig", "studio.compression.methods.lq:run", continues=True,
    title="LQ-LoRA", compress="lq", ready="studio.compression.ready:base_and_rows",
    forecast="studio.compression.estimate:estimated",
    help="Store a language model in few bits, with a low-rank part that absorbs the error (LQ-LoRA).",
    example="studio compress lq smollm2 --bits 2.75 --data rows.jsonl",
)  # fmt: skip

COSTS, PARTS_FOLDER, FISHER = "costs.json", "matrices", "fisher.safetensors"


def run(config: CompressLqConfig, folder: Path, monitor: Monitor, resume: bool = False) -> dict[str, Any]:
    """Compress ``config.base``; the result is a base in the library.

    Args:
        resume: go on with the matrices that are done in ``folder``.

    Returns:
        ``library`` (its name), ``path``, ``bits``, ``bytes`` and ``base_bytes`` (of the files), ``error`` and ``plain``
        (root of the sum of squared errors, with and without the low-rank part), ``matrices`` (a .json file).

    Raises:
        InputError: a base that cannot be compressed, a rank or a budget that does not fit, rows that cannot be used.
        Cancelled: ``monitor`` asked to stop.
    """
    begun = time.monotonic()
    monitor.report(Progress("loading", message=f"Reading {config.base}"))
    base = Base.of(config.base)
    small = [name for name, shape in base.matrices.items() if config.rank > min(shape)]
    if small:
        raise InputError(
            f"Rank {config.rank} is larger than the smaller side of '{small[0]}' ({base.matrices[small[0]][0]} x "
            f"{base.matrices[small[0]][1]}): use at most {min(min(shape) for shape in base.matrices.values())}."
        )
    expected = budget(config)
    monitor.report(Progress("loading", message=f"About {expected.bytes / 1e6:.0f} MB at {expected.bits:.2f} bits per "
                            f"weight, instead of {expected.base_bytes / 1e6:.0f} MB. {expected.advice}"))  # fmt: skip
    if not resume:
        for old in (COSTS, FISHER):
            (folder / old).unlink(missing_ok=True)
        shutil.rmtree(folder / PARTS_FOLDER, ignore_errors=True)
    fisher = _fisher(config, base, folder, monitor)
    allocation = _allocated(config, base, fisher, folder, monitor)
    matrices = _decomposed(config, base, fisher, allocation, folder, monitor)
    monitor.report(Progress("saving"))
    return _finish(config, base, allocation, matrices, folder, time.monotonic() - begun)


# ------------------------------------------------------------------------------------------------ the parts of a run

Fisher = Callable[[str], Tensor | None]


def _fisher(config: CompressLqConfig, base: Base, folder: Path, monitor: Monitor) -> Fisher:
    """The Fisher information of a matrix, read when asked for; None for all without rows."""
    if not config.data:
        return lambda name: None
    place = folder / FISHER
    if not place.is_file():
        found = squares(config, base, monitor)
        files.write(place, lambda part: save_file(found, part, {"base": base.digest}), sync=False)

    def read(name: str) -> Tensor:
        with safe_open(place, framework="pt") as opened:
            if (opened.metadata() or {}).get("base") != base.digest:
                raise InputError(f"The Fisher information in '{place}' was measured on another model: start a new job.")
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    return read


def _allocated(config: CompressLqConfig, base: Base, fisher: Fisher, folder: Path, monitor: Monitor) -> Allocation:
    """A configuration for every matrix; costs are kept in the folder as they are found."""
    if config.uniform:
        how = Configuration(int(config.uniform[2:]))
        total = sum(how.stored_bytes(out * inputs) for out, inputs in base.matrices.values())
        return Allocation(dict.fromkeys(base.matrices, how), 8 * total / base.count, 0.0, "uniform")
    choices = every_configuration(config.thorough)
    place = folder / COSTS
    costs: dict[str, dict[str, float]] = json.loads(place.read_text()) if place.is_file() else {}
    for number, (name, (out, inputs)) in enumerate(base.matrices.items()):
        if name in costs:
            continue
        check(monitor)
        able = [how for how in choices if config.padding or how.divides(out * inputs)]
        if not able:
            raise InputError(
                f"No configuration divides the {out} x {inputs} weights of '{name}': switch padding on, which fills "
                "the last block."
            )
        W, F = base.read(f"{name}.weight"), fisher(name)
        if config.search == "first":
            found = first_errors(W, able, config.rank, F)
        else:
            found = [decompose(W, how, config.rank, config.steps, F, config.seed).errors[-1] ** 2 for how in able]
        costs[name] = {str(how): error for how, error in zip(able, found, strict=True)}
        if number % 10 == 9 or number + 1 == len(base.matrices):
            files.write_text(place, json.dumps(costs))
        monitor.report(Progress("measuring", number + 1, len(base.matrices)))
    read = {n: {Configuration.parse(how): error for how, error in row.items()} for n, row in costs.items()}
    counts = {name: out * inputs for name, (out, inputs) in base.matrices.items()}
    return allocate(read, counts, budget(config).bits, config.solver_seconds)


def _decomposed(
    config: CompressLqConfig, base: Base, fisher: Fisher, allocation: Allocation, folder: Path, monitor: Monitor
) -> dict[str, Matrix]:
    """Every matrix decomposed, one file each in the folder."""
    place = folder / PARTS_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    done: dict[str, Matrix] = {}
    for number, (name, how) in enumerate(allocation.chosen.items()):
        check(monitor)
        file = place / f"{name}.safetensors"
        kept = _kept(file, str(how))
        if kept is None:
            try:
                found = decompose(
                    base.read(f"{name}.weight"), how, config.rank, config.steps, fisher(name), config.seed
                )
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            kept = _keep(file, found)
        done[name] = kept
        share = kept.error / kept.plain if kept.plain else 0.0
        monitor.report(
            Progress("compressing", number + 1, len(allocation.chosen), metrics={"error": share, "bits": how.bits})
        )
    return done


def _kept(file: Path, how: str) -> Matrix | None:
    """What an earlier run wrote, if it is whole and of this configuration."""
    with suppress(Exception), safe_open(file, framework="pt") as opened:
        facts = opened.metadata() or {}
        if facts["how"] == how and set(opened.keys()) == {*PARTS, "A", "B"}:
            out, inputs = json.loads(facts["shape"])
            return Matrix(how, (out, inputs), float(facts["error"]), float(facts["plain"]))
    return None


def _keep(file: Path, found: Decomposition) -> Matrix:
    matrix = Matrix(str(found.Q.how), found.Q.shape, found.errors[-1], found.plain)
    facts = {"how": matrix.how, "shape": json.dumps(matrix.shape), "error": repr(matrix.error),
             "plain": repr(matrix.plain)}  # fmt: skip
    tensors = found.Q.parts() | {"A": found.L2.contiguous(), "B": found.L1.contiguous()}
    files.write(file, lambda part: save_file({k: v.cpu() for k, v in tensors.items()}, part, facts), sync=False)
    return matrix


def _finish(
    config: CompressLqConfig, base: Base, allocation: Allocation, matrices: Mapping[str, Matrix], folder: Path,
    seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Write the base's folder and bring it into the library."""
    place, parts = folder / "base", folder / PARTS_FOLDER
    pairs: dict[str, LoraLayer] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in base.names:
            module = name.removesuffix(".weight")
            if module not in matrices:
                yield name, base.read(name)
                continue
            held = load_file(parts / f"{module}.safetensors")
            yield from ((f"{module}.{part}", held[part]) for part in PARTS)
            if config.rank:
                pairs[module] = LoraLayer(_compact(held["A"]), _compact(held["B"]), float(config.rank))

    with files.whole(place, sync=False) as part:
        part.mkdir()
        base.copy_beside(part)
        compressed.write_packed(part, tensors())
        digest = compressed.digest_of(part)
        error, plain = (sum(getattr(one, key) ** 2 for one in matrices.values()) ** 0.5 for key in ("error", "plain"))
        facts = {"budget": 0 if config.uniform else budget(config).bits, "solver": allocation.solver, "error": error,
                 "plain": plain, "fisher": bool(config.data), "seconds": round(seconds, 1)}  # fmt: skip
        manifest = Manifest("lq-lora", {"name": base.name, "digest": base.digest}, digest, allocation.bits,
                            config.rank, matrices, facts)  # fmt: skip
        if config.rank:
            (part / compressed.LOW_RANK).mkdir()
            write_directory(
                part / compressed.LOW_RANK, pairs, {compressed.TIED: digest},
                {"base_model_name_or_path": base.name, "task_type": "CAUSAL_LM"},
            )  # fmt: skip
        manifest.write(part)
        files.write_text(part / "README.md", _card(config, base, manifest))
    made = base.adopt(place, config.name or f"{base.name} {allocation.bits:.2f} bits")
    shutil.rmtree(parts, ignore_errors=True)
    (folder / FISHER).unlink(missing_ok=True)
    listed = files.write_text(
        folder / "matrices.json",
        json.dumps({name: {"how": one.how, "shape": one.shape, "error": one.error, "plain": one.plain,
                           "bits": Configuration.parse(one.how).bits_per_weight}
                    for name, one in matrices.items()}, indent=1),
    )  # fmt: skip
    return {
        "library": made.name, "path": str(made.path), "bits": round(allocation.bits, 4), "bytes": made.size,
        "base_bytes": base.bytes, "error": error, "plain": plain, "solver": allocation.solver,
        "matrices": str(listed), "seconds": round(seconds, 1),
    }  # fmt: skip


def _compact(side: Tensor) -> Tensor:
    """In fp16, where its numbers fit."""
    small = side.half()
    return small if bool(small.isfinite().all()) else side


def _card(config: CompressLqConfig, base: Base, manifest: Manifest) -> str:
    weighted = f"; rows of {Path(config.data).name} say what matters" if config.data else ""
    return "\n".join([
        "---",
        f"base_model: {base.name}",
        f"description: {base.name} with its matrices in {manifest.bits:.2f} bits and a low-rank part of rank "
        f"{manifest.rank} (LQ-LoRA).",
        *([f"license: {base.licence}"] if base.licence else []),
        "---",
        f"# {base.name}, {manifest.bits:.2f} bits per weight",
        "",
        f"LQ-LoRA (arXiv 2311.12023): {len(manifest.matrices)} matrices as Q + L1 L2, rank {manifest.rank}{weighted}.",
        f"Error with the low-rank part {manifest.facts['error']:.4g}, without {manifest.facts['plain']:.4g} "
        "(Frobenius, over all matrices). Embeddings, norms and the output layer are unchanged.",
        "",
        f"Made from `{base.name}` (SHA-256 {manifest.base['digest'][:16]}...). Opened by `studio chat` and `studio",
        f"train language`; training goes on from the low-rank part with `init: lq_lora`, `rank: {manifest.rank}`.",
        "",
    ])  # fmt: skip
