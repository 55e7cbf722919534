"""What experts are good for, on bed T (:mod:`benchmarks.contradictions`): the direction experiments of five papers.

- ``tasks``: tasks that contradict each other, LoRA against MixLoRA, LLaVA-MoLE and a dense mixture on the same layers,
  at equal rank and at equal parameters; how evenly experts are used with and without the balance loss; whether tasks
  that are learnt together are learnt as well as alone;
- ``routing``: how far LoRAMoE's constraint moves two types of rows apart;
- ``recall``: what is left of facts after learning new tasks, with LoRAMoE, a LoRA and full fine-tuning;
- ``mola``: expert allocations over eight layers;
- ``gates``: X-LoRA on three tasks, each with an expert of its own.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from adapters.layers.experts import MoeConfig, aux_loss, is_moe, load, sample_types, watched, xlora
from adapters.layers.experts.classifier import ClassifierOptions
from adapters.layers.experts.presets import preset
from adapters.layers.experts.redundancy import redundancy
from adapters.layers.experts.size import size
from adapters.layers.variant import read_layers
from benchmarks import contradictions, dialects
from benchmarks.contradictions import accuracies, learn, mixed

FFN = ["gate_proj", "up_proj", "down_proj"]
RATE, ROWS = 1e-2, 8
"""Learning rate of all adapters, and rows of each task in a batch."""

# ------------------------------------------------------------------------------------------------ contradicting tasks

SETTINGS: dict[str, dict[str, Any]] = {
    "3 tasks, rank 2": {"tasks": 3, "rank": 2, "experts": 3, "steps": 300, "informed": False},
    "6 tasks, rank 1": {"tasks": 6, "rank": 1, "experts": 4, "steps": 300, "informed": False},
    "6 tasks, rank 1, known first tokens": {"tasks": 6, "rank": 1, "experts": 6, "steps": 500, "informed": True},
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("", {}),
    "LoRA of equal parameters": ("", {}),
    "LLaVA-MoLE": ("llava-mole", {}),
    "LLaVA-MoLE, straight through": ("llava-mole", {"gate": "straight_through"}),
    "MixLoRA": ("mixlora", {}),
    "dense (LoRAMoE)": ("loramoe", {"aux_loss": "none"}),
}
UNBALANCED = {
    "MixLoRA without loss": ("mixlora", {"aux_coefficient": 0.0}),
    "LLaVA-MoLE without loss": ("llava-mole", {"aux_coefficient": 0.0}),
}


def mixture(method: str, rank: int, experts: Any, **more: Any) -> MoeConfig:
    """A preset on the feed-forward layers."""
    choices = {"r": rank, "lora_alpha": 2.0 * rank, "target_modules": FFN, "num_experts": experts, **more}
    return preset(method, **choices)


def lora(rank: int, **more: Any) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, **{"target_modules": FFN, **more})


def numbers(model: nn.Module) -> int:
    """Parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@cache
def base(tasks: int) -> LlamaForCausalLM:
    """The base of bed T (0), or the one that knows ``tasks`` first tokens; copy it before use."""
    return contradictions.informed(tasks) if tasks else dialects.model()


def contradicting(setting: str, method: str, seed: int, alone: int | None = None) -> dict[str, Any]:
    """One method on all tasks of a setting, or on one of them."""
    chosen = SETTINGS[setting]
    tasks, rank, experts = chosen["tasks"], chosen["rank"], chosen["experts"]
    untouched = base(tasks if chosen["informed"] else 0)
    torch.manual_seed(seed)
    if method == "LoRA of equal parameters":
        as_many = get_peft_model(copy.deepcopy(untouched), mixture("mixlora", rank, experts))
        rank = size(as_many).rank
    name, more = {**METHODS, **UNBALANCED}[method]
    config = mixture(name, rank, experts, **more) if name else lora(rank)
    model = get_peft_model(copy.deepcopy(untouched), config)
    learn(model, range(tasks) if alone is None else [alone], chosen["steps"], RATE, seed, tasks, ROWS)
    found: dict[str, Any] = {"accuracies": accuracies(model, tasks), "parameters": numbers(model), "rank": rank}
    return found | ({"loads": loads(model, tasks)} if name else {})


def loads(model: nn.Module, tasks: int) -> list[list[float]]:
    """Share of the tokens of all tasks that each expert of each layer got, times the number of experts: 1 is even."""
    ids, _ = mixed(range(tasks), 64, torch.Generator().manual_seed(9), tasks)
    with torch.no_grad(), watched(model) as routing:
        model(input_ids=ids)
        found = load(routing.records["default"].values())
    return [[share * len(one.fraction) for share in one.fraction] for one in found]


# ------------------------------------------------------------------------------------------------ LoRAMoE

SPLITS = ((0.0, 0.1), (0.1, 0.1), (0.1, 0.3), (1.0, 0.3))
"""(beta, delta)."""
TYPED = 4
"""Tasks of the split; type 1 are the last two."""


def routing(beta: float, delta: float, seed: int) -> dict[str, Any]:
    """Difference between the types of the gates' mass on the first half of the experts, by layer."""
    torch.manual_seed(seed)
    config = mixture("loramoe", 2, 6, aux_coefficient=beta, lbc_delta=delta)
    model = get_peft_model(copy.deepcopy(base(TYPED)), config)
    types = torch.arange(TYPED).repeat_interleave(ROWS) // 2
    with sample_types(model, types):
        learn(model, range(TYPED), 400, RATE, seed, TYPED, ROWS)
    ids, _ = mixed(range(TYPED), 64, torch.Generator().manual_seed(9), TYPED)
    kinds = torch.arange(TYPED).repeat_interleave(64) // 2
    with torch.no_grad(), watched(model) as context:
        model(input_ids=ids)
        records = list(context.records["default"].values())
    by_layer: dict[int, list[float]] = {}
    busiest = 0.0
    for record in records:
        first = record.probabilities[..., :3].sum(-1).mean(1)
        between = float(first[kinds == 0].mean() - first[kinds == 1].mean())
        by_layer.setdefault(int(record.layer or 0), []).append(between)
        busiest = max(busiest, float(record.probabilities.mean((0, 1)).max()))
    means = [statistics.fmean(values) for _, values in sorted(by_layer.items())]
    return {"difference": means, "busiest": busiest, "accuracies": accuracies(model, TYPED)}


FACTS, OTHER, PER_ROW = 96, 32, 4


def facts(which: range, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(ids, labels), (count, 13): first token 3, then four facts (two symbols and their value); values are learnt."""
    rule = torch.Generator().manual_seed(321)
    keys = torch.randperm(28 * 28, generator=rule)[: FACTS + OTHER]
    values = torch.randint(0, 28, (FACTS + OTHER,), generator=rule)
    chosen = torch.randint(which.start, which.stop, (count, PER_ROW), generator=generator)
    ids = torch.stack([keys[chosen] // 28, keys[chosen] % 28, values[chosen]], -1).flatten(1) + contradictions.KEPT
    ids = torch.cat([torch.full((count, 1), 3), ids], 1)
    labels = torch.full_like(ids, -100)
    labels[:, 3::3] = ids[:, 3::3]
    return ids, labels


def recall_of(model: nn.Module) -> float:
    """Share of the first facts that are known."""
    ids, _ = facts(range(FACTS), 256, torch.Generator().manual_seed(9))
    with torch.no_grad():
        guessed = model.eval()(input_ids=ids).logits[:, 2:-1:3].argmax(-1)
    return float((guessed == ids[:, 3::3]).float().mean())


@cache
def knowing(seed: int) -> LlamaForCausalLM:
    """The base of bed T after learning facts, by all its parameters."""
    model = copy.deepcopy(base(0)).requires_grad_(True).train()
    steps = 900
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        ids, labels = facts(range(FACTS), 32, generator)
        old = dialects.batch(dialects.OLD[step % 3], 16, 55 + seed, step)[:, : ids.shape[1]]
        model(input_ids=torch.cat([ids, old]), labels=torch.cat([labels, old])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def recall(method: str, seed: int) -> dict[str, Any]:
    """Learn three new tasks (nine rows of ten) and other facts (the tenth), then ask for the first facts."""
    model: Any = copy.deepcopy(knowing(seed))
    before = recall_of(model)
    torch.manual_seed(seed)
    if method == "full":
        model, rate = model.requires_grad_(True), 1e-3
    else:
        config = mixture("loramoe", 4, 6, aux_coefficient=0.1, lbc_delta=0.3)
        experts = get_peft_model(copy.deepcopy(model), config)
        model, rate = experts if method == "LoRAMoE" else get_peft_model(model, lora(size(experts).rank)), RATE / 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    types = torch.tensor([0] * 36 + [1] * 4)
    routed = is_moe(model)
    model.train()
    for _ in range(300):
        new, other = mixed(range(3), 12, generator), facts(range(FACTS, FACTS + OTHER), 4, generator)
        batch = {"input_ids": torch.cat([new[0], other[0]]), "labels": torch.cat([new[1], other[1]])}
        if routed:
            with sample_types(model, types):
                (model(**batch).loss + aux_loss(model)).backward()
        else:
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"before": before, "recall": recall_of(model), "accuracies": accuracies(model), "parameters": numbers(model)}


# ------------------------------------------------------------------------------------------------ MoLA

ALLOCATIONS = {
    "more above (1-2-3-4)": [1, 2, 3, 4],
    "more below (4-3-2-1)": [4, 3, 2, 1],
    "even (3-2-3-2-3-2-3-2)": [3, 2] * 4,
    "hourglass (4-1-1-4)": [4, 1, 1, 4],
    "all (4-4-4-4)": [4, 4, 4, 4],
}


@cache
def deep() -> LlamaForCausalLM:
    """A Llama of eight layers that speaks the dialects 0 to 2."""
    torch.manual_seed(0)
    config = copy.deepcopy(dialects.empty_model().config)
    config.num_hidden_layers = 8
    model = LlamaForCausalLM(config).train()
    steps = 500
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        ids = dialects.batch(dialects.OLD[step % 3], 32, 4321, step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval().requires_grad_(False)


def allocation(name: str, seed: int) -> dict[str, Any]:
    """Four tasks with MoLA on all linear layers: accuracies, parameters, distance of experts by layer."""
    torch.manual_seed(seed)
    config = mixture("mola", 2, ALLOCATIONS[name], target_modules=dialects.TARGETS)
    model = get_peft_model(copy.deepcopy(deep()), config)
    learn(model, range(4), 120, RATE / 2, seed, 4, 6)
    distance = redundancy(model)
    return {"accuracies": accuracies(model, 4), "parameters": numbers(model), "experts": sum(config.num_experts),
            "distance": {str(layer): value for layer, value in distance.items()}}  # fmt: skip


# ------------------------------------------------------------------------------------------------ X-LoRA


def experts_of(seed: int, steps: int = 400) -> tuple[list[xlora.Expert], list[list[float]]]:
    """A LoRA for each of three tasks, and its accuracies on all of them."""
    experts, alone = [], []
    for task in range(3):
        torch.manual_seed(10 * seed + task)
        model = get_peft_model(copy.deepcopy(base(0)), lora(4))
        learn(model, [task], steps, RATE, 10 * seed + task)
        experts.append(xlora.Expert(f"task{task}", read_layers(model.get_base_model(), "default")))
        alone.append(accuracies(model))
    return experts, alone


def gates(seed: int) -> dict[str, Any]:
    """X-LoRA against its experts: the best, all of them summed, their average."""
    experts, alone = experts_of(seed)
    found: dict[str, Any] = {"base": accuracies(copy.deepcopy(base(0))), "experts": alone}
    for layerwise in (False, True):
        for steps in (100, 400):
            torch.manual_seed(seed + 5)
            options = ClassifierOptions(depth=2, size=64, dropout=0.0, layerwise=layerwise)
            model = xlora.add(copy.deepcopy(base(0)), experts, options).eval()
            for name, gate in (("average", 1 / 3), ("sum", 1.0)):
                with xlora.constant_gates(model, [gate] * 3):
                    found.setdefault(name, accuracies(model))
            name = f"X-LoRA, {'gates by layer' if layerwise else 'the same gates'}, {steps} steps"
            found[name] = accuracies(learn(model, range(3), steps, RATE, seed))
            found["classifier"] = numbers(model)
    return found


# ------------------------------------------------------------------------------------------------ plan


def plan(seeds: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """All runs by name, the first seed first."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for seed in range(seeds):
        for beta, delta in SPLITS:
            found[f"routing/{beta:g}/{delta:g}/{seed}"] = partial(routing, beta, delta, seed)
        for method in METHODS:
            for setting in SETTINGS:
                found[f"tasks/{setting}/{method}/{seed}"] = partial(contradicting, setting, method, seed)
        for method in UNBALANCED:
            setting = "6 tasks, rank 1"
            found[f"tasks/{setting}/{method}/{seed}"] = partial(contradicting, setting, method, seed)
        for task in range(3):
            setting = "3 tasks, rank 2"
            found[f"alone/{setting}/{task}/{seed}"] = partial(contradicting, setting, "MixLoRA", seed, task)
        for method in ("full", "LoRA", "LoRAMoE"):
            found[f"recall/{method}/{seed}"] = partial(recall, method, seed)
        found[f"gates/{seed}"] = partial(gates, seed)
        for name in ALLOCATIONS:
            found[f"mola/{name}/{seed}"] = partial(allocation, name, seed)
    return found
