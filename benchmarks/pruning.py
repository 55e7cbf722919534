"""LoRAM and LoRAPrune on the byte-level Llama of :mod:`benchmarks.tiny_llama` (which says where its texts come from).

    python -m benchmarks.pruning --texts DIR             # goes on after the runs that are in the .json
    python -m benchmarks.pruning --report                # writes the table again from the .json

LoRAM prunes layers 1-3 (60% of the channels, two of four key-value heads) and trains a LoRA for 100 steps of 8 x 128
bytes of the Bible, with and without 100 steps of alignment on Shakespeare; LoRAPrune prunes layers 1-2 to half in 120
steps of Shakespeare, judged by four criteria. Writes benchmarks/results/pruning.{json,md} after every run.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adapters.compression import importance
from adapters.compression.loram import recovered
from adapters.compression.loraprune import LoraPrune, Settings
from adapters.compression.slicing import masked, small_model
from adapters.compression.structure import Kept, Pruning, linear_parameters, sizes_of
from adapters.layers.variant import pair, read_layers
from adapters.plugin import Handles
from benchmarks import tiny_llama
from benchmarks.tiny_llama import Text, learn, loss_of, with_lora

RESULTS = Path(__file__).parent / "results" / "pruning.json"
SEEDS = (0, 1, 2)
RATE, ALIGN_RATE = 2e-3, 1e-3
LORAM_STEPS, ALIGN_STEPS, PRUNE_STEPS, EVERY = 100, 100, 120, 10
CHANNELS, HEADS = 0.6, 2
CRITERIA = ("lora", "gradient", "magnitude", "random")


def both(model: Any, old: Text, new: Text) -> dict[str, float]:
    return {"shakespeare": round(loss_of(model, old), 4), "bible": round(loss_of(model, new), 4)}


# ------------------------------------------------------------------------------------------------ LoRAM


def loram_arm(base: Any, old: Text, new: Text, seed: int, aligned: bool) -> dict[str, Any]:
    """Prune, align, train, recover."""
    whole, sizes = copy.deepcopy(base), sizes_of(base.config)
    ids = [new.batch(seed + 50, step) for step in range(10)]
    losses = [lambda one=one: whole(input_ids=one, labels=one).loss for one in ids]
    scores = importance.taylor(whole, sizes, [1, 2, 3], losses)
    kept = importance.best(sizes, scores, HEADS, sizes.channels - math.ceil(sizes.channels * CHANNELS))
    pruning = Pruning(sizes, kept, "loram taylor", CHANNELS)
    small = small_model(copy.deepcopy(base), pruning)
    found: dict[str, Any] = {"cut": both(small, old, new)}
    if aligned:
        small.requires_grad_(True)  # the head too: it is the embedding
        learn(small, old, ALIGN_STEPS, ALIGN_RATE, seed)
        small.requires_grad_(False)
        found["aligned"] = both(small, old, new)
    adapted = with_lora(small, seed)
    learn(adapted, new, LORAM_STEPS, RATE, seed)
    layers = recovered(read_layers(adapted), replace(pruning, aligned=aligned))
    for name, layer in layers.items():
        whole.get_parameter(f"{name}.weight").data.add_(layer.delta())
    frozen = linear_parameters(sizes, pruning.counts()) / linear_parameters(sizes)
    return found | {"pruned_lora": both(adapted, old, new), "recovered": both(whole, old, new), "frozen": frozen}


def full_arm(base: Any, old: Text, new: Text, seed: int) -> dict[str, float]:
    """An ordinary LoRA of the whole model."""
    adapted = with_lora(copy.deepcopy(base), seed)
    learn(adapted, new, LORAM_STEPS, RATE, seed)
    return both(adapted, old, new)


# ------------------------------------------------------------------------------------------------ LoRAPrune


def judged(base: Any, seed: int, criterion: Any) -> tuple[LoraPrune, Any]:
    """A copy of the base with a LoRA and the plugin on it."""
    plugin = LoraPrune(Settings(0.5, EVERY, keep_first=1, keep_last=1, criterion=criterion))
    plugin.configure(object())
    model = copy.deepcopy(base)
    plugin.before_inject({"model": model})
    adapted = with_lora(model, seed)
    handles = Handles({"model": adapted}, steps=PRUNE_STEPS, seed=seed)
    plugin.initialise(handles)
    plugin.after_inject(handles)
    return plugin, adapted


def loraprune_arm(base: Any, old: Text, new: Text, seed: int, criterion: Any) -> dict[str, Any]:
    """Prune while a LoRA learns the source text; the cut and merged model is measured."""
    plugin, adapted = judged(base, seed, criterion)
    learn(adapted, old, PRUNE_STEPS, RATE, seed, before_step=plugin.grads_ready)
    merged = copy.deepcopy(base)
    for name, layer in read_layers(adapted).items():
        merged.get_parameter(f"{name}.weight").data.add_(layer.delta())
    small = small_model(merged, plugin.pruning())
    with_masks, cut = loss_of(adapted, old), loss_of(small, old)
    assert abs(with_masks - cut) < 1e-4, (with_masks, cut)
    lora = sum(p.numel() * 4 for _, _, layer in plugin.layers.values() for p in pair(layer))
    dense = sum(layer.base_layer.weight.numel() * 4 for _, _, layer in plugin.layers.values())
    return both(small, old, new) | {"parameters": small.num_parameters(), "lora_bytes": lora, "dense_bytes": dense}


def agreement(base: Any, text: Text) -> dict[str, Any]:
    """What the criteria keep of layers 1 and 2 after ten steps, and how much higher the loss is without each head."""
    sizes, blocks, ids = sizes_of(base.config), (1, 2), text.held[::4]

    def loss(cut: dict[int, int]) -> float:
        layers = tuple(
            Kept(tuple(h for h in range(sizes.kv_heads) if h != cut[i])) if i in cut else Kept()
            for i in range(sizes.layers)
        )
        model = copy.deepcopy(base)
        model.load_state_dict(masked(base.state_dict(), Pruning(sizes, layers)))
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    whole = loss({})
    found: dict[str, Any] = {
        "without_head": {i: [round(loss({i: h}) - whole, 4) for h in range(sizes.kv_heads)] for i in blocks}
    }
    channels: dict[str, list[set[int]]] = {}
    for criterion in CRITERIA[:3]:
        plugin, adapted = judged(base, 0, criterion)
        for step in range(10):
            batch = text.batch(0, step)
            adapted.zero_grad()
            adapted.train()(input_ids=batch, labels=batch).loss.backward()
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.05 * parameter.grad
            plugin._update()
        means = [plugin.means[i] for i in blocks]
        heads = [importance.highest(one.heads, HEADS) for one in means]
        found[f"{criterion}_heads"] = dict(zip(blocks, heads, strict=True))
        channels[criterion] = [set(importance.highest(one.channels, sizes.channels // 2)) for one in means]
    for one, other in (("lora", "gradient"), ("lora", "magnitude")):
        pairs = zip(channels[one], channels[other], strict=True)
        found[f"channels_in_common_{one}_{other}"] = [len(mine & theirs) for mine, theirs in pairs]
    return found | {"channels_kept": sizes.channels // 2}


# ------------------------------------------------------------------------------------------------ run and report


def measure(asked: argparse.Namespace) -> None:
    """The runs that are not in the .json yet, which is written after each."""
    torch.set_num_threads(1)
    base, texts = tiny_llama.opened(asked)
    old, new = texts["shakespeare"], texts["bible"]
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"runs": []}
    found |= {"base": both(base, old, new) | {"parameters": base.num_parameters()}, "machine": platform.machine(),
              "torch": torch.__version__}  # fmt: skip
    print("base", found["base"], flush=True)
    if asked.agreement:
        found["agreement"] = agreement(base, old)
        print(found["agreement"], flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    arms: dict[str, Callable[[int], dict[str, Any]]] = {
        "full LoRA": lambda seed: full_arm(base, old, new, seed),
        "LoRAM": lambda seed: loram_arm(base, old, new, seed, False),
        "LoRAM aligned": lambda seed: loram_arm(base, old, new, seed, True),
        **{f"LoRAPrune {c}": lambda seed, c=c: loraprune_arm(base, old, new, seed, c) for c in CRITERIA},
    }  # fmt: skip
    done = {(run["arm"], run["seed"]) for run in found["runs"]}
    for seed, name in ((seed, name) for seed in asked.seeds for name in arms if (name, seed) not in done):
        worked = time.process_time()
        run = {"arm": name, "seed": seed, **arms[name](seed)}
        found["runs"].append(run | {"cpu_seconds": round(time.process_time() - worked, 1)})
        print(found["runs"][-1], flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def mean(found: dict[str, Any], arm: str, *keys: str) -> float:
    """Mean over the seeds; not a number where an arm has not run."""

    def value(run: Any) -> float:
        for key in keys:
            run = run[key]
        return float(run)

    values = [value(run) for run in found["runs"] if run["arm"] == arm]
    return statistics.mean(values) if values else math.nan


def report(found: dict[str, Any]) -> str:
    base, seeds = found["base"], len({run["seed"] for run in found["runs"]})
    lines = [
        "# Pruned bases: LoRAM and LoRAPrune", "",
        f"Byte-level Llama of {base['parameters']:,} parameters, trained on Shakespeare: {base['shakespeare']:.3f} "
        f"nats per byte there, {base['bible']:.3f} on the Bible (both held out). Means of the seeds shown (up to "
        f"{seeds}); made with `python -m benchmarks.pruning` in "
        f"{sum(run['cpu_seconds'] for run in found['runs']):.0f} s of one CPU core after the base.",
        "",
        "## LoRAM: the LoRA learns the Bible on a pruned model (Shakespeare / Bible)", "",
        "| arm | pruned base | pruned + LoRA | whole base + recovered LoRA | Bible, by seed |", "|---|---|---|---|---|",
    ]  # fmt: skip

    def cell(arm: str, *keys: str) -> str:
        return " / ".join(f"{mean(found, arm, *keys, text):.3f}" for text in ("shakespeare", "bible"))

    def by_seed(arm: str, *keys: str) -> str:
        runs = [run for run in found["runs"] if run["arm"] == arm]
        return ", ".join(f"{(run[keys[0]] if keys else run)['bible']:.3f}" for run in runs)

    lines.append(f"| LoRA of the whole base | - | - | {cell('full LoRA')} | {by_seed('full LoRA')} |")
    for arm, start in (("LoRAM", "cut"), ("LoRAM aligned", "aligned")):
        if math.isnan(mean(found, arm, "frozen")):
            continue
        lines.append(f"| {arm} | {cell(arm, start)} | {cell(arm, 'pruned_lora')} | {cell(arm, 'recovered')} | "
                     f"{by_seed(arm, 'recovered')} |")  # fmt: skip
    lines += ["", "| bar | wanted | found | |", "|---|---|---|---|"]
    gain = base["bible"] - mean(found, "full LoRA", "bible")
    bars: list[tuple[str, str, float, bool]] = []
    for arm in ("LoRAM", "LoRAM aligned"):
        share = (base["bible"] - mean(found, arm, "recovered", "bible")) / gain
        bars.append((f"{arm}: share of the full LoRA's gain on the task", ">= 0.60", share, share >= 0.6))
    ahead = mean(found, "LoRAM", "pruned_lora", "shakespeare") - mean(found, "LoRAM", "recovered", "shakespeare")
    bars.append(("recovered better than pruned + LoRA on the source", ">= 0.10", ahead, ahead >= 0.1))
    lower = mean(found, "LoRAM aligned", "cut", "shakespeare") - mean(found, "LoRAM aligned", "aligned", "shakespeare")
    bars.append(("alignment lowers the pruned base's source loss by", "> 0", lower, lower > 0))
    frozen = mean(found, "LoRAM", "frozen")
    bars.append(("linear weights left of the whole model's", "<= 0.55 (spec's own run: 0.57)", frozen, frozen <= 0.55))
    lines += [f"| {what} | {wanted} | {value:.3f} | {'yes' if met else 'no'} |" for what, wanted, value, met in bars
              if not math.isnan(value)]  # fmt: skip
    lines += ["", "## LoRAPrune: layers 1 and 2 of 4 to half, judged by four criteria", "",
              "| criterion | Shakespeare | by seed | Bible |", "|---|---|---|---|"]  # fmt: skip
    for criterion in CRITERIA:
        arm = f"LoRAPrune {criterion}"
        each = ", ".join(f"{run['shakespeare']:.3f}" for run in found["runs"] if run["arm"] == arm)
        own, other = (mean(found, arm, text) for text in ("shakespeare", "bible"))
        if not each:
            continue
        lines.append(f"| {criterion} | {own:.4f} | {each} | {other:.4f} |")
    ours = mean(found, "LoRAPrune lora", "shakespeare")
    first = next((run for run in found["runs"] if run["arm"] == "LoRAPrune lora"), None)
    gaps = {c: mean(found, f"LoRAPrune {c}", "shakespeare") - ours for c in CRITERIA}
    memory = first["lora_bytes"] / first["dense_bytes"] if first else math.nan
    bars = [
        ("random minus lora", ">= 0.03", gaps["random"], gaps["random"] >= 0.03),
        ("lora minus true gradient", "<= 0.02", -gaps["gradient"], gaps["gradient"] >= -0.02),
        ("lora minus magnitude", "<= 0.02", -gaps["magnitude"], gaps["magnitude"] >= -0.02),
        ("bytes of gradients, lora over true gradient (rank 8)", "<= 0.10", memory, memory <= 0.1),
    ]
    lines += ["", "| bar | wanted | found | |", "|---|---|---|---|"]
    lines += [f"| {what} | {wanted} | {value:.4f} | {'yes' if met else 'no'} |" for what, wanted, value, met in bars
              if not math.isnan(value)]  # fmt: skip
    if "agreement" in found:
        same = found["agreement"]
        lines += ["", "After ten steps the criteria keep these key-value heads of layers 1 and 2: "
                  + "; ".join(f"{c} {list(same[f'{c}_heads'].values())}" for c in CRITERIA[:3])
                  + f". Of {same['channels_kept']} channels they keep in common: lora and true gradient "
                  + f"{same['channels_in_common_lora_gradient']}, lora and magnitude "
                  + f"{same['channels_in_common_lora_magnitude']}. Loss that is lost with each head alone: "
                  + f"{list(same['without_head'].values())}."]  # fmt: skip
    if first:
        lines += ["", f"The pruned models have {first['parameters']:,} parameters."]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tiny_llama.add_arguments(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--agreement", action="store_true", help="compare what the criteria keep, without the runs")
    parser.add_argument("--report", action="store_true", help="only write the table from the .json")
    asked = parser.parse_args()
    if not asked.report:
        measure(asked)
    text = report(json.loads(RESULTS.read_text(encoding="utf-8")))
    RESULTS.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
