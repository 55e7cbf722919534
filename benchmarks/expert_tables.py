"""The tables of :mod:`benchmarks.expert_tasks`, and the bars of the specifications beside what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import spearmanr

from benchmarks.expert_tasks import ALLOCATIONS, FACTS, METHODS, OTHER, RATE, ROWS, SETTINGS, SPLITS, TYPED

Runs = dict[str, Any]
"""Name of a run -> what it measured."""


def of(runs: Runs, start: str) -> list[dict[str, Any]]:
    """The seeds of a run."""
    return [run for name, run in runs.items() if name.startswith(f"{start}/")]


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def spread(values: Sequence[float]) -> str:
    """Mean (least to largest)."""
    if not values:
        return ""
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def right(runs: list[dict[str, Any]]) -> list[float]:
    """Mean accuracy over the tasks, by seed."""
    return [mean(run["accuracies"]) for run in runs]


def report(runs: Runs) -> list[str]:
    parts = (_tasks, _loads, _alone, _routing, _recall, _mola, _gates, _bars)
    return ["## Tasks that contradict each other", "", *(line for part in parts for line in part(runs))]


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = (f"| {' | '.join(line)} |" for line in lines)
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *rows, ""]


def _tasks(runs: Runs) -> list[str]:
    lines = []
    for method in METHODS:
        each = [of(runs, f"tasks/{setting}/{method}") for setting in SETTINGS]
        sizes = [f", {found[0]['parameters']:,}" if found else "" for found in each]
        lines.append([method, *(f"{spread(right(found))}{text}" for found, text in zip(each, sizes, strict=True))])
    return [
        "Share of right answers, mean over tasks and seeds (lowest to highest seed), and parameters. LoRAs beside, or",
        f"experts around, the feed-forward layers of bed T; AdamW {RATE:g}, {ROWS} rows of each task in a batch; 3, 4",
        "and 6 experts; 300, 300 and 500 steps.",
        "",
        *_table(["", *SETTINGS], lines),
    ]


def _loads(runs: Runs) -> list[str]:
    setting, lines = "6 tasks, rank 1", []
    for method in ("MixLoRA", "MixLoRA without loss", "LLaVA-MoLE", "LLaVA-MoLE without loss"):
        found = of(runs, f"tasks/{setting}/{method}")
        each = [layer for run in found for layer in run["loads"]]
        if each:
            lines.append([method, spread([max(layer) for layer in each]), spread([min(layer) for layer in each]),
                          spread(right(found))])  # fmt: skip
    return [
        f"How evenly experts are used ({setting}): tokens of the busiest and of the least used expert of a layer, over",
        "an even share; over layers and seeds.",
        "",
        *_table(["", "busiest", "least used", "right"], lines),
    ]


def _alone(runs: Runs) -> list[str]:
    setting = "3 tasks, rank 2"
    together = of(runs, f"tasks/{setting}/MixLoRA")
    lines = []
    for task in range(3):
        alone = of(runs, f"alone/{setting}/{task}")
        lines.append([str(task), spread([run["accuracies"][task] for run in alone]),
                      spread([run["accuracies"][task] for run in together])])  # fmt: skip
    return [f"MixLoRA on one task and on all ({setting}):", "", *_table(["task", "alone", "together"], lines)]


def _routing(runs: Runs) -> list[str]:
    lines = []
    for beta, delta in SPLITS:
        found = of(runs, f"routing/{beta:g}/{delta:g}")
        if found:
            lines.append([f"{beta:g}", f"{delta:g}", spread([mean(run["difference"]) for run in found]),
                          spread([run["difference"][-1] for run in found]), spread([run["busiest"] for run in found]),
                          spread(right(found))])  # fmt: skip
    return [
        "### LoRAMoE: where two types of rows go",
        "",
        f"{TYPED} tasks in two types, 6 experts of rank 2, 400 steps. Mass of the gates on the first half of the",
        "experts, type 0 less type 1 (at most delta by the constraint alone): mean over layers, and the last layer.",
        "",
        *_table(["beta", "delta", "all layers", "last layer", "largest load (even: 0.17)", "right"], lines),
    ]


def _recall(runs: Runs) -> list[str]:
    lines = []
    for method in ("full", "LoRA", "LoRAMoE"):
        found = of(runs, f"recall/{method}")
        if found:
            lines.append([{"full": "full fine-tuning", "LoRA": "LoRA of equal parameters"}.get(method, method),
                          spread([run["recall"] for run in found]), spread(right(found)),
                          f"{found[0]['parameters']:,}"])  # fmt: skip
    before = [run["before"] for run in of(runs, "recall/full")]
    return [
        "### LoRAMoE: what is left of facts",
        "",
        f"A base that knows {FACTS} facts (recall {spread(before)}) learns three new tasks, a tenth of the rows being",
        f"{OTHER} other facts, 300 steps; recall of the {FACTS} facts, which are never repeated.",
        "",
        *_table(["", "recall", "new tasks", "parameters"], lines),
    ]


def _mola(runs: Runs) -> list[str]:
    lines = []
    for name in ALLOCATIONS:
        found = of(runs, f"mola/{name}")
        if found:
            ranks = [float(spearmanr([int(k) for k in run["distance"]], list(run["distance"].values())).statistic)
                     for run in found if len(run["distance"]) > 2]  # fmt: skip
            lines.append([name, str(found[0]["experts"]), f"{found[0]['parameters']:,}", spread(right(found)),
                          spread(ranks)])  # fmt: skip
    return [
        "### MoLA: experts by layer",
        "",
        "Eight layers, four tasks, rank 2, two experts per token where there are as many, 120 steps. `distance` is the",
        "rank correlation of a layer's number with the mean distance of its experts (attention): 1 means that experts",
        "differ more in higher layers.",
        "",
        *_table(["allocation", "experts per projection", "parameters", "right", "distance"], lines),
    ]


def _gates(runs: Runs) -> list[str]:
    found = of(runs, "gates")
    if not found:
        return []
    lines = [["the base alone", *_columns([run["base"] for run in found])]]
    lines += [[f"expert {n}", *_columns([run["experts"][n] for run in found])] for n in range(3)]
    names = [name for name in found[0] if name in ("average", "sum") or name.startswith("X-LoRA")]
    lines += [[name, *_columns([run[name] for run in found])] for name in names]
    return [
        "### X-LoRA: three tasks, an expert each",
        "",
        f"Experts of rank 4, then a classifier of two layers ({found[0]['classifier']:,} parameters by layer) alone.",
        "",
        *_table(["", "task 0", "task 1", "task 2", "mean"], lines),
    ]


Bar = tuple[str, float, str, float]
"""What is measured, its value, ">=" or "<=", and the bar."""


def _bars(runs: Runs) -> list[str]:
    if not (of(runs, "tasks/6 tasks, rank 1/MixLoRA without loss") and of(runs, f"mola/{list(ALLOCATIONS)[-1]}")):
        return []
    bars = [*_mixture_bars(runs), *_loramoe_bars(runs), *_mola_bars(runs), *_gate_bars(runs)]
    lines = []
    for name, value, sign, bar in bars:
        met = value >= bar if sign == ">=" else value <= bar
        lines.append([name, f"{value:.2f}", f"{sign} {bar:g}", "yes" if met else "**no**"])
    return ["### The bars of the specifications", "", *_table(["", "measured", "bar", "met"], lines)]


def _mixture_bars(runs: Runs) -> list[Bar]:
    few, known, three = "tasks/6 tasks, rank 1", "tasks/6 tasks, rank 1, known first tokens", "3 tasks, rank 2"
    loads, free, sights = (
        [layer for run in of(runs, f"{few}/{method}") for layer in run["loads"]]
        for method in ("MixLoRA", "MixLoRA without loss", "LLaVA-MoLE")
    )
    together = of(runs, f"tasks/{three}/MixLoRA")
    lost = [
        alone["accuracies"][task] - both["accuracies"][task]
        for task in range(3)
        for alone, both in zip(of(runs, f"alone/{three}/{task}"), together, strict=False)
    ]
    reached = {method: mean(right(of(runs, f"{few}/{method}"))) for method in ("MixLoRA", "LoRA")}
    through, paper = (
        mean(right(of(runs, f"{known}/{method}"))) for method in ("LLaVA-MoLE, straight through", "LLaVA-MoLE")
    )
    return [
        ("MixLoRA over a LoRA of its rank (6 tasks, rank 1)", reached["MixLoRA"] / reached["LoRA"], ">=", 1.5),
        ("MixLoRA: least used expert with the loss, over an even share", min(map(min, loads)), ">=", 0.25),
        ("MixLoRA: busiest expert without the loss, over an even share", max(map(max, free)), ">=", 2.0),
        ("MixLoRA: what a task loses by being learnt with the others", max(lost), "<=", 0.03),
        ("LLaVA-MoLE: largest over smallest load", max(max(one) / min(one) for one in sights), "<=", 3.0),
        ("LLaVA-MoLE: straight through less the paper's router (known first tokens)", through - paper, ">=", 0.2),
    ]


def _loramoe_bars(runs: Runs) -> list[Bar]:
    split, unsplit = of(runs, "routing/0.1/0.3"), of(runs, "routing/0/0.1")
    full, lora, mixed = (of(runs, f"recall/{method}") for method in ("full", "LoRA", "LoRAMoE"))
    recalled = mean([run["recall"] for run in mixed]) - mean([run["recall"] for run in full])
    return [
        ("LoRAMoE (0.1, 0.3): difference in the last layer", mean([run["difference"][-1] for run in split]), ">=", 0.2),
        ("LoRAMoE (0.1, 0.3): largest load", max(run["busiest"] for run in split), "<=", 0.3),
        ("LoRAMoE without constraint: difference", mean([abs(mean(run["difference"])) for run in unsplit]), "<=", 0.08),
        ("LoRAMoE: recall less that of full fine-tuning", recalled, ">=", 0.1),
        ("LoRAMoE: new tasks less those of the LoRA", mean(right(mixed)) - mean(right(lora)), ">=", -0.05),
    ]


def _mola_bars(runs: Runs) -> list[Bar]:
    even, most, upper = "even (3-2-3-2-3-2-3-2)", "all (4-4-4-4)", "more above (1-2-3-4)"
    reached = {name: mean(right(of(runs, f"mola/{name}"))) for name in ALLOCATIONS}
    sizes = {name: of(runs, f"mola/{name}")[0]["parameters"] for name in ALLOCATIONS}
    apart = max(abs(reached[name] - reached[even]) for name in ALLOCATIONS if name != most)
    return [
        ("MoLA: largest distance of an allocation to the even one", apart, "<=", 0.05),
        ("MoLA: parameters of 1-2-3-4 over 4-4-4-4", sizes[upper] / sizes[most], "<=", 0.65),
        ("MoLA: 1-2-3-4 less 4-4-4-4", reached[upper] - reached[most], ">=", -0.02),
    ]


def _gate_bars(runs: Runs) -> list[Bar]:
    found = of(runs, "gates")
    own = mean([run["experts"][n][n] for run in found for n in range(3)])
    best = mean([max(map(mean, run["experts"])) for run in found])
    by_layer, shared, average = (
        mean([mean(run[name]) for run in found])
        for name in ("X-LoRA, gates by layer, 400 steps", "X-LoRA, the same gates, 400 steps", "average")
    )
    least = min(by_layer, shared)
    return [
        ("X-LoRA by layer over the experts on their own tasks", by_layer / own, ">=", 0.95),
        ("X-LoRA less the average of the experts", least - average, ">=", 0.3),
        ("X-LoRA less the best expert on all tasks", least - best, ">=", 0.3),
    ]


def _columns(runs: list[list[float]]) -> list[str]:
    each = [spread([run[task] for run in runs]) for task in range(3)]
    return [*each, spread([mean(run) for run in runs])]
