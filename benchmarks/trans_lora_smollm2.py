"""Trans-LoRA (studio transfer) from SmolLM2-135M-Instruct to the same model without three of its 30 layers.

No second small language model comes in a Python package, so the target is made of the first: the three layers whose
loss rises least without them (17, 18, 16; chosen on a paragraph of text) are taken out, which leaves a fluent base of
121 M parameters and other activations. The task is checkable for any input, also a written one: sentences such as
"Maria lives in Berlin and works as a nurse." are answered "nurse, Berlin, Maria". Only 60 rows teach it to the source.

    python -m benchmarks.trans_lora_smollm2             # about 20 minutes on one core
    python -m benchmarks.trans_lora_smollm2 --report    # writes the table again from the .json

Writes benchmarks/results/trans_lora_smollm2.{json,md}. One seed: a check that real models get through, no statistics.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapters import files
from adapters.progress import Progress, Silent

RESULTS = Path(__file__).parent / "results"
REMOVED = (16, 17, 18)
ROWS, TESTED, COUNT, STEPS = 60, 24, 40, 40
NAMES = [
    "Maria", "Tom", "Aisha", "Kenji", "Olga", "Pedro", "Lena", "Ravi", "Nina", "Omar", "Ingrid", "Paulo", "Chen",
    "Fatima", "Jonas", "Elif", "Marek", "Sofia", "Kwame", "Hana",
]  # fmt: skip
CITIES = [
    "Berlin", "Oslo", "Cairo", "Kyoto", "Prague", "Lisbon", "Vienna", "Mumbai", "Dublin", "Rabat", "Bergen",
    "Recife", "Taipei", "Tunis", "Riga", "Ankara", "Krakow", "Athens", "Accra", "Seoul",
]  # fmt: skip
JOBS = [
    "nurse", "baker", "teacher", "farmer", "painter", "lawyer", "driver", "singer", "chemist", "dentist", "plumber",
    "tailor", "cook", "pilot", "judge",
]  # fmt: skip
FORM = re.compile(r"(\S+) lives in (.+) and works as an? (.+)\.")
COMMON: dict[str, Any] = {
    "rank": 8, "learning_rate": 1e-3, "seed": 0, "device": "cpu", "dtype": "fp32",
}  # fmt: skip
TRAINING: dict[str, Any] = {"steps": STEPS, "batch_size": 4, "targets": "attention", "save_every": 0}


def sentences(count: int) -> list[str]:
    """Different inputs."""
    r, found = random.Random(0), dict[str, None]()
    while len(found) < count:
        found[f"{r.choice(NAMES)} lives in {r.choice(CITIES)} and works as a {r.choice(JOBS)}."] = None
    return list(found)


def right_answer(text: str) -> str:
    """The answer to any input of the form; empty for others."""
    found = FORM.fullmatch(text)
    return f"{found[3]}, {found[2]}, {found[1]}" if found else ""


def shortened(source: Path, place: Path) -> Path:
    """Write the model without the layers ``REMOVED`` as a transformers directory; returns it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers = torch.nn.ModuleList(one for n, one in enumerate(model.model.layers) if n not in REMOVED)
    model.config.num_hidden_layers = len(model.model.layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(model.model.layers)]
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(source).save_pretrained(place)
    return place


class Told(Silent):
    """Prints where the job is."""

    def report(self, progress: Progress) -> None:
        if progress.message or progress.step % 10 == 0:
            print(f"{time.strftime('%X')} {progress}", flush=True)


def rows_file(place: Path, inputs: Sequence[str]) -> Path:
    rows = ({"prompt": text, "completion": right_answer(text)} for text in inputs)
    return files.write_text(place, "".join(json.dumps(row) + "\n" for row in rows))


def measured(folder: Path) -> dict[str, Any]:
    """The whole run."""
    from studio.library import smollm2
    from studio.training.schemas.language import TrainLanguageConfig
    from studio.training.tasks import language
    from studio.transfer import job, preparation
    from studio.transfer.schema import PrepareTransferConfig, TransferConfig

    source = smollm2.prepare()
    target = shortened(source, folder / "target")
    inputs = sentences(ROWS + TESTED)
    data, test = rows_file(folder / "rows.jsonl", inputs[:ROWS]), rows_file(folder / "test.jsonl", inputs[ROWS:])
    started, seconds = time.perf_counter(), {}

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - started - sum(seconds.values()), 1)

    config = TrainLanguageConfig.parse(
        {**COMMON, **TRAINING, "alpha": 16, "base": str(source), "data": str(data), "name": "it"}
    )
    adapter = Path(language.run(config, folder / "source", Told())["adapter"])
    lap("source LoRA")
    writing = {"input_tokens": 24, "prompting": "plain", "batch": 8, "training": TRAINING}
    prepared = preparation.prepare(PrepareTransferConfig.parse({
        **COMMON, **writing, "adapter": str(adapter), "base": str(source), "data": str(data), "samples": 48,
        "held_out": 0.25, "question": "Is this an input of the task?\n{input}",
    }), folder / "prepare", Told())  # fmt: skip
    lap("bundle")
    moved = job.run(TransferConfig.parse({
        **COMMON, **writing, "bundle": prepared["bundle"], "base": str(source), "to": str(target), "count": COUNT,
        "answer_tokens": 24, "validation_split": 0.0, "test_data": str(test), "test_limit": TESTED,
    }), folder / "transfer", Told())  # fmt: skip
    lap("transfer")
    made = [json.loads(line) for line in Path(moved["examples"]).read_text().splitlines()]
    batches = (folder / "transfer/written.jsonl").read_text().splitlines()[1:]
    written = [one["text"] for batch in batches for one in json.loads(batch)]
    return {
        "machine": f"{platform.machine()}, torch {torch.__version__}, one thread",
        "discriminator": prepared["discriminator"], "test": moved["test"], "outcomes": moved["outcomes"],
        "acceptance": moved["acceptance"], "distinct_1": moved["distinct_1"], "distinct_2": moved["distinct_2"],
        "in form, written": statistics.fmean(bool(right_answer(text)) for text in written),
        "in form, kept": statistics.fmean(bool(right_answer(one["prompt"])) for one in made),
        "right on kept": statistics.fmean(one["completion"] == right_answer(one["prompt"]) for one in made),
        "examples": [[one["prompt"], one["completion"]] for one in made[:8]], "seconds": seconds,
    }  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """The numbers as markdown."""
    phi, test = found["discriminator"], found["test"]
    outcomes = ", ".join(f"{name} {count}" for name, count in sorted(found["outcomes"].items()))
    return "\n".join([
        "# Trans-LoRA from SmolLM2-135M-Instruct to 27 of its 30 layers", "",
        f"`python -m benchmarks.trans_lora_smollm2`, {found['machine']}; one seed. {ROWS} rows teach the source, "
        f"{COUNT} written examples the target, {STEPS} steps of 4 each.", "",
        f"| exact answers to {TESTED} test rows | |", "|---|---|",
        *(f"| {name} | {test[name]:.3f} |" for name in ("source", "target base", "transferred")), "",
        f"- Discriminator on held-out inputs: {phi['accepted']:.0f} of {phi['real']:.0f} real ones accepted, "
        f"{phi['rejected']:.0f} of {phi['written']:.0f} written by the source rejected.",
        f"- Written inputs: {outcomes}; acceptance {found['acceptance']:.3f}. In the task's form are "
        f"{found['in form, written']:.3f} of those written and {found['in form, kept']:.3f} of those kept; the source "
        f"answers {found['right on kept']:.3f} of those kept rightly.",
        f"- Different words {found['distinct_1']:.2f}, pairs {found['distinct_2']:.2f}.",
        "- Seconds: " + ", ".join(f"{name} {took:.0f}" for name, took in found["seconds"].items()) + ".", "",
        "The first examples:", "", *(f"- {text!r} -> {answer!r}" for text, answer in found["examples"]), "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the table again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    place = asked.out / "trans_lora_smollm2.json"
    if not asked.report:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            os.environ.setdefault("ADAPTER_STUDIO_HOME", str(Path(folder) / "home"))
            files.write_text(place, json.dumps(measured(Path(folder)), indent=1) + "\n")
    files.write_text(asked.out / "trans_lora_smollm2.md", report(json.loads(place.read_text())))
    print((asked.out / "trans_lora_smollm2.md").read_text())


if __name__ == "__main__":
    main()
