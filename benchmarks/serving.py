"""Serving a thousand adapters: this studio's engine against PEFT and against itself with parts taken away.

    python -m benchmarks.serving arms --seeds 3
    python -m benchmarks.serving schedulers
    python -m benchmarks.serving pictures
    python -m benchmarks.serving report                 (benchmarks/results/serving.md)

The trace is that of S-LoRA's program (arXiv 2311.03285): adapter int(power(alpha) * N), where alpha = 1 is uniform,
lengths uniform in [8, 64), gaps gamma of shape 1 / cv^2 and mean 1 / rate. The model is a random Llama of width 256
with four layers and 8 / 4 heads; the adapters are on q, k, v and o with ranks 8, 16, 32, 64. Beside the cache of 32
requests a tenth of the adapters fits into the pool; "little room" is a pool of less than half that size. Results are
requests per second of CPU time on one thread, because the machine is shared; every finished part is kept and not
measured again.

    a   the engine: pages shared by cache and adapters          d   with a fixed half of the pool for each
    b   PEFT, one adapter at a time, loaded for each batch       e   with every rank filled up to 64
        of up to 6 requests                                     f   the base without adapters
    c   PEFT, adapter_names, static batches of 32
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from adapters.formats.lora import LoraLayer
from pipelines.language.loading import LanguageModel
from pipelines.language.tokens import Sampling
from studio.serving.engine import Engine, ServeConfig
from studio.serving.requests import Piece, Request

FILE = Path(__file__).parent / "results" / "serving.json"
ADAPTERS, RANKS, TARGETS = 1000, (8, 16, 32, 64), ("q_proj", "k_proj", "v_proj", "o_proj")
WIDTH, LAYERS, HEADS, KV_HEADS, VOCABULARY = 256, 4, 8, 4, 1000
RUNNING = 32
PAGES = 75000
"""The pool: the cache of 32 of the largest requests takes 32 * 126 * 8 = 32256 pages, 100 adapters 14 * 30 each."""


@dataclass(frozen=True)
class Asked:
    arrival: float
    adapter: int
    prompt: tuple[int, ...]
    tokens: int


def trace(count: int, rate: float, adapters: int, alpha: float, cv: float, seed: int) -> list[Asked]:
    """The requests, in order of arrival."""
    random = np.random.RandomState(seed)
    chosen = (random.power(alpha, count) * adapters).astype(int)
    inputs, outputs = random.randint(8, 64, count), random.randint(8, 64, count)
    arrivals = np.cumsum(random.gamma(1 / cv**2, cv**2 / rate, count))
    prompts = [tuple(random.randint(3, VOCABULARY, length).tolist()) for length in inputs]
    return [Asked(*row) for row in zip(arrivals.tolist(), chosen.tolist(), prompts, outputs.tolist(), strict=True)]


def base() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=512, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    ))  # fmt: skip
    return model.requires_grad_(False).eval()


def layers(number: int, model: Any, rank: int | None = None) -> dict[str, LoraLayer]:
    """Adapter ``number``, from its seed; ``rank``: filled up with zeros to this one."""
    random = torch.Generator().manual_seed(number)
    own, found = RANKS[number % len(RANKS)], {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] not in TARGETS:
            continue
        A = torch.randn(own, module.in_features, generator=random) / module.in_features**0.5
        B = torch.randn(module.out_features, own, generator=random) / own**0.5
        if rank is not None:
            A = torch.cat([A, A.new_zeros(rank - own, A.shape[1])])
            B = torch.cat([B, B.new_zeros(B.shape[0], rank - own)], 1)
        found[name] = LoraLayer(A, B, float(A.shape[0]))
    return found


class _NoText:
    """Tokens have no text here."""

    eos_token_id = 2

    def decode(self, tokens: Any, **_: Any) -> str:
        return ""


def engine(config: ServeConfig, used: set[int], rank: int | None = None) -> Engine:
    from adapters.serving.packing import pack

    made = Engine(LanguageModel(base(), _NoText(), "bench"), config)
    for number in used:
        made.add(number, pack([(layers(number, made.base.model, rank), 1.0)], made.base.model, made.pool.page_elems))
    return made


CONFIG = ServeConfig(pool_pages=PAGES, max_running=RUNNING, max_batch_tokens=256, max_waiting=10**6)


def ours(asked: list[Asked], config: ServeConfig = CONFIG, rank: int | None = None, adapted: bool = True) -> Any:
    """(CPU seconds, wall seconds, tokens of every request, counts)."""
    used = {one.adapter for one in asked} if adapted else set()
    made = engine(config, used, rank)
    requests = [Request(list(one.prompt), Sampling(max_tokens=one.tokens, ignore_eos=True), lambda piece: None,
                        adapter=one.adapter if adapted else None, label=str(one.adapter)) for one in asked]  # fmt: skip
    cpu, wall = time.process_time(), time.monotonic()
    for request in requests:
        made.submit(request)
    steps = 0
    while not made.idle:
        made.step()
        steps += 1
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    made.pool.check()
    counts = {"steps": steps, "loads": made.store.counts.loads, "evictions": made.store.counts.evictions}
    made.close()
    return cpu, wall, [request.answer for request in requests], counts


def peft_config(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), task_type="CAUSAL_LM")


def load(model: Any, number: int, parts: dict[str, LoraLayer]) -> str:
    """Add adapter ``number`` to a PEFT model."""
    from peft import set_peft_model_state_dict

    name = f"a{number}"
    model.add_adapter(name, peft_config(RANKS[number % len(RANKS)]))
    state = {}
    for path, layer in parts.items():
        state[f"base_model.model.{path}.lora_A.weight"] = layer.A
        state[f"base_model.model.{path}.lora_B.weight"] = layer.B
    set_peft_model_state_dict(model, state, name)
    return name


def padded(asked: list[Asked]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(one.prompt) for one in asked)
    ids = torch.tensor([[0] * (longest - len(one.prompt)) + list(one.prompt) for one in asked])
    return ids, (ids != 0).long()


def written(model: Any, asked: list[Asked], **more: Any) -> list[list[int]]:
    """A static batch: all go on until the longest one ends."""
    ids, mask = padded(asked)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max(one.tokens for one in asked),
                              do_sample=False, pad_token_id=0, **more)  # fmt: skip
    return [made[row, ids.shape[1] :].tolist()[: one.tokens] for row, one in enumerate(asked)]


def switching(asked: list[Asked]) -> Any:
    """PEFT with one adapter at a time: the oldest request and up to five others of its adapter."""
    from peft import get_peft_model

    model = get_peft_model(base(), peft_config(8)).eval()
    waiting, answers = list(enumerate(asked)), {}
    kept = {one.adapter: layers(one.adapter, model.base_model.model) for one in asked}
    cpu, wall = time.process_time(), time.monotonic()
    while waiting:
        adapter = waiting[0][1].adapter
        batch = [one for one in waiting if one[1].adapter == adapter][:6]
        waiting = [one for one in waiting if one not in batch]
        name = load(model, adapter, kept[adapter])
        model.set_adapter(name)
        found = written(model, [one for _, one in batch])
        model.delete_adapter(name)
        answers |= {number: tokens for (number, _), tokens in zip(batch, found, strict=True)}
    return time.process_time() - cpu, time.monotonic() - wall, [answers[n] for n in range(len(asked))], {}


def mixed(asked: list[Asked]) -> Any:
    """PEFT with an adapter per row, in static batches; loading is not counted."""
    from peft import get_peft_model

    model = get_peft_model(base(), peft_config(8)).eval()
    names = {number: load(model, number, layers(number, model.base_model.model))
             for number in sorted({one.adapter for one in asked})}  # fmt: skip
    answers = []
    cpu, wall = time.process_time(), time.monotonic()
    for start in range(0, len(asked), RUNNING):
        batch = asked[start : start + RUNNING]
        answers += written(model, batch, adapter_names=[names[one.adapter] for one in batch])
    return time.process_time() - cpu, time.monotonic() - wall, answers, {}


COUNT, SWITCHED, MIXED = 160, 24, 64
TIGHT = 30000
"""Pages of the pool under pressure."""
SMALL = replace(CONFIG, pool_pages=TIGHT)
HALVES = replace(SMALL, adapter_share=0.5)

ARMS: dict[str, Callable[[int], Any]] = {
    "a: 1000 adapters, uniform": lambda seed: (t := trace(COUNT, 1e6, 1000, 1.0, 1, seed), ours(t)),
    "a: 5 adapters": lambda seed: (t := trace(COUNT, 1e6, 5, 1.0, 1, seed), ours(t)),
    "a: 1000 adapters, alpha 0.3": lambda seed: (t := trace(COUNT, 1e6, 1000, 0.3, 1, seed), ours(t)),
    "a: 64 adapters": lambda seed: (t := trace(MIXED, 1e6, 64, 1.0, 1, seed), ours(t)),
    "a: little room": lambda seed: (t := trace(COUNT, 1e6, 1000, 1.0, 1, seed), ours(t, SMALL)),
    "b: PEFT, one at a time": lambda seed: (t := trace(COUNT, 1e6, 1000, 1.0, 1, seed)[:SWITCHED], switching(t)),
    "c: PEFT, adapter_names, 64 adapters": lambda seed: (t := trace(MIXED, 1e6, 64, 1.0, 1, seed), mixed(t)),
    "d: fixed halves, little room": lambda seed: (t := trace(COUNT, 1e6, 1000, 1.0, 1, seed), ours(t, HALVES)),
    "e: ranks filled up to 64": lambda seed: (t := trace(COUNT, 1e6, 1000, 1.0, 1, seed), ours(t, rank=64)),
    "f: base alone": lambda seed: (t := trace(COUNT, 1e6, 1000, 1.0, 1, seed), ours(t, adapted=False)),
}


def known() -> dict[str, Any]:
    return json.loads(FILE.read_text()) if FILE.is_file() else {}


def keep(found: dict[str, Any]) -> None:
    FILE.write_text(json.dumps(found, indent=1) + "\n")


def arms(seeds: int, only: str = "") -> None:
    kept = FILE.with_name("serving-answers.json")  # to compare arms that are run one by one; not committed
    answers: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    for seed in range(seeds):
        for name, run in ARMS.items():
            found = known()
            if only and not name.startswith(only):
                continue
            if any(one["seed"] == seed for one in found.get("arms", {}).get(name, [])):
                continue
            asked, (cpu, wall, tokens, counts) = run(seed)
            answers[f"{name} {seed}"] = tokens
            kept.write_text(json.dumps(answers))
            row = {"seed": seed, "requests": len(asked), "cpu_s": cpu, "wall_s": wall,
                   "requests_per_cpu_s": len(asked) / cpu, **counts}  # fmt: skip
            for other, reference in (("b: PEFT, one at a time", "a: 1000 adapters, uniform"),
                                     ("c: PEFT, adapter_names, 64 adapters", "a: 64 adapters"),
                                     ("d: fixed halves, little room", "a: little room"),
                                     ("a: little room", "a: 1000 adapters, uniform")):  # fmt: skip
                if name == other and f"{reference} {seed}" in answers:
                    pairs = list(zip(tokens, answers[f"{reference} {seed}"], strict=False))
                    row["equal_answers"] = sum(one == two for one, two in pairs) / len(pairs)
            found.setdefault("arms", {}).setdefault(name, []).append(row)
            keep(found)
            print(name, json.dumps(row), flush=True)


class CpuClock:
    """Seconds of CPU time, and of waiting for the next request that took none."""

    def __init__(self) -> None:
        self.skipped = 0.0

    def __call__(self) -> float:
        return time.process_time() + self.skipped


def schedulers(seed: int = 0, count: int = 240, slo: float = 1.0) -> None:
    """First-token times and attainment of a trace in bursts, at twice the rate that is served, on the CPU's clock."""
    found = known()
    rate = 2 * mean(one["requests_per_cpu_s"] for one in found["arms"]["a: 1000 adapters, uniform"])
    real = time.monotonic
    for name in ("fcfs", "cluster", "early-abort", "vtc"):
        if name in found.get("schedulers", {}):
            continue
        asked = trace(count, rate, 1000, 1.0, 4, seed)
        made = engine(replace(CONFIG, scheduler=name, slo=slo), {one.adapter for one in asked})
        clock = CpuClock()
        time.monotonic = clock
        try:
            begun, coming, requests = clock(), list(asked), []
            while coming or not made.idle:
                if made.idle and coming:
                    clock.skipped += max(0.0, begun + coming[0].arrival - clock())
                while coming and begun + coming[0].arrival <= clock():
                    one = coming.pop(0)
                    pieces: list[Piece] = []
                    how = Sampling(max_tokens=one.tokens, ignore_eos=True)
                    request = Request(list(one.prompt), how, pieces.append, adapter=one.adapter,
                                      label=str(one.adapter), arrived=begun + one.arrival)  # fmt: skip
                    requests.append(made.submit(request))
                made.step()
            whole = clock() - begun
        finally:
            time.monotonic = real
        first = [one.first_token - one.arrived for one in requests if one.first_token is not None]
        row = {"rate": rate, "cv": 4, "slo_s": slo, "requests": count, "answered": len(first),
               "requests_per_cpu_s": len(first) / whole, "first_token_mean_s": mean(first),
               "first_token_median_s": float(np.median(first)),
               "attainment": sum(one <= slo for one in first) / count}  # fmt: skip
        made.close()
        found = known()
        found.setdefault("schedulers", {})[name] = row
        keep(found)
        print(name, json.dumps(row), flush=True)


def pictures(repeats: int = 3, steps: int = 10) -> None:
    """Eight requests with eight different adapters: one batch against one after the other, and diffusers."""
    from diffusers import DiffusionPipeline

    from studio import library
    from studio.serving.pictures import Picture, PictureService

    service = PictureService.open("tinymoji", "cpu", "auto", [])
    names = ["alien", "cactus", "cupcake", "fox", "octopus", "robot", "rocket", "snowman"]
    shared = ((None, None), steps, None, "", "default")
    ask = [Picture(f"a {name}", {name: 1.0}, seed, shared) for seed, name in enumerate(names)]
    service.draw(ask)
    pipe = DiffusionPipeline.from_pretrained(library.resolve_pipeline("tinymoji"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for name in names:
        pipe.load_lora_weights(library.resolve_adapter(name), adapter_name=name)

    def by_diffusers() -> None:
        for one in ask:
            (name,) = one.weights
            pipe.set_adapters([name])
            pipe(one.prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(one.seed),
                 guidance_scale=service.pipe.usual[1])  # fmt: skip

    ways = {"one batch": lambda: service.draw(ask), "one after another": lambda: [service.draw([one]) for one in ask],
            "diffusers, one after another": by_diffusers}  # fmt: skip
    rows: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            begun = time.process_time()
            run()
            rows[name].append(time.process_time() - begun)
            print(name, rows[name][-1], flush=True)
    keep(known() | {"pictures": {"steps": steps, "cpu_s": rows}})


def report() -> None:
    """Write the tables."""
    found = known()
    rates = {name: [one["requests_per_cpu_s"] for one in rows] for name, rows in found["arms"].items()}
    lines = ["# Serving a thousand adapters", "", *__doc__.strip().splitlines()[2:], "",
             f"One thread; `{COUNT}` requests per arm (b: {SWITCHED}, c: {MIXED}), all present at the start; torch "
             f"{torch.__version__}.", "",
             "| arm | requests per CPU second (seeds) | mean | answers equal to a | loads | evictions |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, rows in found["arms"].items():
        equal = [one["equal_answers"] for one in rows if "equal_answers" in one]
        lines.append(
            f"| {name} | {', '.join(f'{value:.2f}' for value in rates[name])} | {mean(rates[name]):.2f} | "
            f"{f'{mean(equal):.3f}' if equal else ''} | {rows[-1].get('loads', '')} | {rows[-1].get('evictions', '')} |"
        )
    bars = {
        "a / b (wanted: 4)": ("a: 1000 adapters, uniform", "b: PEFT, one at a time"),
        "a / c, 64 adapters (wanted: 2)": ("a: 64 adapters", "c: PEFT, adapter_names, 64 adapters"),
        "a / d, little room (wanted: 1.1)": ("a: little room", "d: fixed halves, little room"),
        "a / e": ("a: 1000 adapters, uniform", "e: ranks filled up to 64"),
        "a / f (wanted: 0.7)": ("a: 1000 adapters, uniform", "f: base alone"),
        "1000 adapters / 5 (wanted: 0.9)": ("a: 1000 adapters, uniform", "a: 5 adapters"),
    }
    lines += ["", "| ratio | measured |", "|---|---|"]
    lines += [f"| {name} | {mean(rates[one]) / mean(rates[two]):.2f} |" for name, (one, two) in bars.items()
              if one in rates and two in rates]  # fmt: skip
    if "schedulers" in found:
        keys = ("answered", "requests_per_cpu_s", "first_token_mean_s", "first_token_median_s", "attainment")
        some = next(iter(found["schedulers"].values()))
        lines += ["", f"Schedulers, {some['requests']} requests in bursts (cv 4) at {some['rate']:.1f} per second of "
                  f"CPU time, twice what is served; attainment: first token within {some['slo_s']:g} s, of all "
                  "requests (dropped ones count as missed); one seed.", "", f"| scheduler | {' | '.join(keys)} |",
                  "|---" * (len(keys) + 1) + "|"]  # fmt: skip
        lines += [f"| {name} | {' | '.join(f'{row[key]:.3g}' for key in keys)} |"
                  for name, row in found["schedulers"].items()]  # fmt: skip
    if "pictures" in found:
        rows = found["pictures"]["cpu_s"]
        steps = found["pictures"]["steps"]
        lines += ["", f"Eight pictures with eight adapters (tinymoji, {steps} steps), CPU seconds:", "",
                  "| way | runs | mean | to one batch |", "|---|---|---|---|"]  # fmt: skip
        lines += [f"| {name} | {', '.join(f'{one:.2f}' for one in each)} | {mean(each):.2f} | "
                  f"{mean(each) / mean(rows['one batch']):.2f} |" for name, each in rows.items()]  # fmt: skip
    FILE.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("arms", "schedulers", "pictures", "report"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="arms whose names begin so")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.part == "arms":
        arms(chosen.seeds, chosen.only)
    else:
        {"schedulers": schedulers, "pictures": pictures, "report": report}[chosen.part]()


if __name__ == "__main__":
    main()
