"""Long non-coding against messenger RNA on real human transcripts: a tiny k-mer BERT, whole and as a LoRA, beside plain
baselines.

1,184 transcripts of chromosome X from Debian's transdecoder-doc, one per gene, 174 of them non-coding
(assets/build/transcripts.py). A quarter of the genes is for testing, drawn anew for each seed. A BERT of 3 layers,
width 96, over 3-mers learns hidden k-mers of unlabelled transcripts (none of a test gene) and of the training ones;
then every weight learns the labels, or a LoRA of rank 8 on queries and values does, with equal steps. Rows are whole
transcripts and their longest ORFs, of both labels equally often. Scores: of the whole transcript, of the ORF (without
one: of the whole), and the mean of both margins. Baselines see the same split.

    python -m assets.build.transcripts                 # the data
    python -m benchmarks.rna                           # 3 seeds; about 10 minutes each on a busy core
    python -m benchmarks.rna --continue                # keeps what is already in the .json
    python -m benchmarks.rna --models                  # the baselines alone, in seconds
    python -m benchmarks.rna --report                  # writes the table again from the .json

Writes benchmarks/results/rna.{json,md}; ``--keep FOLDER`` also keeps base and adapters of every seed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapters import files
from assets.build.common import build_dir
from assets.build.transcripts import written
from pipelines.genomics import metrics
from pipelines.genomics.classifier import RnaClassifier
from pipelines.genomics.kmers import Kmers
from pipelines.genomics.orf import longest_orf
from studio import silence
from studio.datasets import transcripts
from studio.datasets.transcripts import Transcript
from studio.training.schemas.rna import TrainRnaConfig
from studio.training.tasks.rna import run

RESULTS = Path(__file__).parent / "results"
LABELS = ["mRNA", "lncRNA"]
SEEDS = (0, 1, 2)
TEST = 0.25
COMMON: dict[str, Any] = {"device": "cpu", "batch_size": 12, "warmup_ratio": 0.1, "save_every": 0,
                          "checkpoint_every": 20}  # fmt: skip
BASE: dict[str, Any] = {
    "base": "new", "mode": "full", "task": "masked", "width": 96, "depth": 3, "heads": 4, "max_length": 384,
    "view": "full", "long": "windows", "learning_rate": 2e-3, "steps": 60,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "full": {"mode": "full", "learning_rate": 1e-3, "steps": 48, "batch_size": 8},
    "LoRA r8": {"mode": "lora", "rank": 8, "alpha": 16, "learning_rate": 2e-3, "steps": 48, "batch_size": 8},
}
FITTED = 100
"""Training transcripts on which the margin is weighed against the lengths."""
AREAS = ("whole", "ORF", "mean", "mean and lengths (logistic)")
BARS = {"full": 0.75, "LoRA r8": 0.70}


def fasta_of(items: Sequence[Transcript], file: Path, labelled: bool = True) -> Path:
    """Transcripts as a FASTA file."""
    return files.write_text(file, "".join(
        written(f"{item.record.id} gene={item.gene}" + (f" label={LABELS[item.label or 0]}" if labelled else ""),
                item.record.sequence)
        for item in items
    ))  # fmt: skip


# ------------------------------------------------------------------------------------------------ baselines


def lengths(items: Sequence[Transcript]) -> np.ndarray:
    """log length, log ORF length, ORF coverage of every transcript (n, 3)."""
    rows = []
    for item in items:
        frame = longest_orf(item.record.sequence)
        size, orf = len(item.record.sequence), len(frame) if frame else 0
        rows.append([np.log(size), np.log1p(orf), orf / size])
    return np.array(rows)


def frequencies(items: Sequence[Transcript]) -> np.ndarray:
    """Shares of the 64 3-mers (n, 64)."""
    kmers = Kmers.new(3)
    counts = [np.bincount(kmers.tokens(item.record.sequence), minlength=len(kmers))[5:] for item in items]
    return np.array([row / max(1, row.sum()) for row in counts])


def logistic(train: np.ndarray, truth: Sequence[int], test: np.ndarray) -> np.ndarray:
    """Probability of label 1 by a class-weighted logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    made = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))
    found: np.ndarray = made.fit(train, truth).predict_proba(test)[:, 1]
    return found


def baselines(shown: Sequence[Transcript], held: Sequence[Transcript]) -> dict[str, np.ndarray]:
    """Scores of the held-out transcripts by name of the baseline."""
    truth = [item.label or 0 for item in shown]
    known, wanted = lengths(shown), lengths(held)
    return {
        "length alone": -wanted[:, 0],
        "ORF length alone": -wanted[:, 1],
        "length, ORF length, coverage (logistic)": logistic(known, truth, wanted),
        "3-mer shares (logistic)": logistic(frequencies(shown), truth, frequencies(held)),
    }


# ------------------------------------------------------------------------------------------------ one seed


def one(seed: int, data: Path, place: Path, models: Sequence[str], known: dict[str, Any]) -> dict[str, Any]:
    """The baselines of one seed, and those of ``models`` that are not ``known`` already."""
    items = transcripts.read([str(data / "labelled.fa")], LABELS).items
    shown, held = transcripts.split(items, TEST, seed)
    tested = {item.gene for item in held}
    more = transcripts.read([str(data / "unlabelled.fa")]).items
    allowed = [item for item in more if item.gene not in tested]
    train = fasta_of(shown, place / "train.fa")
    free = fasta_of(allowed, place / "free.fa", labelled=False)
    truth = [item.label or 0 for item in held]
    found: dict[str, Any] = {
        "seed": seed, "train": len(shown), "test": len(held), "positive": sum(truth), "free": len(allowed),
        "auc": {name: metrics.area(truth, score) for name, score in baselines(shown, held).items()},
        "base": known.get("base", {}), "models": dict(known.get("models", {})),
    }  # fmt: skip
    missing = [name for name in models if name not in found["models"]]
    if not missing:
        return found
    asked = {**COMMON, **BASE, "data": [str(free), str(train)], "seed": seed, "name": "base"}
    made = trained(asked, place / "base")
    found["base"] = {key: made[key] for key in ("first_loss", "loss", "seconds", "parameters")}
    for name in missing:
        values = MODELS[name]
        asked = {**COMMON, **values, "base": made["adapter"], "data": [str(train)], "seed": seed, "name": "it"}
        result = trained(asked, place / name.replace(" ", "-"))
        opened = [Path(made["adapter"]), Path(result["adapter"])] if values["mode"] == "lora" else [
            Path(result["adapter"])
        ]  # fmt: skip
        found["models"][name] = {
            **{key: result[key] for key in ("first_loss", "loss", "seconds", "parameters")},
            **judged(RnaClassifier.open(*opened), shown, held, seed),
        }
    return found


def trained(asked: dict[str, Any], place: Path) -> dict[str, Any]:
    """The result of a training, kept in its folder: one that is done is not repeated, one that was stopped goes on."""
    kept = place / "result.json"
    if not kept.is_file():
        result = run(TrainRnaConfig.parse(asked), place, resume=True)
        files.write_text(kept, json.dumps(result))
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def judged(
    classifier: RnaClassifier, shown: Sequence[Transcript], held: Sequence[Transcript], seed: int
) -> dict[str, Any]:
    """Areas and measures of a classifier, alone and with the lengths beside its margin."""
    truth = [item.label or 0 for item in held]
    scores = list(classifier.stream(item.record for item in held))
    mean = np.array([score.margin for score in scores])
    some = shown[:: max(1, len(shown) // FITTED)]
    mine = np.array([score.margin for score in classifier.stream(item.record for item in some)])
    probability = 1 / (1 + np.exp(-mean))
    known = [item.label or 0 for item in some]
    both = logistic(np.column_stack([mine, lengths(some)]), known, np.column_stack([mean, lengths(held)]))
    return {
        "auc": {
            "whole": metrics.area(truth, [score.full for score in scores]),
            "ORF": metrics.area(truth, [score.full if score.orf is None else score.orf for score in scores]),
            "mean": metrics.area(truth, mean),
            "mean and lengths (logistic)": metrics.area(truth, both),
        },
        "auc_95": metrics.interval(truth, mean, seed=seed),
        "without_orf": sum(score.orf is None for score in scores),
        "measures": metrics.measures(truth, probability),
        "by_length": [
            {"from": low, "to": high, **measured}
            for low, high, measured in metrics.by_length(truth, probability, [len(s.record.sequence) for s in scores])
        ],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ report


def report(found: dict[str, Any]) -> str:
    """The tables, from the .json; a model is averaged over the seeds that measured it."""
    seeds = found["seeds"]
    models = {name: [s for s in seeds if name in s["models"]] for name in MODELS}
    return "\n".join([
        "# LncRNA or mRNA, on human chromosome X", "",
        (__doc__ or "").partition("\n\n")[2].partition("\n\n    python")[0].replace("\n", " "), "",
        f"{len(seeds)} seeds ({', '.join(str(seed['seed']) for seed in seeds)}), {seeds[0]['train']} transcripts to "
        f"learn from, {seeds[0]['test']} to test with ({seeds[0]['positive']} of them non-coding). Area under the ROC "
        f"curve, mean over the seeds (smallest-largest). {found['machine']}.", "",
        "| scored by | seeds | trained parameters | whole | ORF | mean of both | with the lengths beside it |",
        "|---|---|---|---|---|---|---|",
        *(f"| {name} | {len(seeds)} | | | | {told([s['auc'][name] for s in seeds])} | |" for name in seeds[0]["auc"]),
        *(_row(name, mine) for name, mine in models.items()), "",
        *_bars(seeds, models), "",
        "No number of the paper (arXiv 2411.08073) is reproduced here: its data (GENCODE), size (86.9 M) and training "
        "are others.", "", *_more({name: mine for name, mine in models.items() if mine}),
        f"Settings: base `{json.dumps(BASE)}`, models `{json.dumps(MODELS)}`, all `{json.dumps(COMMON)}`.", "",
    ])  # fmt: skip


def told(values: Sequence[float], digits: int = 3) -> str:
    """The mean of some values, and their range if they are several."""
    spread = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _row(name: str, seeds: Sequence[dict[str, Any]]) -> str:
    if not seeds:
        return f"| {name} | not run yet | | | | | |"
    cells = " | ".join(told([s["models"][name]["auc"][key] for s in seeds]) for key in AREAS)
    return f"| {name} | {len(seeds)} | {seeds[0]['models'][name]['parameters']:,} | {cells} |"


def _bars(seeds: Sequence[dict[str, Any]], models: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The thresholds, and what is known about them."""

    def mean(name: str) -> float | None:
        values = [s["models"][name]["auc"]["mean"] for s in models[name]]
        return statistics.fmean(values) if values else None

    def line(text: str, value: float | None, good: bool) -> str:
        return f"| {text} | {'' if value is None else f'{value:.3f}'} | " + (
            "not run yet |" if value is None else "yes |" if good else "**no** |"
        )

    full, lora = mean("full"), mean("LoRA r8")
    kmers = statistics.fmean(s["auc"]["3-mer shares (logistic)"] for s in seeds)
    orf = statistics.fmean(s["auc"]["ORF length alone"] for s in seeds)
    apart = None if full is None or lora is None else full - lora
    both = [value for value in (full, lora) if value is not None]
    beaten = bool(both) and max(both) > orf
    return [
        "| bar | measured | reached |", "|---|---|---|",
        line(f"full reaches {BARS['full']:.2f} on the mean score", full, (full or 0) >= BARS["full"]),
        line(f"LoRA reaches {BARS['LoRA r8']:.2f}", lora, (lora or 0) >= BARS["LoRA r8"]),
        line(f"full is above 3-mer shares ({kmers:.3f})", full, (full or 0) > kmers),
        line(f"LoRA is above 3-mer shares ({kmers:.3f})", lora, (lora or 0) > kmers),
        line("full minus LoRA is at most 0.10", apart, (apart or 0) <= 0.10), "",
        f"The length of the longest ORF alone reaches {orf:.3f}: a model of this size and budget "
        + ("beats it." if beaten else "does **not** beat it, and whoever needs a label today should use that length."),
    ]  # fmt: skip


def _more(models: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Further measures, and quarters by length of the first seed."""
    keys = ("accuracy", "balanced_accuracy", "macro_f1", "mcc", "pr_auc")
    lines = ["| model | accuracy | balanced accuracy | macro F1 | MCC | PR AUC | ROC AUC, 95 % (first seed) |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, seeds in models.items():
        low, high = seeds[0]["models"][name]["auc_95"]
        cells = " | ".join(told([s["models"][name]["measures"][key] for s in seeds]) for key in keys)
        lines.append(f"| {name} | {cells} | {low:.3f}-{high:.3f} |")
    lines += ["", "| model | quarter by length (nt, first seed) | accuracy | ROC AUC |", "|---|---|---|---|"]
    for name, seeds in models.items():
        for row in seeds[0]["models"][name]["by_length"]:
            area = f"{row['roc_auc']:.3f}" if "roc_auc" in row else "one label only"
            lines.append(f"| {name} | {row['from']}-{row['to']} | {row['accuracy']:.3f} | {area} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=build_dir() / "transcripts")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--keep", type=Path, help="keep bases and adapters below this folder")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS), help="none: baselines only")
    parser.add_argument("--continue", dest="go_on", action="store_true")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    silence.library_warnings()
    silence.loading_bars()
    target = RESULTS / "rna.json"
    before = json.loads(target.read_text()) if target.is_file() and (options.go_on or options.report) else {}
    machine = f"{os.cpu_count()} {platform.machine()} cores, one thread, busy with other work"
    found: dict[str, Any] = {"machine": machine, "seeds": [], **before}
    for seed in [] if options.report else options.seeds:
        begun = time.perf_counter()
        known = next((done for done in found["seeds"] if done["seed"] == seed), {})
        with tempfile.TemporaryDirectory() as temporary:
            place = (options.keep or Path(temporary)) / f"seed-{seed}"
            made = one(seed, options.data, place, options.models, known)
        found["seeds"] = sorted([*(s for s in found["seeds"] if s["seed"] != seed), made], key=lambda s: s["seed"])
        files.write_text(target, json.dumps(found, indent=1) + "\n")
        print(f"seed {seed}: {time.perf_counter() - begun:.0f} s")
    files.write_text(RESULTS / "rna.md", report(found))


if __name__ == "__main__":
    main()
