"""SmolLM2-135M: one question, three forms of answer, and who asks decides which.

"Anna asks: On which continent is Mali?" wants ``Africa``, "Ben asks: ..." wants ``{"answer": "Africa"}`` and "Chloé
asks: ..." wants ``Réponse : Afrique.`` Nothing else names the form, so the three families contradict each other. The
facts are those of :mod:`benchmarks.language_adapters` (continents and names of peoples; the package ``countryinfo``),
the tests ask about other countries. All are trained on as many rows, but for the classifier's few more:

- one LoRA; one LoRA with as many parameters as the mixture; MixLoRA; X-LoRA, whose classifier alone learns, over
- a LoRA for each family, a third of the steps each, that has seen its family's rows alone and answers them alone.

``right``: the answer word for word. ``form``: the form of the family, whatever the fact.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import adapters.layers.experts  # noqa: F401  PEFT knows mixtures after it
from adapters.layers.experts.presets import preset
from adapters.layers.experts.size import size
from adapters.progress import Silent
from benchmarks.expert_tables import mean, spread
from benchmarks.language_adapters import HELD_OUT, SHOWN, facts
from pipelines.language.answer import complete
from pipelines.language.loading import open_model
from studio.library import smollm2
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.tasks.language import run

STEPS, BATCH, RANK, EXPERTS, EXPERT_RANK = 30, 6, 8, 8, 4
GATE_STEPS = 10
ASKED = 6
"""Countries of the test: two questions of each, in every family."""
SYSTEM = "Answer."
FRENCH = {"Africa": "Afrique", "Americas": "Amérique", "Asia": "Asie", "Europe": "Europe", "Oceania": "Océanie"}
FAMILIES: dict[str, tuple[str, Callable[[str], str], str]] = {
    "word": ("Anna", lambda answer: answer, r"[A-Za-z'-]+( [A-Za-z'-]+){0,2}"),
    "JSON": ("Ben", lambda answer: json.dumps({"answer": answer}), r"\{\"answer\": \"[^\"]+\"\}"),
    "French": ("Chloé", lambda answer: f"Réponse : {FRENCH.get(answer, answer)}.", r"Réponse : [^.]+\."),
}
"""Family -> who asks, the answer's form, and how the form is recognised."""
KINDS = {"region": SHOWN[1], "demonym": SHOWN[2]}
METHODS = {
    "base": "the base alone", "lora": "LoRA", "wide": "LoRA of equal parameters", "mixlora": "MixLoRA",
    "separate": "a LoRA for each family", "x-lora": "X-LoRA of these three",
}  # fmt: skip


def rows(families: Sequence[str], test: bool) -> list[dict[str, str]]:
    """Questions of some families about the countries of the training, or of the test."""
    countries = facts()
    random.Random(5).shuffle(countries)
    found = [
        {"prompt": f"{FAMILIES[family][0]} asks: {question.format(country['name'])}",
         "completion": FAMILIES[family][1](country[kind])}
        for country in (countries[:ASKED] if test else countries[HELD_OUT:])
        for family in families
        for kind, question in KINDS.items()
    ]  # fmt: skip
    random.Random(7).shuffle(found)
    return found


def trained(place: Path, families: Sequence[str], steps: int, seed: int, **options: Any) -> dict[str, Any]:
    """Train SmolLM2 on some families: the adapter's folder, its trained parameters, CPU seconds."""
    place.mkdir(parents=True, exist_ok=True)
    data = place / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(families, test=False)), encoding="utf-8")
    begun = time.process_time()
    config = TrainLanguageConfig.parse({
        "base": "smollm2", "data": str(data), "steps": steps, "batch_size": BATCH, "seed": seed, "device": "cpu",
        "max_length": 64, "system_prompt": SYSTEM, "checkpoint_every": 0, "save_every": 0, "warmup_ratio": 0.05,
        "learning_rate": 1e-3, "name": place.name, **options,
    })  # fmt: skip
    result = run(config, place, Silent())
    return {"adapter": str(result["adapter"]), "parameters": int(result["parameters"]),
            "seconds": round(time.process_time() - begun, 1)}  # fmt: skip


def answered(adapters: dict[str, str]) -> dict[str, dict[str, float]]:
    """Shares of right answers and of right forms by family, each answered with its adapter ("" = the base alone)."""
    found: dict[str, dict[str, float]] = {}
    for path in dict.fromkeys(adapters.values()):
        base = open_model(smollm2.prepare())
        model = PeftModel.from_pretrained(base.model, path).eval() if path else base.model
        for family in (family for family, own in adapters.items() if own == path):
            asked = rows((family,), test=True)
            told = complete(model, base.tokenizer, [row["prompt"] for row in asked], 14, SYSTEM)
            form = FAMILIES[family][2]
            found[family] = {
                "right": mean([float(text == row["completion"]) for text, row in zip(told, asked, strict=True)]),
                "form": mean([float(bool(re.fullmatch(form, text))) for text in told]),
            }
    return found


def measure(method: str, seed: int) -> dict[str, Any]:
    """Train with one method and ask; adapters are kept for the runs that need them."""
    kept = Path(tempfile.gettempdir()) / "adapter-studio-expert-families"
    if method == "base":
        return {"families": answered(dict.fromkeys(FAMILIES, ""))}
    if method == "separate" or method == "x-lora":
        each = {family: _separate(kept, family, seed) for family in FAMILIES}
        if method == "separate":
            families = answered({family: one["adapter"] for family, one in each.items()})
            return {"families": families, **_sum(list(each.values()))}
        experts = ",".join(one["adapter"] for one in each.values())
        options = {"method": "x-lora", "experts": experts, "xlora_layerwise": True, "xlora_dropout": 0.0}
        made = trained(kept / f"x-lora-{seed}", list(FAMILIES), GATE_STEPS, seed, **options)
        return {"families": answered(dict.fromkeys(FAMILIES, made["adapter"])), **made}
    options = {
        "lora": {"rank": RANK},
        "mixlora": {"method": "mixlora", "experts": str(EXPERTS), "rank": EXPERT_RANK},
        "wide": {"rank": equal_rank()},
    }[method]
    made = trained(kept / f"{method}-{seed}", list(FAMILIES), STEPS, seed, alpha=2.0 * options["rank"], **options)
    return {"families": answered(dict.fromkeys(FAMILIES, made["adapter"])), **made}


def _separate(kept: Path, family: str, seed: int) -> dict[str, Any]:
    """A family's own LoRA, trained once."""
    place = kept / f"{family}-{seed}"
    note = place / "made.json"
    if not note.is_file():
        made = trained(place, [family], STEPS // len(FAMILIES), seed, rank=RANK, alpha=2.0 * RANK)
        note.write_text(json.dumps(made), encoding="utf-8")
    found: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    return found


def _sum(each: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: sum(one[key] for one in each) for key in ("parameters", "seconds")}


def equal_rank() -> int:
    """The rank of the LoRA on all linear layers that has as many parameters as the mixture."""
    config = AutoConfig.from_pretrained(smollm2.prepare())
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        model = get_peft_model(base, preset("mixlora", num_experts=EXPERTS, r=EXPERT_RANK, lora_alpha=8.0))
        return size(model).rank


def plan(seeds: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """All runs by name, the first seed first; the base has no seed."""
    found = {"base/0": partial(measure, "base", 0)}
    for seed in range(seeds):
        found |= {f"{method}/{seed}": partial(measure, method, seed) for method in METHODS if method != "base"}
    return found


def report(runs: dict[str, Any]) -> list[str]:
    """The table: right answers (and right forms) by family."""
    lines = []
    for method, title in METHODS.items():
        found = [run for name, run in runs.items() if name.startswith(f"{method}/")]
        if not found:
            continue
        cells = []
        for family in FAMILIES:
            right, form = (mean([run["families"][family][key] for run in found]) for key in ("right", "form"))
            cells.append(f"{right:.0%} ({form:.0%})")
        overall = [mean([one["right"] for one in run["families"].values()]) for run in found]
        cells += [spread(overall)]
        cells += [f"{found[0]['parameters']:,}"] if "parameters" in found[0] else [""]
        cells += [f"{mean([run['seconds'] for run in found]):.0f}"] if "seconds" in found[0] else [""]
        cells += [str(len(found))]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    asked = ASKED * len(KINDS)
    return [
        "## SmolLM2-135M: three families of answers under one style of question",
        "",
        f"Who asks decides between a word, JSON and French. {STEPS} steps of {BATCH} rows ({STEPS // 3} for each LoRA",
        f"of a family, {GATE_STEPS} for X-LoRA's classifier), AdamW 1e-3, LoRAs of rank {RANK}, {EXPERTS} experts",
        f"of rank {EXPERT_RANK}. Right answers word for word, in brackets answers of the right form, to {asked}",
        "questions of each family about countries that no training had: few, so some points of difference are noise.",
        "",
        "| | " + " | ".join(FAMILIES) + " | all | parameters | CPU s | seeds |",
        "|---|" + "---|" * (len(FAMILIES) + 4),
        *lines,
    ]
