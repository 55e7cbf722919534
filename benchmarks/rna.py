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
    python -m benchmarks.rna --continue                # keeps the seeds already in the .json
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
from collections.abc import Callable, Sequence
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
    "full": {"mode": "full", "learning_rate": 1e-3, "steps": 60},
    "LoRA r8": {"mode": "lora", "rank": 8, "alpha": 16, "learning_rate": 5e-3, "steps": 60},
}
FITTED = 300
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


def one(seed: int, data: Path, place: Path) -> dict[str, Any]:
    """Everything of one seed."""
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
        "auc": {name: metrics.area(truth, score) for name, score in baselines(shown, held).items()}, "models": {},
    }  # fmt: skip
    asked = {**COMMON, **BASE, "data": [str(free), str(train)], "seed": seed, "name": "base"}
    made = trained(asked, place / "base")
    found["base"] = {key: made[key] for key in ("first_loss", "loss", "seconds", "parameters")}
    for name, values in MODELS.items():
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
    """The table, from the .json."""
    seeds = found["seeds"]

    def told(value: Callable[[dict[str, Any]], float], digits: int = 3) -> str:
        values = [value(seed) for seed in seeds]
        spread = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.{digits}f}{spread}"

    lines = [
        "# LncRNA or mRNA, on human chromosome X", "",
        (__doc__ or "").partition("\n\n")[2].partition("\n\n    python")[0].replace("\n", " "), "",
        f"{len(seeds)} seeds ({', '.join(str(seed['seed']) for seed in seeds)}), {seeds[0]['train']} transcripts to "
        f"learn from, {seeds[0]['test']} to test with ({seeds[0]['positive']} of them non-coding); area under the ROC "
        f"curve, mean over the seeds (smallest-largest). {found['machine']}. Repeat it with "
        "`python -m benchmarks.rna`.", "",
        "| scored by | trained parameters | whole | ORF | mean of both | with the lengths beside it |",
        "|---|---|---|---|---|---|",
        *(f"| {name} | | | | {told(lambda s, name=name: s['auc'][name])} | |" for name in seeds[0]["auc"]),
        *(
            f"| {name} | {seeds[0]['models'][name]['parameters']:,} | "
            + " | ".join(told(lambda s, n=name, k=key: s["models"][n]["auc"][k]) for key in AREAS) + " |"
            for name in MODELS
        ),
        "",
    ]  # fmt: skip
    full, lora = (statistics.fmean(s["models"][n]["auc"]["mean"] for s in seeds) for n in MODELS)
    shares = seeds[0]["models"]["LoRA r8"]["parameters"] / seeds[0]["models"]["full"]["parameters"]
    kmers = statistics.fmean(s["auc"]["3-mer shares (logistic)"] for s in seeds)
    orf = statistics.fmean(s["auc"]["ORF length alone"] for s in seeds)
    bars = [
        (f"full reaches {BARS['full']:.2f} on the mean score", full >= BARS["full"], f"{full:.3f}"),
        (f"LoRA reaches {BARS['LoRA r8']:.2f}", lora >= BARS["LoRA r8"], f"{lora:.3f}"),
        ("both are above 3-mer shares", min(full, lora) > kmers, f"{kmers:.3f}"),
        ("LoRA is within 0.10 of full", lora >= full - 0.10, f"{full - lora:+.3f}"),
        ("with at most 6 % of its parameters", shares <= 0.06, f"{shares:.1%}"),
    ]
    lines += ["| bar | measured | reached |", "|---|---|---|",
              *(f"| {text} | {value} | {'yes' if good else '**no**'} |" for text, good, value in bars), ""]  # fmt: skip
    beaten = max(full, lora) > orf
    lines += [
        f"The length of the longest ORF alone reaches {orf:.3f}: the models of this size and budget "
        + ("beat it." if beaten else "do **not** beat it, and whoever needs a label today should use that length."),
        "Error of LoRA over error of full, 1 - accuracy at probability 0.5: "
        + told(lambda s: (1 - s["models"]["LoRA r8"]["measures"]["accuracy"])
               / (1 - s["models"]["full"]["measures"]["accuracy"]), 2) + ".",
        "No number of the paper (arXiv 2411.08073) is reproduced here: its data (GENCODE), size (86.9 M) and training "
        "are others.", "",
        "| model | accuracy | balanced accuracy | macro F1 | MCC | PR AUC | ROC AUC, bootstrap 95 % (first seed) |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in MODELS:
        keys = ("accuracy", "balanced_accuracy", "macro_f1", "mcc", "pr_auc")
        low, high = seeds[0]["models"][name]["auc_95"]
        lines.append(
            f"| {name} | " + " | ".join(told(lambda s, n=name, k=key: s["models"][n]["measures"][k]) for key in keys)
            + f" | {low:.3f}-{high:.3f} |"
        )  # fmt: skip
    heads = " | ".join(f"{name}: accuracy, ROC AUC" for name in MODELS)
    lines += ["", f"| quarter by length (nt, first seed) | {heads} |", "|---|" + "---|" * len(MODELS)]
    for rows in zip(*(seeds[0]["models"][name]["by_length"] for name in MODELS), strict=True):
        cells = [f"{row['accuracy']:.3f}, {row.get('roc_auc', float('nan')):.3f}" for row in rows]
        lines.append(f"| {rows[0]['from']}-{rows[0]['to']} | " + " | ".join(cells) + " |")
    seconds = [s["base"]["seconds"] + sum(m["seconds"] for m in s["models"].values()) for s in seeds]
    lines += ["", f"Training took {', '.join(f'{value / 60:.1f}' for value in seconds)} minutes. Settings: base "
              f"`{json.dumps(BASE)}`, models `{json.dumps(MODELS)}`, all `{json.dumps(COMMON)}`.", ""]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=build_dir() / "transcripts")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--keep", type=Path, help="keep bases and adapters below this folder")
    parser.add_argument("--continue", dest="go_on", action="store_true")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    silence.library_warnings()
    silence.loading_bars()
    target = RESULTS / "rna.json"
    known = json.loads(target.read_text()) if target.is_file() and (options.go_on or options.report) else {}
    machine = f"{os.cpu_count()} {platform.machine()} cores, one thread, busy with other work"
    found: dict[str, Any] = {"machine": machine, "seeds": [], **known}
    for seed in [] if options.report else options.seeds:
        if seed in [done["seed"] for done in found["seeds"]]:
            continue
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as temporary:
            place = (options.keep or Path(temporary)) / f"seed-{seed}"
            found["seeds"].append(one(seed, options.data, place))
        files.write_text(target, json.dumps(found, indent=1) + "\n")
        print(f"seed {seed}: {time.perf_counter() - begun:.0f} s")
    files.write_text(RESULTS / "rna.md", report(found))


if __name__ == "__main__":
    main()
