"""What regions cost: one picture with four regions against one with a single plain LoRA.

    python -m benchmarks.regions [--models tinymoji,random9m,random80m] [--rounds 5] [--write]

All with the same base, sampler, steps, guidance and size, each region a quarter of the picture with its own LoRA (rank
8, all attention layers) and prompt:

plain        one LoRA, no region: the reference
activation   four regions in one pass, adapters masked in every layer
cross        four regions in cross-attention
composer     cross, with isolation and re-initialisation, no refinement
refined      the same with refinement (trust region) in the first half of the steps: its cost is stated separately
output       our blend of five predictions in one batch
passes       the same one prediction after another: N + 1 passes per step, as other tools do regions

Times are medians of CPU time of one process, the programs taking turns, so that other load on the machine affects all
alike; a call includes everything but loading and the autoencoder (text encoding, keys and values, the search for
windows). Memory is the growth of the process' peak from one to four regions, in processes of their own, beside the
adapters' size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.composition import GUIDANCE, MODELS, RESULTS, adapters

QUARTERS = ((0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1))
PROMPT = "a flat icon of a red apple"
STEPS = {"tinymoji": 10, "random9m": 10, "random80m": 4}
CELLS = 16
"""Side of the latents."""


def random80m() -> Any:
    """A random Stable Diffusion of 80 million parameters."""
    from tests import tiny

    return tiny.sd(
        block_out_channels=(128, 256, 576),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(4, 8, 18),
        sample_size=CELLS,
    )


ALL = {**MODELS, "random80m": random80m}


class Bench:
    """One model with four random adapters, and the programs to compare."""

    def __init__(self, model: str) -> None:
        from adapters.formats.diffusers_file import parse_diffusers
        from pipelines.diffusion import MultiLoRAPipeline

        self.pipe, self.steps = ALL[model](), STEPS[model]
        self.composer = MultiLoRAPipeline(self.pipe)
        for k, state in enumerate(adapters(self.pipe, len(QUARTERS))):
            self.composer.load_lora(parse_diffusers(state, {}, "benchmark"), f"a{k}")
        self.chosen: tuple[Any, ...] = ()

    def programs(self) -> dict[str, Callable[[], Any]]:
        """Name -> one picture."""
        parts = {"self_mask": True, "reinit": True, "capture": 2}
        return {
            "plain": lambda: self.picture("merge", 0),
            "activation": lambda: self.picture("activation", 4),
            "cross": lambda: self.picture("cross", 4),
            "composer": lambda: self.picture("lora-composer", 4, **parts, refine=False),
            "refined": lambda: self.picture("lora-composer", 4, **parts, refine=True),
            "output": lambda: self.picture("output", 4),
            "passes": lambda: self.picture("output", 4, adapter_batch=1),
        }

    def picture(self, method: str, count: int, **options: Any) -> Any:
        """The latents of one picture with ``count`` regions (0: one plain LoRA)."""
        chosen = (method, count, tuple(options.items()))
        names = [f"a{k}" for k in range(max(1, count))]
        regions = [
            {"adapters": (name,), "box": box, "prompt": "an apple", "words": ("apple",)}
            for name, box in zip(names[:count], QUARTERS, strict=False)
        ]
        self.composer.compose(method, names, regions=regions or None, **options)
        self.chosen = chosen
        side = CELLS * self.pipe.vae_scale_factor
        return self.composer(
            PROMPT, steps=self.steps, guidance_scale=GUIDANCE, width=side, height=side, output_type="latent"
        ).images


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Median seconds of every program, and their ratios to plain."""
    bench = Bench(model)
    programs = bench.programs()
    times: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, program in programs.items():
            before = time.process_time()
            program()
            if number:  # the first round warms up
                times[name].append(time.process_time() - before)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    # ratios within a round: a load that comes and goes meets all programs of a round alike
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, times["plain"], strict=True))
        for name, values in times.items()
    }
    return {
        "model": model,
        "parameters": sum(p.numel() for p in bench.pipe.unet.parameters()),
        "steps": bench.steps,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "ratios": {name: round(value, 2) for name, value in ratios.items()},
        "refinement_seconds": round(seconds["refined"] - seconds["composer"], 3),
    }


def memory(model: str) -> dict[str, Any]:
    """Peak memory with one and with four regions, in processes of their own (MiB)."""
    found = {}
    for count in (1, 4):
        command = [sys.executable, "-m", "benchmarks.regions", "--peak", model, str(count)]
        found[count] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {
        "model": model,
        "model_mib": found[1]["model"],
        "adapters_mib": {str(count): row["adapters"] for count, row in found.items()},
        "peak_mib": {str(count): row["peak"] for count, row in found.items()},
        "growth_mib": round(found[4]["peak"] - found[1]["peak"], 1),
    }


def peak(model: str, count: int) -> None:
    """Print the peak of this process after one picture with ``count`` regions."""
    bench = Bench(model)
    bench.picture("activation", count)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    size = sum(p.numel() * p.element_size() for p in bench.pipe.unet.parameters()) / 2**20
    own = bench.composer.joined().denoiser.nbytes() / 2**20
    print(json.dumps({"peak": round(most, 1), "model": round(size, 1), "adapters": round(own, 1)}))


NAMES = ("activation", "cross", "composer", "refined", "output", "passes")
HEAD = (
    f"| model | measured | rounds | steps | plain, s | {' | '.join(NAMES)} | refinement alone, s |\n"
    f"|{'---|' * (len(NAMES) + 6)}"
)


def row_text(row: dict[str, Any]) -> str:
    """One line of the table: seconds of plain, then times of the others as multiples of it."""
    ratios = " | ".join(f"{row['ratios'][name]:.2f}x" for name in NAMES)
    return (
        f"| {row['model']} ({row['parameters'] / 1e6:.1f} M) | {row['date']} | {row['rounds']} | {row['steps']} "
        f"| {row['seconds']['plain']} | {ratios} | {row['refinement_seconds']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="tinymoji,random9m,random80m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/regions.json and .md")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "REGIONS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        peak(options.peak[0], int(options.peak[1]))
        return
    print(HEAD)
    for model in options.models.split(","):
        row = {**measure(model, options.rounds), "rounds": options.rounds, "date": time.strftime("%Y-%m-%d")}
        print(row_text(row), flush=True)
        if options.write:
            write(row, None)
    used = memory(options.models.split(",")[-1])
    print(memory_text(used))
    if options.write:
        write(None, used)


def memory_text(used: dict[str, Any]) -> str:
    """The memory's sentence."""
    return (
        f"Memory ({used['model']}, {used['model_mib']} MiB): from one region to four the adapters grow from "
        f"{used['adapters_mib']['1']} to {used['adapters_mib']['4']} MiB and the peak by {used['growth_mib']} MiB."
    )


def write(row: dict[str, Any] | None, used: dict[str, Any] | None) -> None:
    """Put a row or the memory into the results; what was not measured this time is kept."""
    target = RESULTS / "regions.json"
    content = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {"rows": [], "memory": None}
    if row is not None:
        others = [known for known in content["rows"] if known["model"] != row["model"]]
        content["rows"] = sorted([*others, row], key=lambda known: known["parameters"])
    content["memory"] = used or content["memory"]
    content["conditions"] = {
        "torch": torch.__version__, "machine": platform.machine(),
        "cpus": os.cpu_count(), "threads": 1, "latents": f"{CELLS} x {CELLS}",
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shown = ", ".join(f"{key} {value}" for key, value in content["conditions"].items())
    lines = ["# Regions", "", f"`python -m benchmarks.regions --write`; {shown}.", ""]
    lines += ["Four regions; times as multiples of one plain LoRA picture, the median over the rounds of the ratio"]
    lines += ["within a round.", "", HEAD, *(row_text(known) for known in content["rows"])]
    lines += ["", memory_text(content["memory"])] if content["memory"] else []
    (RESULTS / "regions.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
