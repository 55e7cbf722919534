"""Smaller language models: what few bits cost, what a low-rank part and training through the rounding give back.

    python -m benchmarks.compression start                       # NF, LoftQ and LQ-LoRA at several budgets
    python -m benchmarks.compression tune --other bible.txt      # QLoRA and LQ-LoRA after equal tuning
    python -m benchmarks.compression l4q --other bible.txt       # L4Q, tune-merge-round, QLoRA-merge-requantise
    python -m benchmarks.compression start --base smollm2 --bits 2.75 4
    python -m benchmarks.compression time                        # products with few-bit weights over dense ones

The base is a byte-level Llama (width 128, 4 layers, 8 heads on 4), trained here on the help texts that Python carries
(``pydoc_data.topics``), or SmolLM2-135M-Instruct. ``--other`` is a text of another kind for tuning: the King James
Bible of Debian's package bible-kjv, by ``bible -f Ge1:1-Re22:21 > bible.txt``. Losses are in nats per token (byte) on
windows that no training saw. Every arm of a part has the same data, rank, steps and learning rate. ``--write`` adds the
rows, keyed by part, base, arm, bits and seed, to ``benchmarks/results/compression.json``, and writes ``compression.md``
again from all of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adapters.compression.l4q import (
    Grid,
    IntegerLinear,
    codes_of,
    integer_parts,
    merged,
    start,
    to_torch_int4,
    torch_int4,
    values_of,
)
from adapters.compression.lq_lora import Decomposition, allocate, decompose, first_errors
from adapters.compression.normal_float import NormalFloatLinear, dequantise, every_configuration, quantise
from adapters.compression.storage import stored_bytes
from adapters.layers.variant import adapted, pair
from adapters.learn.l4q import STEP, ZERO, attach

RESULTS = Path(__file__).parent / "results"
LENGTH = 128
HELD_OUT = 12
"""Windows of a text that are measured, spread evenly; they are cut out of what is trained on."""


def help_texts() -> str:
    """The text that Python itself carries."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


class Windows:
    """Token windows of a text: ``held`` for measuring, the rest drawn at random for training."""

    def __init__(self, tokens: torch.Tensor, length: int = LENGTH) -> None:
        rows = tokens[: len(tokens) // length * length].view(-1, length)
        step = max(1, len(rows) // HELD_OUT)
        mask = torch.zeros(len(rows), dtype=torch.bool)
        mask[::step][:HELD_OUT] = True
        self.held, self.rest = rows[mask], rows[~mask]

    def batch(self, size: int, generator: torch.Generator) -> torch.Tensor:
        return self.rest[torch.randint(len(self.rest), (size,), generator=generator)]


def of_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


@torch.no_grad()
def loss_of(model: Any, rows: torch.Tensor) -> float:
    """Mean loss on windows."""
    losses = [float(model(input_ids=part, labels=part).loss) for part in rows.split(6)]
    return sum(losses) / len(losses)


def learn(
    model: Any, windows: Windows, steps: int, rate: float, batch: int, seed: int, step_rate: float = 0.05
) -> None:
    """AdamW with a cosine; steps and offsets of L4Q at a share of the rate."""
    generator = torch.Generator().manual_seed(seed)
    own = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    slow = [p for name, p in own if STEP in name or ZERO in name]
    groups = [{"params": [p for name, p in own if STEP not in name and ZERO not in name], "lr": rate}]
    groups += [{"params": slow, "lr": rate * step_rate}] if slow else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5 * (1 + math.cos(math.pi * n / steps)))
    for _ in range(steps):
        rows = windows.batch(batch, generator)
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in own], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for p in (p for name, p in own if STEP in name):
            p.data.clamp_(min=1e-8)


def tiny(steps: int, seed: int, windows: Windows) -> Any:
    """The byte-level Llama, trained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        )
    )  # fmt: skip
    learn(model, windows, steps, 3e-3, 8, seed)
    return model.requires_grad_(False).eval()


def linear(model: Any) -> dict[str, nn.Linear]:
    """The matrices that are compressed."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def decomposed(model: Any, arm: str, bits: float, rank: int, turns: int) -> dict[str, Decomposition]:
    """NF alone, LoftQ (one step from Q = quantised W) or LQ-LoRA, each with the best configurations for its budget."""
    found = linear(model)
    counts = {name: module.weight.numel() for name, module in found.items()}
    costs = {}
    for name, module in found.items():
        able = [how for how in every_configuration() if how.divides(counts[name])]
        costs[name] = dict(zip(able, first_errors(module.weight, able, rank if arm == "LQ-LoRA" else 0), strict=True))
    chosen = allocate(costs, counts, bits).chosen
    made = {}
    for name, module in found.items():
        W, how = module.weight.detach().float(), chosen[name]
        if arm == "LoftQ":
            Q = quantise(W, how)
            U, S, Vh = torch.linalg.svd(W - dequantise(Q), full_matrices=False)
            L1, L2 = U[:, :rank] * S[:rank].sqrt(), S[:rank].sqrt()[:, None] * Vh[:rank]
            error = float((W - dequantise(Q) - L1 @ L2).norm())
            made[name] = Decomposition(Q, L1, L2, (error,), float((W - dequantise(Q)).norm()))
        else:
            made[name] = decompose(W, how, rank if arm == "LQ-LoRA" else 0, turns)
    return made


def replaced(model: Any, parts: dict[str, Decomposition], low_rank: bool) -> Any:
    """A copy of the model with stored matrices, with or without their low-rank parts inside."""
    made = copy.deepcopy(model)
    for name, part in parts.items():
        parent, _, last = name.rpartition(".")
        inside = (part.L2, part.L1) if low_rank and part.L1.shape[1] else None
        setattr(made.get_submodule(parent), last, NormalFloatLinear(part.Q, made.get_submodule(name).bias, inside))
    return made


def with_lora(model: Any, rank: int, seed: int) -> Any:
    torch.manual_seed(seed)
    names = list(linear(model))
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names))


def measure_start(model: Any, texts: dict[str, Windows], asked: Any, base: str, seed: int) -> list[dict[str, Any]]:
    """Losses right after compressing, without any tuning."""
    rows = [row("start", base, "whole", 32, seed, {k: loss_of(model, w.held) for k, w in texts.items()},
                bytes=stored_bytes(model))]  # fmt: skip
    for bits in asked.bits:
        for arm in ("NF", "LoftQ", "LQ-LoRA"):
            begun = time.process_time()
            parts = decomposed(model, arm, bits, asked.rank, asked.turns)
            took = time.process_time() - begun
            made = replaced(model, parts, True)
            error = sum(part.errors[-1] ** 2 for part in parts.values()) ** 0.5
            losses = {key: loss_of(made, windows.held) for key, windows in texts.items()}
            rows.append(
                row("start", base, arm, bits, seed, losses, error=error, bytes=stored_bytes(made), seconds=took)
            )
    return rows


def measure_tune(model: Any, texts: dict[str, Windows], asked: Any, base: str, seed: int) -> list[dict[str, Any]]:
    """QLoRA (Q alone, B = 0) and LQ-LoRA after equal tuning on the other text."""
    rows = []
    for bits in asked.bits:
        for arm, source in (("QLoRA", "NF"), ("LQ-LoRA", "LQ-LoRA")):
            parts = decomposed(model, source, bits, asked.rank, asked.turns)
            wrapped = with_lora(replaced(model, parts, False), asked.rank, seed)
            if source == "LQ-LoRA":
                for name, layer in adapted(wrapped).items():
                    A, B = pair(layer)
                    A.data.copy_(parts[name].L2)
                    B.data.copy_(parts[name].L1)
            learn(wrapped, texts["other"], asked.steps, asked.rate, 8, seed)
            rows.append(row("tune", base, arm, bits, seed, {k: loss_of(wrapped, w.held) for k, w in texts.items()}))
    return rows


def measure_l4q(model: Any, texts: dict[str, Windows], asked: Any, base: str, seed: int) -> list[dict[str, Any]]:
    """Fully rounded models of equal bits after equal tuning on the other text."""
    rows = []

    def losses(made: Any) -> dict[str, float]:
        return {key: loss_of(made, windows.held) for key, windows in texts.items()}

    def rounded(source: Any, weights: dict[str, torch.Tensor], grid: Grid, steps: Any = None) -> Any:
        made = copy.deepcopy(source)
        for name, W in weights.items():
            step, zero = steps[name] if steps else start(W, grid)
            parent, _, last = name.rpartition(".")
            layer = IntegerLinear(integer_parts(W, step, zero, grid), (W.shape[0], W.shape[1]), grid)
            setattr(made.get_submodule(parent), last, layer)
        return made

    for bits in asked.bits:
        grid = Grid(int(bits), asked.group)
        whole = {name: module.weight.detach() for name, module in linear(model).items()}
        rows.append(row("l4q", base, "rounded, no tuning", bits, seed, losses(rounded(model, whole, grid))))
        tuned = with_lora(copy.deepcopy(model), asked.rank, seed)
        learn(tuned, texts["other"], asked.steps, asked.rate, 8, seed)
        sums = {n: merged(whole[n], *pair(layer), layer.scaling["default"]).detach()
                for n, layer in adapted(tuned).items()}  # fmt: skip
        rows.append(row("l4q", base, "tuned, merged, rounded", bits, seed, losses(rounded(model, sums, grid))))
        first = {n: start(W, grid) for n, W in whole.items()}
        integer = {n: values_of(codes_of(W, *first[n], grid), *first[n], grid) for n, W in whole.items()}
        few = with_lora(rounded(model, whole, grid), asked.rank, seed)
        learn(few, texts["other"], asked.steps, asked.rate, 8, seed)
        rows.append(row("l4q", base, "integer base, LoRA beside it", bits, seed, losses(few)))
        again = {n: merged(integer[n], *pair(layer), layer.scaling["default"]).detach()
                 for n, layer in adapted(few).items()}  # fmt: skip
        rows.append(row("l4q", base, "the same, merged and rounded again", bits, seed,
                        losses(rounded(model, again, grid))))  # fmt: skip
        through = with_lora(copy.deepcopy(model), asked.rank, seed)
        for layer in adapted(through).values():
            attach(layer, grid)
        learn(through, texts["other"], asked.steps, asked.rate, 8, seed)
        fake = losses(through)
        sums, steps = {}, {}
        for name, layer in adapted(through).items():
            sums[name] = merged(whole[name], *pair(layer), layer.scaling["default"]).detach()
            steps[name] = tuple(getattr(layer, kind)["default"].detach() for kind in (STEP, ZERO))
        exact = losses(rounded(model, sums, grid, steps))
        rows.append(row("l4q", base, "L4Q", bits, seed, exact, fake=fake["other"]))
    return rows


def measure_time() -> list[dict[str, Any]]:
    """CPU time of one product (64 rows, 1024 x 1024) over the dense one: medians of the ratios of single rounds."""
    W, x = torch.randn(1024, 1024) / 32, torch.randn(64, 1024)
    nf = NormalFloatLinear(quantise(W, every_configuration()[-1]))
    four = NormalFloatLinear(quantise(W, next(how for how in every_configuration() if how.bits == 4)))
    integer = IntegerLinear(integer_parts(W, *start(W, Grid(4, 64)), Grid(4, 64)), (1024, 1024), Grid(4, 64))
    packed, scales = to_torch_int4(integer)
    runs: dict[str, Any] = {
        "dense fp32": lambda: x @ W.T, "nf8, restored per product": lambda: nf(x),
        "nf4, restored per product": lambda: four(x), "int4, restored per product": lambda: integer(x),
        "torch int4 product": lambda: torch_int4(x, packed, 64, scales),
    }  # fmt: skip
    try:
        from adapters.compression.backends import quantize

        bnb = nn.Sequential(nn.Linear(1024, 1024, bias=False)).requires_grad_(False)
        quantize(bnb, "4bit", torch.float32)
        runs["bitsandbytes nf4"] = lambda: bnb(x)
    except Exception as error:  # not installed
        print(f"bitsandbytes left out: {error}")
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for number in range(21):
            for name, run in runs.items():
                begun = time.process_time()
                run()
                if number:
                    times[name].append(time.process_time() - begun)
    dense = times["dense fp32"]
    return [
        {"part": "time", "base": "1024 x 1024, 64 rows", "arm": name, "bits": 0, "seed": 0,
         "ratio": round(statistics.median(a / b for a, b in zip(taken, dense, strict=True)), 2)}
        for name, taken in times.items()
    ]  # fmt: skip


def row(
    part: str, base: str, arm: str, bits: float, seed: int, losses: dict[str, float], **more: float
) -> dict[str, Any]:
    found = {"part": part, "base": base, "arm": arm, "bits": bits, "seed": seed,
             **{key: round(value, 4) for key, value in losses.items()},
             **{key: round(value, 4) for key, value in more.items()}}  # fmt: skip
    print(json.dumps(found), flush=True)
    return found


def write(rows: list[dict[str, Any]], asked: Any) -> None:
    """Add the rows to the results, and write the table of all of them."""
    place = RESULTS / "compression.json"
    kept = json.loads(place.read_text()) if place.is_file() else {"rows": []}
    keys = ("part", "base", "arm", "bits", "seed")
    known = {tuple(one[key] for key in keys): one for one in kept["rows"]}
    known |= {tuple(one[key] for key in keys): one for one in rows}
    kept = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__,
            "asked": {**kept.get("asked", {}), f"{asked.part} {asked.base}": {k: v for k, v in vars(asked).items()
                                                                             if k not in ("write", "other")}},
            "rows": sorted(known.values(), key=lambda one: [str(one[key]) for key in keys])}  # fmt: skip
    place.write_text(json.dumps(kept, indent=1) + "\n")
    (RESULTS / "compression.md").write_text(table(kept["rows"]))


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as one table per part and base."""
    lines = ["# Smaller language models", "", "Made by `python -m benchmarks.compression` (see its text); settings of "
             "each part are in the .json. Losses in nats per token on held-out windows.", ""]  # fmt: skip
    for part, base in sorted({(one["part"], one["base"]) for one in rows}):
        mine = [one for one in rows if (one["part"], one["base"]) == (part, base)]
        names = [key for key in dict.fromkeys(key for one in mine for key in one)
                 if key not in ("part", "base")]  # fmt: skip
        lines += [f"## {part}, {base}", "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
        lines += ["| " + " | ".join(str(one.get(name, "")) for name in names) + " |" for one in mine]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("start", "tune", "l4q", "time"))
    parser.add_argument("--base", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--bits", type=float, nargs="+", default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--pretrain", type=int, default=600, help="steps of the tiny base's own training")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--other", type=Path, default=None)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.part == "time":
        rows = measure_time()
        for one in rows:
            print(json.dumps(one))
    else:
        asked.bits = (
            asked.bits or {"start": [2.07, 2.5, 2.75, 3.0, 4.0], "tune": [2.07, 3.0], "l4q": [3, 4]}[asked.part]
        )
        if asked.part != "start" and asked.other is None:
            parser.error(f"{asked.part} needs --other, a text to tune on")
        rows = []
        for seed in asked.seeds:
            model, texts = opened(asked, seed)
            measure = {"start": measure_start, "tune": measure_tune, "l4q": measure_l4q}[asked.part]
            rows += measure(model, texts, asked, asked.base, seed)
    if asked.write:
        asked.other = asked.other.name if asked.other else None
        write(rows, asked)


def opened(asked: Any, seed: int) -> tuple[Any, dict[str, Windows]]:
    """The base, and the texts as its tokens."""
    written = {"own": help_texts()} | ({"other": asked.other.read_text(errors="replace")} if asked.other else {})
    if asked.base == "tiny":
        texts = {name: Windows(of_bytes(text)) for name, text in written.items()}
        return tiny(asked.pretrain, seed, texts["own"]), texts
    from pipelines.language.loading import open_model
    from studio.library import smollm2

    base = open_model(smollm2.prepare(), dtype="fp32")
    tokens = {name: torch.tensor(base.tokenizer(text)["input_ids"]) for name, text in written.items()}
    return base.model, {name: Windows(ids) for name, ids in tokens.items()}


if __name__ == "__main__":
    main()
