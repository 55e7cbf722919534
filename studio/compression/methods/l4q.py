"""``studio compress l4q``: the integer base of an adapter trained through the rounding (L4Q, arXiv 2402.04902).

Each matrix is merged with its pair in the precision of the training and rounded with the learned steps and offsets;
the result computes what the training's fake quantisation computed. Matrices without a pair stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adapters import files
from adapters.compression import L4Q_FILE
from adapters.compression.l4q import Grid, codes_of, integer_parts, merged, values_of
from adapters.errors import InputError
from adapters.progress import Monitor, Progress, check
from pipelines.language import compressed
from pipelines.language.compressed import Manifest, Matrix
from studio.compression.base import Base
from studio.compression.ready import rounded
from studio.compression.schema import CompressL4qConfig
from studio.jobs.kinds import Kind

KIND = Kind(
    "compress-l4q", "studio.compression.schema:CompressL4qConfig", "studio.compression.methods.l4q:run",
    title="L4Q", compress="l4q", ready="studio.compression.ready:l4q",
    forecast="studio.compression.estimate:of_l4q",
    help="Make the integer base of an adapter that was trained with l4q_bits (L4Q).",
    example="studio compress l4q smollm2 --adapter facts",
)  # fmt: skip


def run(config: CompressL4qConfig, folder: Path, monitor: Monitor) -> dict[str, Any]:
    """Round the base merged with the adapter; the result is a base in the library.

    Returns:
        ``library`` (its name), ``path``, ``bits``, ``bytes`` and ``base_bytes`` (of the files), ``error`` (root of the
        sum of squared rounding errors), ``clipped`` (share of the weights outside their grid).

    Raises:
        InputError: an adapter of another training or base, or steps that are not positive.
        Cancelled: ``monitor`` asked to stop.
    """
    begun = time.monotonic()
    monitor.report(Progress("loading", message=f"Reading {config.base} and {config.adapter}"))
    base, learnt = Base.of(config.base), trained(config.adapter)
    grid = Grid(int(learnt["bits"]), int(learnt["group"]))
    names = [key.removesuffix(".step") for key in learnt if key.endswith(".step")]
    other = [name for name in names if name not in base.matrices]
    if other:
        raise InputError(f"'{config.adapter}' rounds '{other[0]}', which '{config.base}' lacks: give its own base.")
    matrices: dict[str, Matrix] = {}
    clipped = 0.0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal clipped
        for name in base.names:
            module = name.removesuffix(".weight")
            if module not in names or not name.endswith(".weight"):
                yield name, base.read(name)
                continue
            check(monitor)
            part = {kind: learnt[f"{module}.{kind}"] for kind in ("A", "B", "scale", "step", "zero", "base")}
            W0 = base.read(name).to(part["base"].dtype)
            if W0.shape[1] != part["A"].shape[1] or not W0[:1].equal(part["base"]):
                raise InputError(f"'{config.adapter}' was trained on another model than '{config.base}'.")
            Wc = merged(W0, part["A"], part["B"], float(part["scale"])).float()
            step, zero = part["step"], part["zero"]
            parts = integer_parts(Wc, step, zero, grid)
            off = Wc - values_of(codes_of(Wc, step, zero, grid), step, zero, grid)
            clipped += float((off.abs().view(len(Wc), -1, grid.group) > step[..., None] * 0.5001).sum())
            matrices[module] = Matrix(str(grid), (W0.shape[0], W0.shape[1]), float(off.norm()), float(off.norm()))
            yield from ((f"{module}.{kind}", tensor) for kind, tensor in parts.items())
            monitor.report(Progress("rounding", len(matrices), len(names)))

    place = folder / "base"
    with files.whole(place, sync=False) as part:
        part.mkdir()
        base.copy_beside(part)
        compressed.write_packed(part, tensors())
        count = sum(out * inputs for out, inputs in (one.shape for one in matrices.values()))
        bits = 8 * sum(grid.stored_bytes(*one.shape) for one in matrices.values()) / count
        error = sum(one.error**2 for one in matrices.values()) ** 0.5
        facts = {"adapter": config.adapter, "error": error, "clipped": clipped / count,
                 "seconds": round(time.monotonic() - begun, 1)}  # fmt: skip
        manifest = Manifest("l4q", {"name": base.name, "digest": base.digest}, compressed.digest_of(part), bits, 0,
                            matrices, facts)  # fmt: skip
        manifest.write(part)
        files.write_text(part / "README.md", _card(config, base, manifest))
    made = base.adopt(place, config.name or f"{base.name} {config.adapter} {grid.bits} bits")
    return {"library": made.name, "path": str(made.path), "bits": round(bits, 4), "bytes": made.size,
            "base_bytes": base.bytes, **facts}  # fmt: skip


def trained(adapter: str) -> dict[str, Tensor]:
    """What L4Q learned: the tensors of ``l4q.safetensors`` in the adapter's folder.

    Raises:
        InputError: there is no such adapter, or it was not trained with l4q_bits.
    """
    place = rounded(adapter)
    try:
        return load_file(place / L4Q_FILE)
    except (OSError, SafetensorError) as error:
        raise InputError(f"'{place / L4Q_FILE}' is damaged ({error}).") from None


def _card(config: CompressL4qConfig, base: Base, manifest: Manifest) -> str:
    return "\n".join([
        "---",
        f"base_model: {base.name}",
        f"description: {base.name} with {Path(config.adapter).name}, rounded to {manifest.bits:.2f} bits as it was "
        "trained (L4Q).",
        *([f"license: {base.licence}"] if base.licence else []),
        "---",
        f"# {base.name} with {Path(config.adapter).name}, {manifest.bits:.2f} bits per weight",
        "",
        f"L4Q (arXiv 2402.04902): {len(manifest.matrices)} matrices as whole numbers with learned steps and offsets;",
        "the adapter is inside. Opened by `studio chat` and `studio train language`.",
        "",
    ])  # fmt: skip
