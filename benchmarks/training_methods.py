"""Every training method on bed T (see ``benchmarks/dialects.py``) against plain LoRA, PEFT's own and full fine-tuning.

    python -m benchmarks.training_methods                     # all experiments, 3 seeds, about 12 minutes on one core
    python -m benchmarks.training_methods starts --seeds 1    # some of them

Each experiment replaces its part of ``benchmarks/results/training_methods.json``; the tables (``.md``) and plots
(``.png``, with matplotlib) are made from it. Every threshold is listed with its result, passed or not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from benchmarks import dialects, topics
from benchmarks.measures import ratio_interval, smooth
from benchmarks.plain_loop import Data, Recipe, Run, go_on, one_pass, prepare, reference, train

RESULTS = Path(__file__).parent / "results"
NAME = "training_methods"
Row = dict[str, Any]
Found = dict[str, Any]


def fresh(seed: int, size: int = 32, noise: float = dialects.NOISE) -> Data:
    """New sequences of the new dialect in every batch."""
    return lambda number: dialects.batch(dialects.NEW, size, seed, number, noise)


def fixed(seed: int, total: int = 64, size: int = 16, noise: float = dialects.NOISE) -> Data:
    """Batches from ``total`` sequences seen again and again."""
    everything = dialects.batch(dialects.NEW, total, 1000 + seed, 0, noise)

    def pick(number: int) -> Tensor:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(31 * seed + number))
        return everything[order[:size]]

    return pick


def mean(values: Sequence[float], first: int = 0, last: int | None = None) -> float:
    """Mean of a stretch."""
    return statistics.fmean(values[first:last])


def curves(base: dict[str, Any], data: Callable[[int], Data], seeds: int) -> list[list[float]]:
    """Training losses of a recipe, one list per seed."""
    return [
        train(dialects.model(), Recipe(**base, seed=seed), data(seed), dialects.TARGETS).losses for seed in range(seeds)
    ]


def check(name: str, value: float, limit: float, below: bool = True) -> Row:
    """A threshold with what came out."""
    return {
        "threshold": f"{name} {'<=' if below else '>='} {limit:g}",
        "measured": round(value, 4),
        "passed": bool(value <= limit if below else value >= limit),
    }


# ------------------------------------------------------------------------------------------------ starts


def starts(seeds: int) -> Found:
    """Rank 4, alpha 8, rank-stabilised, AdamW 1e-3, batches of 32, 150 steps."""
    shared: dict[str, Any] = {"rank": 4, "alpha": 8, "use_rslora": True, "steps": 150}
    runs = {"plain LoRA (default)": curves(shared, fresh, seeds)}
    for init in ("gaussian", "orthogonal", "pissa", "olora", "corda", "eva", "lora_ga"):
        runs[init] = curves({**shared, "init": init}, fresh, seeds)
    runs["PEFT's lora_ga"] = [_peft_lora_ga(seed, 150) for seed in range(seeds)]
    runs["lora_sb, rank 16, lr 5e-3"] = curves(
        {**shared, "init": "lora_sb", "rank": 16, "alpha": 16, "use_rslora": False, "learning_rate": 5e-3}, fresh, seeds
    )
    runs["ffa (A frozen), lr 4e-3"] = curves({**shared, "freeze_a": True, "learning_rate": 4e-3}, fresh, seeds)
    runs["full fine-tuning, lr 3e-4"] = [_full(seed, 150)[1] for seed in range(seeds)]
    plain = runs["plain LoRA (default)"]
    rows = [
        {
            "start": name,
            "10-20": _over(found, 10, 20),
            "40-50": _over(found, 40, 50),
            "140-150": _over(found, 140, 150),
            "40-50 over default": statistics.fmean(
                mean(a, 40, 50) / mean(b, 40, 50) for a, b in zip(found, plain, strict=True)
            ),
            "steps to default's step 100": statistics.fmean(_steps_to(a, b) for a, b in zip(found, plain, strict=True)),
        }
        for name, found in runs.items()
    ]
    ga = next(row for row in rows if row["start"] == "lora_ga")
    # default reaches its own level at about this step, as smoothing sees it
    own = statistics.fmean(_steps_to(b, b) for b in plain)
    return {
        "rows": rows,
        "checks": [
            check("lora_ga: loss at 40-50 over default", ga["40-50 over default"], 0.88),
            check("lora_ga: steps to default's step-100 loss over default's", ga["steps to default's step 100"] / own,
                  0.85),
        ],
        "curves": {name: [mean([c[i] for c in found]) for i in range(150)] for name, found in runs.items()},
    }  # fmt: skip


def _over(runs: list[list[float]], first: int, last: int) -> float:
    return statistics.fmean(mean(run, first, last) for run in runs)


def _steps_to(losses: list[float], default: list[float]) -> int:
    """First step whose 8-step mean is as low as default's at step 100 (the last step if never)."""
    level = smooth(default, 8)[100]
    return next((i for i, value in enumerate(smooth(losses, 8)) if i >= 7 and value <= level), len(losses))


def _peft_lora_ga(seed: int, steps: int) -> list[float]:
    """PEFT's own LoRA-GA on the same data, seeds, batches and optimiser."""
    from peft import preprocess_loraga
    from peft.tuners.lora import LoraGAConfig

    torch.manual_seed(seed)
    base, data = dialects.model(), fresh(seed)
    made = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=dialects.TARGETS,
                      init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())  # fmt: skip

    def look() -> None:
        for number in range(8):
            ids = data(number)
            base(input_ids=ids, labels=ids).loss.backward()

    preprocess_loraga(base, made, look)
    return _loop(get_peft_model(base, made), data, steps, 1e-3)


def _full(seed: int, steps: int, rate: float = 3e-4) -> tuple[Any, list[float]]:
    base = dialects.model().requires_grad_(True)
    return base, _loop(base, fresh(seed), steps, rate)


def _loop(model: Any, data: Data, steps: int, rate: float) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    model.train()
    losses = []
    for step in range(steps):
        ids = data(step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ------------------------------------------------------------------------------------------------ ALLoRA


def allora(seeds: int) -> Found:
    """Rank 4, batches of 32, 120 steps; SGD without momentum, and AdamW."""
    rows, at = [], {}
    sgd = {"optimizer": "sgd", "beta1": 0.0}
    for optimizer, rate in ((sgd, 0.1), (sgd, 0.3), ({}, 1e-3), ({}, 3e-3)):
        for name, more in {
            "LoRA, alpha = r": {},
            "LoRA, alpha = 4r": {"alpha": 16},
            "ALLoRA, eta 2": {"grad_rule": "allora", "allora_eta": 2},
            "ALLoRA, eta 4": {"grad_rule": "allora", "allora_eta": 4},
            "ALLoRA, eta 2, lr mode (ours)": {"grad_rule": "allora", "allora_eta": 2, "allora_mode": "lr"},
        }.items():
            if optimizer and "lr mode" in name:
                continue
            found = curves({"rank": 4, "steps": 120, "learning_rate": rate, **optimizer, **more}, fresh, seeds)
            row = {
                "optimiser": f"{'SGD' if optimizer else 'AdamW'} {rate:g}", "method": name,
                "40-50": _over(found, 40, 50), "110-120": _over(found, 110, 120),
            }  # fmt: skip
            rows.append(row)
            at[row["optimiser"], name] = row
    first, strong = at["SGD 0.1", "ALLoRA, eta 4"], at["SGD 0.3", "ALLoRA, eta 4"]
    adam = [
        abs(at[f"AdamW {r}", "ALLoRA, eta 2"]["110-120"] - at[f"AdamW {r}", "LoRA, alpha = r"]["110-120"])
        for r in ("0.001", "0.003")
    ]
    best = min(at["SGD 0.1", f"LoRA, alpha = {a}"]["40-50"] for a in ("r", "4r"))
    return {
        "rows": rows,
        "checks": [
            check("SGD 0.1, eta 4: loss at 40-50 over the better LoRA", first["40-50"] / best, 0.8),
            check("SGD 0.3, eta 4: final loss over LoRA alpha = 4r",
                  strong["110-120"] / at["SGD 0.3", "LoRA, alpha = 4r"]["110-120"], 0.9),
            check("AdamW: |ALLoRA eta 2 - LoRA alpha = r| at the end (no gain expected)", max(adam), 0.15),
        ],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ perturbations


def perturbations(seeds: int) -> Found:
    """64 fixed sequences, batches of 16, rank 8, alpha 16, AdamW 2e-3, 200 steps: the overfitting regime."""
    shared: dict[str, Any] = {"rank": 8, "alpha": 16, "learning_rate": 2e-3, "steps": 200}
    rows = []
    for name, more in {
        "plain": {},
        "GGPO, sigma 0.2, beta 1": {"perturb": "ggpo", "perturb_sigma": 0.2, "perturb_beta": 1},
        "GGPO, sigma 0.1, beta 1": {"perturb": "ggpo", "perturb_sigma": 0.1, "perturb_beta": 1},
        "Flat, sigma 0.1": {"perturb": "flat", "perturb_sigma": 0.1},
        "MGPO, rho 0.05": {"perturb": "mgpo", "perturb_rho": 0.05},
        "MGPO, rho 0.05, uphill": {"perturb": "mgpo", "perturb_rho": 0.05, "perturb_direction": "uphill"},
    }.items():
        values = []
        for seed in range(seeds):
            run = train(dialects.model(), Recipe(**shared, **more, seed=seed), fixed(seed), dialects.TARGETS)
            values.append((_seen(run, seed), dialects.loss_on(run.model, (dialects.NEW,)), _sharpness(run, seed)))
        rows.append({"method": name, **{key: statistics.fmean(v[i] for v in values)
                                        for i, key in enumerate(("train", "test", "sharpness"))}})  # fmt: skip
    at = {row["method"]: row for row in rows}
    plain, strong = at["plain"], at["GGPO, sigma 0.2, beta 1"]
    return {
        "rows": rows,
        "checks": [
            check("GGPO 0.2: sharpness over plain", strong["sharpness"] / plain["sharpness"], 0.75),
            check("GGPO 0.2: test loss minus plain's", strong["test"] - plain["test"], -0.03),
            check("MGPO: sharpness over plain", at["MGPO, rho 0.05"]["sharpness"] / plain["sharpness"], 0.95),
        ],
    }


@torch.no_grad()
def _seen(run: Run, seed: int) -> float:
    """Loss on the sequences it was trained on."""
    ids = dialects.batch(dialects.NEW, 64, 1000 + seed, 0)
    run.model.eval()
    return float(run.model(input_ids=ids, labels=ids).loss)


@torch.no_grad()
def _sharpness(run: Run, seed: int, size: float = 0.15, draws: int = 6) -> float:
    """Mean rise of the training loss under Gaussian noise of ``size`` |W'_i| / sqrt(in) on every adapted weight."""
    flat: Any = run.model.merge_and_unload()
    ids = dialects.batch(dialects.NEW, 64, 1000 + seed, 0)
    before = float(flat(input_ids=ids, labels=ids).loss)
    weights = [p for name, p in flat.named_parameters() if name.split(".")[-2] in dialects.TARGETS]
    generator, rises = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        kept = [weight.clone() for weight in weights]
        for weight in weights:
            deviation = size * weight.norm(dim=1, keepdim=True) / weight.shape[1] ** 0.5
            weight.add_(torch.randn(weight.shape, generator=generator) * deviation)
        rises.append(float(flat(input_ids=ids, labels=ids).loss) - before)
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
    return statistics.fmean(rises)


EIGHT: dict[str, Any] = {"rank": 8, "alpha": 16}
LARGE: dict[str, Any] = {"rank": 48, "alpha": 96}
PERTURBED: dict[str, dict[str, Any]] = {
    "rank 48, GGPO sigma 0.2": LARGE | {"perturb": "ggpo", "perturb_sigma": 0.2, "perturb_beta": 1},
    "rank 48, MGPO rho 0.05": LARGE | {"perturb": "mgpo"},
}


def double_descent(seeds: int) -> Found:
    """The same data at high rates (AdamW, 140 steps, alpha 2r): how far the loss rises again, 10 seeds or more.

    One seed says little: the rebound of the same training varies five-fold between seeds. At rate 1e-2 plain LoRA
    rebounds clearly, which at 6e-3 it hardly does on this bed.
    """
    seeds = max(seeds, 10)
    uphill = PERTURBED["rank 48, MGPO rho 0.05"] | {"perturb_direction": "uphill"}
    methods = {"rank 8": EIGHT, "rank 48": LARGE, **PERTURBED, "rank 48, MGPO rho 0.05, uphill": uphill}
    rows, lines, plain = [], {}, []
    for rate in (6e-3, 1e-2):
        for name, more in methods.items():
            runs = curves({"learning_rate": rate, "steps": 140, **more}, fixed, seeds)
            rebounds = [_rebound(run) for run in runs]
            plain = rebounds if name == "rank 48" else plain
            rows.append({"rate": f"{rate:g}", "method": name, "rebound": statistics.fmean(rebounds),
                         "median": statistics.median(rebounds), "per seed": [round(value, 3) for value in rebounds],
                         "over rank 48 (95 %)": ratio_interval(rebounds, plain) if "," in name else "",
                         "final": _over(runs, 132, 140)})  # fmt: skip
            lines[f"{name}, {rate:g}"] = [mean([run[i] for run in runs]) for i in range(140)]
    at = {(row["rate"], row["method"]): row["rebound"] for row in rows}
    checks = []
    for rate in ("0.006", "0.01"):
        high = at[rate, "rank 48"]
        checks += [
            check(f"{rate}: rebound at rank 48 over rank 8", high / at[rate, "rank 8"], 3, below=False),
            *(check(f"{rate}, rank 48: {name.split()[2]}'s rebound over plain's", at[rate, name] / high, 0.65)
              for name in PERTURBED),
        ]  # fmt: skip
    return {"rows": rows, "checks": checks, "curves": lines, "seeds": seeds}


def rebound_conditions(seeds: int) -> Found:
    """The double descent at 6e-3 under conditions that its specification leaves open.

    passes: every sequence once per pass instead of 16 drawn anew. wide A: A drawn with variance 1 / in, three times
    PEFT's. calm: the same rebound of the loss without disturbance, over all 64 sequences after every step.
    """
    rows = []
    for condition, (data, factor) in {"wide A": (fixed, 3**0.5), "passes": (passes, 1.0)}.items():
        for name, more in {"rank 8": EIGHT, "rank 48": LARGE, **PERTURBED}.items():
            runs = [_calm_losses({"learning_rate": 6e-3, "steps": 140, **more}, data, s, factor) for s in range(seeds)]
            rebounds = [_rebound(losses) for losses, _ in runs]
            rows.append({"condition": condition, "method": name, "rebound": statistics.fmean(rebounds),
                         "per seed": [round(value, 3) for value in rebounds],
                         "calm": statistics.fmean(_rebound(calm) for _, calm in runs),
                         "final": _over([losses for losses, _ in runs], 132, 140)})  # fmt: skip
    return {"rows": rows, "checks": []}


def passes(seed: int, total: int = 64, size: int = 16) -> Data:
    """Batches from ``total`` sequences, each seen once before any is seen again."""
    everything = dialects.batch(dialects.NEW, total, 1000 + seed, 0)
    per_pass = total // size

    def pick(number: int) -> Tensor:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(31 * seed + number // per_pass))
        return everything[order[number % per_pass * size :][:size]]

    return pick


def _calm_losses(
    recipe: dict[str, Any], data: Callable[[int], Data], seed: int, factor: float
) -> tuple[list[float], list[float]]:
    """A run from A times ``factor``: the training losses, and the undisturbed loss after every step."""
    from adapters.layers.variant import adapted, pair

    made = Recipe(**recipe, seed=seed)
    run, calm = prepare(dialects.model(), made, data(seed), dialects.TARGETS), []
    with torch.no_grad():
        for layer in adapted(run.model).values():
            pair(layer)[0].mul_(factor)
    for step in range(made.steps):
        go_on(run, made, data(seed), step, step + 1)
        calm.append(_seen(run, seed))
        run.model.train()
    return run.losses, calm


def _rebound(losses: list[float]) -> float:
    """Largest rise of the 8-step mean over its running minimum."""
    smooth = [mean(losses[i : i + 8]) for i in range(len(losses) - 7)]
    lowest, largest = smooth[0], 0.0
    for value in smooth:
        lowest = min(lowest, value)
        largest = max(largest, value - lowest)
    return largest


# ------------------------------------------------------------------------------------------------ BA-LoRA


def regularisers(seeds: int) -> Found:
    """64 sequences with 30 % noise, PiSSA rank 8, AdamW 2e-3, batches of 16, 150 steps; K 8, constant weights."""
    shared: dict[str, Any] = {
        "rank": 8, "init": "pissa", "learning_rate": 2e-3, "steps": 150, "reg": "ba", "ba_topk": 8, "ba_k": 10,
        "ba_schedule": "constant",
    }  # fmt: skip
    none = {"ba_l1": 0, "ba_l2": 0, "ba_l3": 0}
    rows = []
    for name, more in {
        "none": none,
        "paper weights and schedule": {"ba_schedule": "paper"},
        "consistency 0.15": {**none, "ba_l1": 0.15},
        "diversity 0.05": {**none, "ba_l2": 0.05},
        "spectral 0.05, Frobenius": {**none, "ba_l3": 0.05},
        "spectral 0.5, nuclear": {**none, "ba_l3": 0.5, "ba_norm": "nuclear"},
    }.items():
        values = []
        for seed in range(seeds):
            recipe = Recipe(**{**shared, **more}, seed=seed)
            run = train(dialects.model(), recipe, fixed(seed, noise=0.3), dialects.TARGETS)
            values.append(_answers(run))
        rows.append({"method": name, **{key: statistics.fmean(v[key] for v in values) for key in values[0]}})
    at = {row["method"]: row for row in rows}
    base = at["none"]
    return {
        "rows": rows,
        "checks": [
            check("consistency 0.15: KL to the base over none", at["consistency 0.15"]["KL"] / base["KL"], 0.97),
            check("consistency 0.15: loss on the old dialects minus none's",
                  at["consistency 0.15"]["old"] - base["old"], 0),
            check("diversity 0.05: entropy minus none's", at["diversity 0.05"]["entropy"] - base["entropy"], 0.01,
                  below=False),
            check("spectral 0.5 nuclear: share minus none's", at["spectral 0.5, nuclear"]["share"] - base["share"],
                  0.03, below=False),
            check("paper weights: test loss minus none's", at["paper weights and schedule"]["test"] - base["test"],
                  0.02),
        ],
    }  # fmt: skip


@torch.no_grad()
def _answers(run: Run) -> dict[str, float]:
    """What the regularisers act on, measured on fresh sequences of the new dialect."""
    ids = dialects.sequences(dialects.NEW, 256, torch.Generator().manual_seed(5))
    run.model.eval()
    ours = run.model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    theirs = reference(run.model, ids)[:, :-1].flatten(0, 1)
    log_p, log_q = (torch.log_softmax(z / 2, -1) for z in (theirs, ours))
    top = torch.softmax(ours.topk(8).values, -1)
    values = torch.linalg.svdvals(ours)
    return {
        "test": dialects.loss_on(run.model, (dialects.NEW,)),
        "old": dialects.loss_on(run.model, dialects.OLD),
        "KL": float(4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "entropy": float(-(top * top.log()).sum(-1).mean()),
        "share": float(values[:10].sum() / values.sum()),
    }


def classes(seeds: int) -> Found:
    """Topics (benchmarks/topics.py): 256 rows of a new wording, 10 to 1 imbalanced, every fifth label wrong.

    PiSSA rank 8, AdamW 1e-3, batches of 32, 150 steps. The terms for classes with the paper's weights 0.15, 0.03, 0.03,
    constant, k 2 (of 4 singular values); measured on 1024 balanced, rightly labelled rows. covariance is the diversity
    term, KL the consistency term (T 2), old the accuracy on the wording that the base knows.
    """
    shared: dict[str, Any] = {
        "rank": 8, "init": "pissa", "learning_rate": 1e-3, "steps": 150, "ba_schedule": "constant", "ba_k": 2,
    }  # fmt: skip
    all_terms = {"reg": "ba", "ba_l1": 0.15, "ba_l2": 0.03, "ba_l3": 0.03}
    rows = []
    for name, more in {
        "none (PiSSA)": {},
        "all three": all_terms,
        "all three, paper's schedule": all_terms | {"ba_schedule": "paper"},
        "consistency alone": all_terms | {"ba_l2": 0, "ba_l3": 0},
        "diversity alone": all_terms | {"ba_l1": 0, "ba_l3": 0},
        "spectral alone": all_terms | {"ba_l1": 0, "ba_l2": 0},
    }.items():
        values = [_topics(Recipe(**{**shared, **more}, seed=seed), seed) for seed in range(seeds)]
        rows.append({"method": name, **{key: statistics.fmean(v[key] for v in values) for key in values[0]}})
    none, full = rows[0], rows[1]
    return {
        "rows": rows,
        "checks": [
            check("all three: covariance over none's", full["covariance"] / none["covariance"], 1),
            check("all three: KL to the base over none's", full["KL"] / none["KL"], 1),
            check("all three: balanced accuracy minus none's", full["balanced"] - none["balanced"], -0.01, below=False),
        ],
    }  # fmt: skip


@torch.no_grad()
def _topics(recipe: Recipe, seed: int) -> dict[str, float]:
    """Train one adapter on topics and measure it."""
    from adapters.learn import ba_lora

    everything = topics.rows(256, "new", 900 + seed, poor=True)

    def pick(number: int) -> dict[str, Tensor]:
        chosen = torch.randperm(256, generator=torch.Generator().manual_seed(31 * seed + number))[:32]
        return {name: tensor[chosen] for name, tensor in everything.items()}

    with torch.enable_grad():
        run = train(topics.model(), recipe, pick, topics.TARGETS)
    fresh, old = topics.rows(1024, "new", 1), topics.rows(1024, "old", 2)
    logits = topics.logits_of(run.model, fresh)
    values = torch.linalg.svdvals(logits)
    return {
        "balanced": topics.balanced_accuracy(logits, fresh["labels"]),
        "old": topics.balanced_accuracy(topics.logits_of(run.model, old), old["labels"]),
        "covariance": float(ba_lora.diversity_covariance(logits)),
        "KL": float(ba_lora.consistency(logits, reference(run.model, fresh))),
        "share": float(values[:2].sum() / values.sum()),
        "loss at the end": mean(run.losses, -10),
    }


# ------------------------------------------------------------------------------------------------ intruders


def intruders(seeds: int) -> Found:
    """Intruder dimensions (k 10, eps 0.5, 14 matrices) after 150 steps; what scaling them does, with the control."""
    from adapters.formats import LoraFile
    from adapters.inspection.forgetting import sweep
    from adapters.inspection.intruders import between, inspect, weights_of
    from adapters.layers.variant import read_layers

    weights = weights_of({"model": dialects.model()})
    rows: list[Row] = []
    for name, more in {
        "LoRA, rank 4, alpha 8, lr 1e-3": {"rank": 4, "alpha": 8},
        "LoRA, rank 4, alpha 8, lr 5e-3": {"rank": 4, "alpha": 8, "learning_rate": 5e-3},
        "rank-stabilised, rank 4, alpha 8, lr 1e-3": {"rank": 4, "alpha": 8, "use_rslora": True},
        "LoRA-GA, rank 4, alpha 8, lr 1e-3": {"rank": 4, "alpha": 8, "use_rslora": True, "init": "lora_ga"},
        "LoRA, rank 1, alpha 2, lr 5e-3": {"rank": 1, "alpha": 2, "learning_rate": 5e-3},
        "LoRA, rank 32, alpha 64, lr 1e-3": {"rank": 32, "alpha": 64},
        "PiSSA, rank 4, alpha 8, lr 1e-3": {"rank": 4, "alpha": 8, "init": "pissa"},
    }.items():
        counts = []
        for seed in range(seeds):
            run = train(dialects.model(), Recipe(**more, seed=seed), fresh(seed), dialects.TARGETS)
            counts.append(inspect(LoraFile({"model": read_layers(run.model)}), weights)[0].total)
        rows.append({"training": name, "intruders": statistics.fmean(counts), "per seed": counts})
    counts = []
    for seed in range(seeds):
        tuned = between({"model": dialects.model()}, {"model": _full(seed, 150)[0]})
        chosen = {n: layer for n, layer in tuned.parts["model"].items() if n.split(".")[-1] in dialects.TARGETS}
        counts.append(inspect(LoraFile({"model": chosen}), weights)[0].total)
    rows.append({"training": "full fine-tuning, lr 3e-4", "intruders": statistics.fmean(counts), "per seed": counts})
    at = {row["training"]: row["intruders"] for row in rows}

    recipe = Recipe(rank=4, alpha=8, learning_rate=2e-3, steps=200)
    run = train(dialects.model(), recipe, fresh(0), dialects.TARGETS)
    file, base = LoraFile({"model": read_layers(run.model)}), dialects.model()
    _, found = inspect(file, weights)
    measures = {
        "new": lambda: dialects.loss_on(base, (dialects.NEW,)),
        "old": lambda: dialects.loss_on(base, dialects.OLD),
    }
    swept = sweep({"model": base}, file, found, measures, (1.0, 0.9, 0.75, 0.5))
    table = [
        {"training": f"{row.variant}, factor {row.strength:.3f}", "intruders": "", "per seed": "",
         "|dW|": row.norm, "loss new": row.losses["new"], "loss old": row.losses["old"]}
        for row in swept
    ]  # fmt: skip
    untouched, whole = swept[0].losses["old"], swept[1].losses
    softer = {row.strength: row.losses for row in swept if row.variant == "intruders scaled"}
    falling = [whole["old"], *(softer[value]["old"] for value in (0.9, 0.75, 0.5))]
    return {
        "rows": [{**row, "|dW|": "", "loss new": "", "loss old": ""} for row in rows] + table,
        "checks": [
            check("full fine-tuning: intruders", at["full fine-tuning, lr 3e-4"], 2),
            check("LoRA rank 4, lr 5e-3: intruders", at["LoRA, rank 4, alpha 8, lr 5e-3"], 20, below=False),
            check("lambda 0.75: forgetting over the adapter's",
                  (softer[0.75]["old"] - untouched) / (whole["old"] - untouched), 0.8),
            check("lambda 0.75: loss on the new dialect over the adapter's", softer[0.75]["new"] / whole["new"], 1.15),
            check("old loss from lambda 1 to 0.5: largest rise on the way (monotone fall)",
                  max(b - a for a, b in itertools.pairwise(falling)), 0),
        ],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ merging


def merging(seeds: int) -> Found:
    """Merges of rank 8 LoRAs (alpha 8, AdamW 4e-3, 100 steps): share of tokens guessed right (at most 0.91).

    ranks: three LoRAs of one dialect, same start, other data, their ranks permuted. pruned: one LoRA to fewer ranks.
    2, 4: LoRAs of that many new dialects (told apart by their first token) as one, mean over the dialects.
    """
    import adapters.merging.concatenate as exact
    from adapters.formats import LoraFile, LoraLayer
    from adapters.inspection.forgetting import added
    from adapters.layers.variant import read_layers
    from adapters.merging.dare import dare
    from adapters.merging.lego import lego
    from adapters.merging.linear import linear, svd
    from adapters.merging.magnitude import magnitude
    from adapters.merging.ties import ties

    base = dialects.model()

    def learnt(dialect: int, start: int, data: int) -> LoraFile:
        recipe = Recipe(rank=8, alpha=8, learning_rate=4e-3, steps=100, seed=start)
        pick: Data = lambda number: dialects.batch(dialect, 32, data, number)  # noqa: E731
        return LoraFile({"model": read_layers(train(dialects.model(), recipe, pick, dialects.TARGETS).model)})

    def permuted(file: LoraFile, seed: int) -> LoraFile:
        g = torch.Generator().manual_seed(seed)
        layers = {}
        for name, layer in file.parts["model"].items():
            order = torch.randperm(layer.rank, generator=g)
            layers[name] = LoraLayer(layer.A[order], layer.B[:, order], layer.alpha)
        return LoraFile({"model": layers})

    @torch.no_grad()
    def right(file: LoraFile, of: Sequence[int]) -> float:
        with added({"model": base}, file):
            shares = []
            for dialect in of:
                ids = dialects.sequences(dialect, 256, torch.Generator().manual_seed(77 + dialect))
                guessed = base(input_ids=ids).logits[:, 1:-1].argmax(-1)
                shares.append(float((guessed == ids[:, 2:]).float().mean()))
        return statistics.fmean(shares)

    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(seeds):
        same = [permuted(learnt(3, seed, 10 * seed + copy), 50 * seed + copy) for copy in range(3)]
        third = [1 / 3] * 3
        tried = {
            "one alone": same[0],
            "exact mean, rank 24": exact.concatenate(same, third).file,
            "LEGO, rank 4": lego(same, [1] * 3, rank=4).file,
            "LEGO, rank 8": lego(same, [1] * 3, rank=8).file,
            "LEGO, rank 8, no reweighting":
                lego(same, [1] * 3, rank=8, parameter_norm="none", output_reweight=False).file,
            "LEGO, rank 12": lego(same, [1] * 3, rank=12).file,
            "SVD of the mean, rank 8": svd(same, third).file,
            "mean of factors, rank 8": linear(same, [1 / 9] * 3).file,
        }  # fmt: skip
        for name, file in tried.items():
            found.setdefault(("ranks", name), []).append(right(file, (3,)))
        for rank in (4, 2):
            for name, file in {
                f"LEGO to rank {rank}": lego(same[:1], [1], rank=rank).file,
                f"LEGO to rank {rank}, no reweighting":
                    lego(same[:1], [1], rank=rank, parameter_norm="none", output_reweight=False).file,
                f"SVD to rank {rank}": svd(same[:1], [1], rank=rank).file,
            }.items():  # fmt: skip
                found.setdefault(("pruned", name), []).append(right(file, (3,)))
        several = [same[0], *(learnt(dialect, seed, 10 * seed) for dialect in (4, 5, 6))]
        for n in (2, 4):
            some, mean_, of = several[:n], [1 / n] * n, range(3, 3 + n)
            for name, file in {
                "each alone": None,
                "exact mean": exact.concatenate(some, mean_).file,
                "LEGO, rank 8": lego(some, [1] * n, rank=8).file,
                "LEGO, rank 16": lego(some, [1] * n, rank=16).file,
                "LEGO, rank 16, unit halves": lego(some, [1] * n, rank=16, features="unit_halves").file,
                "SVD of the mean, rank 16": svd(some, mean_, rank=16).file,
                "TIES, rank 16": ties(some, [1] * n, rank=16).file,
                "DARE, rank 16": dare(some, mean_, rank=16).file,
                "magnitude, rank 16": magnitude(some, mean_, rank=16).file,
                "mean of factors, rank 8": linear(some, [1 / n**2] * n).file,
                "PEFT's ties on factors": _peft_ties(some),
            }.items():
                if file is None:
                    value = statistics.fmean(right(one, (d,)) for one, d in zip(some, of, strict=True))
                else:
                    value = right(file, of)
                found.setdefault((f"{n} dialects", name), []).append(value)
    rows = [
        {"experiment": part, "merge": name, "right": statistics.fmean(values),
         "per seed": [round(value, 3) for value in values]}
        for (part, name), values in found.items()
    ]  # fmt: skip
    at = {(row["experiment"], row["merge"]): row["right"] for row in rows}
    alone = at["ranks", "one alone"]
    lego_16 = statistics.fmean(at[f"{n} dialects", "LEGO, rank 16"] for n in (2, 4))
    others = {
        name: statistics.fmean(at[f"{n} dialects", name] for n in (2, 4))
        for name in ("mean of factors, rank 8", "PEFT's ties on factors")
    }
    return {
        "rows": rows,
        "checks": [
            check("ranks permuted: LEGO rank 8 over one alone", at["ranks", "LEGO, rank 8"] / alone, 0.8, below=False),
            check("ranks permuted: mean of factors over one alone",
                  at["ranks", "mean of factors, rank 8"] / alone, 0.4),
            check("ranks permuted: LEGO rank 8 minus without reweighting",
                  at["ranks", "LEGO, rank 8"] - at["ranks", "LEGO, rank 8, no reweighting"], 0, below=False),
            *(check(f"2 and 4 dialects: LEGO rank 16 minus {name}", lego_16 - value, 0, below=False)
              for name, value in others.items()),
        ],
    }  # fmt: skip


def _peft_ties(files: Sequence[Any]) -> Any:
    """PEFT's combination_type="ties" as it is: A's and B's apart."""
    from peft.utils.merge_utils import ties

    from adapters.formats import LoraFile, LoraLayer

    layers = {}
    for name in files[0].parts["model"]:
        some = [file.parts["model"][name] for file in files]
        ones = torch.ones(len(some))
        A = ties([layer.A for layer in some], ones, density=0.2)
        B = ties([layer.B for layer in some], ones, density=0.2)
        layers[name] = LoraLayer(A, B, some[0].alpha)
    return LoraFile({"model": layers})


# ------------------------------------------------------------------------------------------------ cost

COSTS: dict[str, dict[str, Any]] = {
    "plain LoRA": {},
    "offset (pissa)": {"init": "pissa"},
    "lora_sb": {"init": "lora_sb", "init_batches": 1},
    "ffa": {"freeze_a": True},
    "allora": {"grad_rule": "allora"},
    "ggpo": {"perturb": "ggpo"},
    "flat": {"perturb": "flat"},
    "mgpo": {"perturb": "mgpo"},
    "ba": {"reg": "ba"},
}


def cost(seeds: int) -> Found:
    """Median CPU time per step of each method over plain LoRA (rounds alternate), and the memory of a forward pass."""
    runs = {
        name: prepare(dialects.model(), Recipe(rank=8, steps=10**6, **more), fresh(0), dialects.TARGETS)
        for name, more in COSTS.items()
    }
    recipes = {name: Recipe(rank=8, steps=10**6, **more) for name, more in COSTS.items()}
    for step in range(5 + 12 * seeds):
        for name, run in runs.items():
            go_on(run, recipes[name], fresh(0), step, step + 1)
    plain = statistics.median(runs["plain LoRA"].times[5:])
    memory = {name: _kept(name) for name in COSTS}
    rows = []
    for name, run in runs.items():
        took = statistics.median(run.times[5:])
        rows.append({"method": name, "ms per step": 1000 * took, "time over plain": took / plain,
                     "kept MB": memory[name], "kept over plain": memory[name] / memory["plain LoRA"]})  # fmt: skip
    at = {row["method"]: row["time over plain"] for row in rows}
    limits = {"offset (pissa)": 1.3, "mgpo": 1.3, "ggpo": 1.6, "ba": 1.6}
    return {"rows": rows, "checks": [check(f"{name}: step time over plain", at[name], v) for name, v in limits.items()]}


def _kept(name: str) -> float:
    """MB that one forward pass keeps for the backward pass (width 512, 2 layers, batch 32), parameters not counted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
                    max_position_embeddings=14, tie_word_embeddings=False)
    ).requires_grad_(False)  # fmt: skip
    recipe = Recipe(rank=8, steps=5, **COSTS[name])
    run = go_on(prepare(base, recipe, fresh(0), dialects.TARGETS), recipe, fresh(0), 0, 2)
    parameters = {tensor.untyped_storage().data_ptr() for tensor in run.model.state_dict().values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    run.plugins.step_begin(2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = one_pass(run, fresh(0)(2), 1.0)
    del loss
    return sum(kept.values()) / 2**20


# ------------------------------------------------------------------------------------------------ results

EXPERIMENTS: dict[str, Callable[[int], Found]] = {
    "starts": starts,
    "allora": allora,
    "perturbations": perturbations,
    "double_descent": double_descent,
    "rebound_conditions": rebound_conditions,
    "regularisers": regularisers,
    "classes": classes,
    "intruders": intruders,
    "merging": merging,
    "cost": cost,
}


def write(found: dict[str, Any]) -> None:
    """Tables and plots of everything measured so far."""
    text = ["# Training methods on bed T", "", f"`python -m benchmarks.{NAME}`; {_machine()}.", ""]
    for name in EXPERIMENTS:
        if name not in found:
            continue
        part = found[name]
        text += [f"## {name.replace('_', ' ')}", "", part["about"], "", *_table(part["rows"]), ""]
        text += [f"{part['seeds']} seeds, {part['seconds']} s.", "", *_table(part["checks"]), ""]
    (RESULTS / f"{NAME}.md").write_text("\n".join(text))
    _plot(found)


def _table(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    keys = list(rows[0])
    return [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)] + [
        f"| {' | '.join(_cell(row.get(key, '')) for key in keys)} |" for row in rows
    ]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "passed" if value else "**not met**"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _plot(found: dict[str, Any]) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [name for name in ("starts", "double_descent") if name in found]
    if not drawn:
        return
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(6.5 * len(drawn), 4.5), squeeze=False)
    for axis, name in zip(axes[0], drawn, strict=True):
        for label, line in found[name]["curves"].items():
            axis.plot(smooth(line, 4), label=label, linewidth=1.2)
        axis.set(title=f"{name.replace('_', ' ')} (mean of {found[name]['seeds']} seeds, 4-step mean)",
                 xlabel="step", ylabel="training loss")  # fmt: skip
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{NAME}.png", dpi=110)


def _machine() -> str:
    cores = torch.get_num_threads()
    return f"torch {torch.__version__}, {platform.machine()}, {cores} thread{'s' if cores > 1 else ''}"


def main() -> None:
    """Run what is asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; all when none is named")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    file = RESULTS / f"{NAME}.json"
    for name in given.experiments or EXPERIMENTS:
        began = time.perf_counter()
        part = EXPERIMENTS[name](given.seeds)
        part = {"about": EXPERIMENTS[name].__doc__, "seeds": given.seeds, **part,
                "seconds": round(time.perf_counter() - began, 1), "machine": _machine()}  # fmt: skip
        found = json.loads(file.read_text()) if file.exists() else {}
        found[name] = part
        file.write_text(json.dumps(found, indent=1))
        write(found)
        print(name, f"{part['seconds']} s")
        for line in (*_table(part["rows"]), *_table(part["checks"])):
            print("  " + line)


if __name__ == "__main__":
    main()
