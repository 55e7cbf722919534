"""What a pointmap network of the public size costs here.  ``python -m benchmarks.geometry_size --write``

A ViT-L encoder with two base decoders and linear heads (532 million random weights: nothing is fetched) looks at one
ordered pair of 512 x 384 pixels, with the trunk in fp32 and in bf16 (the heads stay in fp32). Also: the alignment's
memory and time per pixel, on a rendered room. Every row is a separate process, so that its peak memory is its own.
The estimate that users see before a run is beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters import files
from benchmarks.measures import peak_memory

RESULTS = Path(__file__).parent / "results"
HEIGHT, WIDTH = 384, 512
ROWS = ("fp32", "bf16", "alignment")
SIDE, VIEWS, STEPS = 256, 4, 5
"""Of the alignment: pixels of the square pictures, their number, and steps."""
BYTES_OF_PREDICTIONS = 32
"""Per pixel of an ordered pair: two points and two confidences in fp32."""


def pair(dtype: str, answer: Path) -> dict[str, Any]:
    """One ordered pair through the real network; the points go to ``answer``."""
    from pipelines.geometry import estimate, inference
    from pipelines.geometry.images import Affine, Photo
    from pipelines.geometry.network import NetworkConfig, PointmapNetwork

    torch.manual_seed(0)
    network = PointmapNetwork(NetworkConfig()).eval().requires_grad_(False)
    built = peak_memory()
    photos = [Photo(torch.rand(3, HEIGHT, WIDTH), Affine(), str(n)) for n in range(2)]
    wall, cpu = time.perf_counter(), time.process_time()
    told = inference.predict(network, photos, [(0, 1)], chunk=1, dtype=dtype)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    points, confidence = told.map2(0)
    assert points.dtype == torch.float32
    assert bool((confidence > 1).all())
    np.save(answer, points.numpy())
    said = estimate.estimate(network.config, 2, 1, HEIGHT, WIDTH, torch.device("cpu"), chunk=1)
    return {"parameters": sum(p.numel() for p in network.parameters()), "shape": list(points.shape),
            "built_bytes": built, "peak_bytes": peak_memory(), "seconds": round(wall, 2), "cpu_seconds": round(cpu, 2),
            "estimated_bytes": said.memory, "estimated_seconds": round(said.network_seconds, 2)}  # fmt: skip


def alignment() -> dict[str, Any]:
    """A few steps of global alignment: bytes and time per pixel of an ordered pair (both views), start left out."""
    from pipelines.geometry import alignment as work
    from pipelines.geometry import estimate
    from tests.geometry.rooms import room

    predictions = room(0, views=VIEWS, size=SIDE).predictions
    pixels, before = predictions.confidence1.numel(), peak_memory()

    clock: list[tuple[float, float]] = []

    def tick(_step: int, _confidence: object, _distance: object) -> None:
        clock.append((time.perf_counter(), time.process_time()))  # asked before every step: nothing is reweighted

    work.align(predictions, STEPS, reweight=tick)
    wall, cpu = ((b - a) / (len(clock) - 1) / pixels * 1e9 for a, b in zip(clock[0], clock[-1], strict=True))
    return {"pairs": len(predictions.pairs), "pixels": pixels,
            "bytes_per_pixel": round((peak_memory() - before) / pixels) + BYTES_OF_PREDICTIONS,
            "nanoseconds": round(wall, 1), "cpu_nanoseconds": round(cpu, 1),
            "distances_nanoseconds": round(estimate.alignment_pace(torch.device("cpu")) * 1e9, 1)}  # fmt: skip


def measure() -> dict[str, Any]:
    """All rows, one process each."""
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)}
    with tempfile.TemporaryDirectory() as place:
        for row in ROWS:
            answer = Path(place) / f"{row}.npy"
            command = [sys.executable, "-m", "benchmarks.geometry_size", "--row", row, "--answer", str(answer)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            result[row] = json.loads(done.stdout.splitlines()[-1])
            print(row, json.dumps(result[row]), flush=True)
        full, half = (np.load(Path(place) / f"{row}.npy").reshape(-1, 3) for row in ROWS[:2])
    apart = np.linalg.norm(full - half, axis=1) / np.linalg.norm(full, axis=1)
    return {**result, "bf16_median_difference": float(np.median(apart))}


def report(result: dict[str, Any]) -> str:
    """The result in words."""
    rows = [
        f"| {name} | {' x '.join(map(str, r['shape']))} | {r['built_bytes'] / 1e9:.2f} GB | "
        f"{r['peak_bytes'] / 1e9:.2f} GB ({r['estimated_bytes'] / 1e9:.2f}) | {r['seconds']:.1f} s "
        f"({r['estimated_seconds']:.1f}) | {r['cpu_seconds']:.1f} s |"
        for name, r in ((name, result[name]) for name in ROWS[:2])
    ]
    a = result["alignment"]
    return "\n".join([
        "# The pointmap network in its public size", "",
        f"{result['fp32']['parameters']:,} random parameters, CPU, {result['threads']} thread(s), load "
        f"{result['load']} on {os.cpu_count()} cores: wall times are those of a busy machine. One ordered pair, both "
        "pictures encoded. In brackets: what the estimate says before the run.", "",
        "| trunk | points | memory with weights | peak | time | CPU time |", "|---|---|---|---|---|---|", *rows, "",
        f"Points with the trunk in bf16 differ from fp32 by {result['bf16_median_difference']:.2%} (median; heads in "
        "fp32 both times; the weights are stored in fp32 and rounded layer by layer).", "",
        f"Alignment of {a['pairs']} ordered pairs, {SIDE} x {SIDE}: {a['bytes_per_pixel']} bytes per pixel and pair, "
        f"{a['cpu_nanoseconds']:.0f} ns of CPU ({a['nanoseconds']:.0f} ns of wall time; its distances alone "
        f"{a['distances_nanoseconds']:.0f}) per pixel, pair and step.", "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/geometry_size.md and .json")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(alignment() if given.row == "alignment" else pair(given.row, given.answer)))
        return
    result = measure()
    print(report(result))
    if given.write:
        files.write_text(RESULTS / "geometry_size.json", json.dumps(result, indent=1) + "\n")
        files.write_text(RESULTS / "geometry_size.md", report(result))


if __name__ == "__main__":
    main()
