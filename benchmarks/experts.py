"""Mixtures of LoRA experts: what a block costs, what experts are good for, and where they are not.

    python -m benchmarks.experts block       # time, memory and parity of a feed-forward block (2 minutes)
    python -m benchmarks.experts tasks       # bed T: contradicting tasks, LoRAMoE, MoLA, X-LoRA (25 minutes)
    python -m benchmarks.experts families    # SmolLM2-135M: three forms of answer (20 minutes a seed)
    python -m benchmarks.experts report      # writes the tables again from the .json

Minutes are CPU time of one core. Every run is kept in benchmarks/results/experts.json as soon as it is done, and a part
that was interrupted goes on where it stopped (``--again`` forgets it first). Writes benchmarks/results/experts.md.

``block`` compares with the published layer if ``mixlora`` is installed (``pip install --no-deps mixlora``; its own
requirements are met already). Training several adapters at once has a program of its own, ``packed_training``.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adapters import files
from benchmarks import expert_blocks, expert_families, expert_tables, expert_tasks

RESULTS = Path(__file__).parent / "results"
PARTS = {
    "block": (expert_blocks.plan, expert_blocks.report),
    "tasks": (expert_tasks.plan, expert_tables.report),
    "families": (expert_families.plan, expert_families.report),
}
"""Part -> its runs by name, and its tables."""


class Runs:
    """The runs of one part: name -> what it measured, written after each."""

    def __init__(self, part: str, file: Path) -> None:
        self.part, self.file = part, file

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}
        return found

    def done(self) -> dict[str, Any]:
        found: dict[str, Any] = self.read().get(self.part, {})
        return found

    def forget(self) -> None:
        self.keep({})

    def keep(self, runs: dict[str, Any]) -> None:
        found = {**self.read(), self.part: runs, "torch": torch.__version__, "machine": platform.machine()}
        files.write_text(self.file, json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    def __call__(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Do a run unless it is there."""
        if name not in self.done():
            measured = work()
            self.keep({**self.done(), name: measured})
            print(name, json.dumps(measured)[:300], flush=True)


def report(found: dict[str, Any]) -> str:
    lines = [
        "# Mixtures of LoRA experts",
        "",
        "    python -m benchmarks.experts block",
        "    python -m benchmarks.experts tasks",
        "    python -m benchmarks.experts families",
        "",
        f"One thread, torch {found['torch']}, {found['machine']}. Every table is printed as it came out. Bytes and",
        "time of training several adapters at once: [packed_training.md](packed_training.md).",
        "",
    ]
    for part, (_, tables) in PARTS.items():
        if found.get(part):
            lines += [*tables(found[part]), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("part", choices=[*PARTS, "report"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="runs whose name begins so")
    parser.add_argument("--again", action="store_true", help="forget the part's runs first")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / "experts.json"
    if chosen.part != "report":
        runs = Runs(chosen.part, file)
        if chosen.again:
            runs.forget()
        for name, work in PARTS[chosen.part][0](chosen.seeds).items():
            if name.startswith(chosen.only):
                runs(name, work)
    text = report(json.loads(file.read_text(encoding="utf-8")))
    files.write_text(file.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
