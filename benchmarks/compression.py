"""Smaller language models: what few bits cost, what a low-rank part and training through the rounding give back.

    python -m benchmarks.compression start --texts DIR           # NF, LoftQ and LQ-LoRA at several budgets
    python -m benchmarks.compression tune --texts DIR            # QLoRA and LQ-LoRA after equal tuning
    python -m benchmarks.compression l4q --texts DIR             # L4Q, tune-merge-round, QLoRA-merge-requantise
    python -m benchmarks.compression start --base smollm2 --bits 2.75 4 --seeds 0 --texts DIR
    python -m benchmarks.compression time                        # products with few-bit weights over dense ones

The base is the byte-level Llama of :mod:`benchmarks.tiny_llama` (which says where the texts come from), tuned on the
Bible, or SmolLM2-135M-Instruct. Losses are in nats per token (byte) on windows that no training saw. Every arm of a
part has the same data, rank, steps and learning rate. ``--write`` adds the rows, keyed by part, base, arm, bits and
seed, to ``benchmarks/results/compression.json`` as they come, and writes ``compression.md`` and the front of
perplexity over bytes, ``compression.png``, again from all of them; rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
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
from benchmarks import tiny_llama
from benchmarks.tiny_llama import Text, learn, linear, loss_of, with_lora

RESULTS = Path(__file__).parent / "results"
KEYS = ("part", "base", "arm", "bits", "seed")
SOURCE, TASK = "shakespeare", "bible"

Losses = dict[str, float]
Row = dict[str, Any]


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


def losses(model: Any, texts: dict[str, Text]) -> Losses:
    return {name: loss_of(model, text) for name, text in texts.items()}


def measure_start(model: Any, texts: dict[str, Text], asked: Any, seed: int, new: Callable[..., bool]) -> Iterator[Row]:
    """Losses right after compressing, without any tuning."""
    if new("whole", 32):
        yield row("start", asked, "whole", 32, seed, losses(model, texts), bytes=stored_bytes(model))
    for arm, bits in ((arm, bits) for bits in asked.bits for arm in ("NF", "LoftQ", "LQ-LoRA") if new(arm, bits)):
        begun = time.process_time()
        parts = decomposed(model, arm, bits, asked.rank, asked.turns)
        took = time.process_time() - begun
        made = replaced(model, parts, True)
        error = sum(part.errors[-1] ** 2 for part in parts.values()) ** 0.5
        yield row("start", asked, arm, bits, seed, losses(made, texts), error=error, bytes=stored_bytes(made),
                  seconds=took)  # fmt: skip


def measure_tune(model: Any, texts: dict[str, Text], asked: Any, seed: int, new: Callable[..., bool]) -> Iterator[Row]:
    """QLoRA (Q alone, B = 0) and LQ-LoRA after equal tuning on the task."""
    for arm, bits in ((arm, bits) for bits in asked.bits for arm in ("QLoRA", "LQ-LoRA") if new(arm, bits)):
        parts = decomposed(model, "NF" if arm == "QLoRA" else arm, bits, asked.rank, asked.turns)
        wrapped = with_lora(replaced(model, parts, False), seed, asked.rank, asked.rank)
        if arm == "LQ-LoRA":
            for name, layer in adapted(wrapped).items():
                A, B = pair(layer)
                A.data.copy_(parts[name].L2)
                B.data.copy_(parts[name].L1)
        learn(wrapped, texts[TASK], asked.steps, asked.rate, seed)
        yield row("tune", asked, arm, bits, seed, losses(wrapped, texts), bytes=stored_bytes(wrapped))


def measure_l4q(model: Any, texts: dict[str, Text], asked: Any, seed: int, new: Callable[..., bool]) -> Iterator[Row]:
    """Fully rounded models of equal bits after equal tuning on the task."""
    whole = {name: module.weight.detach() for name, module in linear(model).items()}
    tuned = None
    for bits in asked.bits:
        grid = Grid(int(bits), asked.group)
        nearest = rounded(model, whole, grid)
        told = {"bytes": stored_bytes(nearest)}
        if new("rounded, no tuning", bits):
            yield row("l4q", asked, "rounded, no tuning", bits, seed, losses(nearest, texts), **told)
        if new("tuned, merged, rounded", bits):
            if tuned is None:
                tuned = with_lora(copy.deepcopy(model), seed, asked.rank, asked.alpha)
                learn(tuned, texts[TASK], asked.steps, asked.rate, seed)
            found = losses(rounded(model, sums(whole, tuned), grid), texts)
            yield row("l4q", asked, "tuned, merged, rounded", bits, seed, found, **told)
        if new("the same, merged and rounded again", bits):
            first = {n: start(W, grid) for n, W in whole.items()}
            integer = {n: values_of(codes_of(W, *first[n], grid), *first[n], grid) for n, W in whole.items()}
            few = with_lora(dense(model, integer), seed, asked.rank, asked.alpha)
            learn(few, texts[TASK], asked.steps, asked.rate, seed)
            yield row("l4q", asked, "integer base, LoRA beside it", bits, seed, losses(few, texts), **told)
            found = losses(rounded(model, sums(integer, few), grid), texts)
            yield row("l4q", asked, "the same, merged and rounded again", bits, seed, found, **told)
        for rate in asked.step_rates:
            if not new(f"L4Q, steps at {rate:g}", bits):
                continue
            through = with_lora(copy.deepcopy(model), seed, asked.rank, asked.alpha)
            layers = adapted(through)
            for layer in layers.values():
                attach(layer, grid)
            learn(through, texts[TASK], asked.steps, asked.rate, seed, slow=lambda name: STEP in name or ZERO in name,
                  slow_rate=rate, after_step=lambda _, layers=layers: positive(layers))  # fmt: skip
            steps = {name: tuple(getattr(layer, kind)["default"].detach() for kind in (STEP, ZERO))
                     for name, layer in layers.items()}  # fmt: skip
            exact = losses(rounded(model, sums(whole, through), grid, steps), texts)
            yield row("l4q", asked, f"L4Q, steps at {rate:g}", bits, seed, exact, fake=loss_of(through, texts[TASK]),
                      **told)  # fmt: skip


def sums(weights: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Every weight with its pair merged."""
    layers = adapted(model)
    return {n: merged(weights[n], *pair(one), one.scaling["default"]).detach() for n, one in layers.items()}


def dense(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A copy with other weights."""
    made = copy.deepcopy(model)
    for name, W in weights.items():
        made.get_submodule(name).weight.data.copy_(W)
    return made


def positive(layers: dict[str, Any]) -> None:
    for layer in layers.values():
        getattr(layer, STEP)["default"].data.clamp_(min=1e-8)


def rounded(model: Any, weights: dict[str, torch.Tensor], grid: Grid, steps: Any = None) -> Any:
    """A copy with integer layers; ``steps``: of L4Q, otherwise rounding to nearest."""
    made = copy.deepcopy(model)
    for name, W in weights.items():
        step, zero = steps[name] if steps else start(W, grid)
        parent, _, last = name.rpartition(".")
        layer = IntegerLinear(integer_parts(W, step, zero, grid), (W.shape[0], W.shape[1]), grid)
        setattr(made.get_submodule(parent), last, layer)
    return made


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


def row(part: str, asked: Any, arm: str, bits: float, seed: int, found: Losses, **more: float) -> Row:
    made = {"part": part, "base": asked.base, "arm": arm, "bits": bits, "seed": seed,
            **{key: round(value, 4) for key, value in (found | more).items()}}  # fmt: skip
    print(json.dumps(made), flush=True)
    return made


def known() -> dict[str, Any]:
    """The results so far."""
    place = RESULTS / "compression.json"
    return json.loads(place.read_text()) if place.is_file() else {"rows": [], "asked": {}}


def write(rows: list[Row], asked: Any) -> None:
    """Add the rows to the results, and write table and plot of all of them."""
    kept = known()
    merged_rows = {tuple(one[key] for key in KEYS): one for one in [*kept["rows"], *rows]}
    plain = {k: v for k, v in vars(asked).items() if k not in ("write", "texts", "cache")}
    kept = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__,
            "asked": {**kept["asked"], f"{asked.part} {asked.base}": plain},
            "rows": sorted(merged_rows.values(), key=lambda one: [str(one[key]) for key in KEYS])}  # fmt: skip
    (RESULTS / "compression.json").write_text(json.dumps(kept, indent=1) + "\n")
    (RESULTS / "compression.md").write_text(table(kept["rows"]))
    front(kept["rows"]).save(RESULTS / "compression.png")


def means(rows: list[Row]) -> list[Row]:
    """One row per part, base, arm and bits: means over the seeds, with their number."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for one in rows:
        groups.setdefault(tuple(one[key] for key in KEYS[:-1]), []).append(one)
    found = []
    for key, group in groups.items():
        names = [name for name in dict.fromkeys(name for one in group for name in one) if name not in KEYS]
        values = {n: round(statistics.mean(one[n] for one in group if n in one), 4) for n in names}
        found.append(dict(zip(KEYS, key, strict=False)) | values | {"seeds": len(group)})
    return found


def table(rows: list[Row]) -> str:
    """Means over the seeds as one table per part and base, then the bars."""
    lines = ["# Smaller language models", "", "Made by `python -m benchmarks.compression` (see its text); settings and "
             "single seeds are in the .json. Losses in nats per token (byte) on held-out windows.", ""]  # fmt: skip
    if any("bytes" in one for one in rows):
        lines += ["![Perplexity over bytes](compression.png)", ""]
    for part, base in sorted({(one["part"], one["base"]) for one in rows}):
        mine = means([one for one in rows if (one["part"], one["base"]) == (part, base)])
        names = [key for key in dict.fromkeys(key for one in mine for key in one)
                 if key not in ("part", "base")]  # fmt: skip
        lines += [f"## {part}, {base}", "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
        lines += ["| " + " | ".join(str(one.get(name, "")) for name in names) + " |" for one in mine]
        lines.append("")
    return "\n".join([*lines, *bars(rows)])


def bars(rows: list[Row]) -> list[str]:
    """What was wanted of the byte-level Llama, and what was found."""
    found = {(one["part"], one["arm"], one["bits"]): one for one in means([r for r in rows if r["base"] == "tiny"])}

    def task(part: str, arm: str, bits: float) -> float | None:
        one = found.get((part, arm, bits))
        return None if one is None or TASK not in one else float(one[TASK])

    def l4q(bits: float) -> str:
        asked = [arm for part, arm, b in found if part == "l4q" and arm.startswith("L4Q") and b == bits]
        return "L4Q, steps at 0.05" if "L4Q, steps at 0.05" in asked else next(iter(asked), "")

    def gap(part: str, worse: str, better: str, bits: float) -> float | None:
        a, b = task(part, worse, bits), task(part, better, bits)
        return None if a is None or b is None else a - b

    whole, nf, lq = (found.get(("start", arm, bits)) for arm, bits in (("whole", 32), ("NF", 2.07), ("LQ-LoRA", 2.07)))
    closed = None
    if whole and nf and lq and SOURCE in nf:
        closed = 1 - (lq[SOURCE] - whole[SOURCE]) / (nf[SOURCE] - whole[SOURCE])
    wanted = [
        ("LQ-LoRA at 2.07 bits: share of NF's loss that is gone at the start", 0.5, closed),
        ("QLoRA minus LQ-LoRA after tuning, 2.07 bits", 0.02, gap("tune", "QLoRA", "LQ-LoRA", 2.07)),
        ("QLoRA minus LQ-LoRA after tuning, 3 bits", -0.005, gap("tune", "QLoRA", "LQ-LoRA", 3.0)),
        ("tuned, merged, rounded minus L4Q, 3 bits", 0.01, gap("l4q", "tuned, merged, rounded", l4q(3.0), 3.0)),
        ("merged and rounded again minus L4Q, 3 bits", 0.03,
         gap("l4q", "the same, merged and rounded again", l4q(3.0), 3.0)),
        ("tuned, merged, rounded minus L4Q, 4 bits", -0.002, gap("l4q", "tuned, merged, rounded", l4q(4.0), 4.0)),
        ("merged and rounded again minus L4Q, 4 bits", -0.002,
         gap("l4q", "the same, merged and rounded again", l4q(4.0), 4.0)),
    ]  # fmt: skip
    measured = [(what, bar, value) for what, bar, value in wanted if value is not None]
    if not measured:
        return []
    return ["## Bars (byte-level Llama, loss on the task)", "", "| what | at least | found | |", "|---|---|---|---|",
            *(f"| {what} | {bar} | {value:.4f} | {'yes' if value >= bar else 'no'} |" for what, bar, value in measured),
            ""]  # fmt: skip


COLOURS = {"NF": "#888", "LoftQ": "#c4803a", "LQ-LoRA": "#2f6f9f", "QLoRA": "#888", "L4Q": "#7a4fa3", "rounded": "#b33"}


def front(rows: list[Row]) -> Any:
    """Perplexity over bytes, one panel per part and base; lines join the budgets of an arm."""
    from PIL import Image, ImageDraw, ImageFont

    panels = sorted({(one["part"], one["base"]) for one in rows if "bytes" in one})
    wide, high, left, low, up = 620, 360, 70, 46, 40
    image = Image.new("RGB", (wide * max(1, len(panels)), high), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for number, (part, base) in enumerate(panels):
        mine = means([one for one in rows if (one["part"], one["base"]) == (part, base) and "bytes" in one])
        text = SOURCE if part == "start" else TASK
        points = {
            (one["arm"], one["bits"]): (one["bytes"] / 1e6, 2.718281828459045 ** one[text])
            for one in mine if text in one
        }  # fmt: skip
        if not points:
            continue
        whole = next((points.pop(key) for key in list(points) if key[0] == "whole"), None)
        xs, ys = [x for x, _ in points.values()], [y for _, y in [*points.values(), *([whole] if whole else [])]]
        if not xs:
            continue
        x0, x1, y0, y1 = 0.9 * min(xs), 1.05 * max(xs), min(ys), max(ys)
        y0, y1 = y0 - 0.08 * (y1 - y0 or 1), y1 + 0.08 * (y1 - y0 or 1)
        at = lambda x, y, n=number, a=(x0, x1, y0, y1): (  # noqa: E731
            n * wide + left + (x - a[0]) / (a[1] - a[0]) * (wide - left - 20),
            up + (a[3] - y) / (a[3] - a[2]) * (high - up - low),
        )
        draw.text((number * wide + left, 8), f"{part}, {base}: perplexity on {text} over megabytes", "#222", font)
        draw.line([at(x0, y1), at(x0, y0), at(x1, y0)], "#999")
        for share in (0.0, 0.5, 1.0):
            x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
            draw.text((at(x, y0)[0], high - low + 6), f"{x:.3g}", "#555", font, anchor="ma")
            draw.text((at(x0, y)[0] - 6, at(x0, y)[1]), f"{y:.3g}", "#555", font, anchor="rm")
        if whole:  # far to the right: a line at its perplexity
            draw.line([at(x0, whole[1]), at(x1, whole[1])], "#3a8a5f", 1)
            told = f"whole, {whole[0]:.3g} MB"
            draw.text((at(x1, 0)[0], at(x1, whole[1])[1] - 2), told, "#3a8a5f", font, anchor="rb")
        for place, arm in enumerate(dict.fromkeys(arm for arm, _ in points)):
            colour = next((c for word, c in COLOURS.items() if arm.startswith(word)), "#3a8a5f")
            line = sorted(points[key] for key in points if key[0] == arm)
            if len(line) > 1:
                draw.line([at(*point) for point in line], colour, 2)
            for point in line:
                x, y = at(*point)
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
            draw.text((number * wide + wide - 24, up + 4 + 16 * place), arm, colour, font, anchor="ra")
    return image


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("start", "tune", "l4q", "time", "report"))
    parser.add_argument("--base", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--bits", type=float, nargs="+", default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16, help="l4q: of the LoRA")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--step-rates", type=float, nargs="+", default=[0.05, 1.0],
                        help="l4q: of steps and offsets, as shares of --rate")  # fmt: skip
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--write", action="store_true")
    tiny_llama.add_arguments(parser)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.part == "report":
        write([], asked)
    elif asked.part == "time":
        rows = measure_time()
        for one in rows:
            print(json.dumps(one))
        if asked.write:
            write(rows, asked)
    else:
        asked.bits = (
            asked.bits or {"start": [2.07, 2.5, 2.75, 3.0, 4.0], "tune": [2.07, 3.0], "l4q": [3.0, 4.0]}[asked.part]
        )
        measure = {"start": measure_start, "tune": measure_tune, "l4q": measure_l4q}[asked.part]
        model, texts = opened(asked)
        done = {tuple(one[key] for key in KEYS) for one in known()["rows"]} if asked.write else set()
        for seed in asked.seeds[:1] if asked.part == "start" else asked.seeds:  # nothing at the start is random

            def new(arm: str, bits: float, seed: int = seed) -> bool:
                return (asked.part, asked.base, arm, bits, seed) not in done

            for one in measure(model, texts, asked, seed, new):
                if asked.write:
                    write([one], asked)


def opened(asked: Any) -> tuple[Any, dict[str, Text]]:
    """The base, and the texts as its tokens."""
    if asked.base == "tiny":
        return tiny_llama.opened(asked)
    from pipelines.language.loading import open_model
    from studio.library import smollm2

    base = open_model(smollm2.prepare(), dtype="fp32")
    written = {name: (asked.texts / f"{name}.txt").read_text(errors="replace")[-400_000:] for name in (SOURCE, TASK)}
    tokens = {name: torch.tensor(base.tokenizer(text)["input_ids"]) for name, text in written.items()}
    return base.model, {name: Text(ids, held=24) for name, ids in tokens.items()}


if __name__ == "__main__":
    main()
