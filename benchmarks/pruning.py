"""LoRAM and LoRAPrune on a byte-level Llama of four layers, trained here on one text and adapted to another.

The base learns the Jargon File, the task is the King James Bible; both come from Debian packages, none is shipped here:

    apt-get download bible-kjv bible-kjv-text jargon-text && for f in *.deb; do dpkg-deb -x $f x; done
    (cd x/usr/lib && ../bin/bible -l0 -f gen1:1-rev22:21) > bible.txt
    zcat x/usr/share/doc/jargon-text/jargon.txt.gz > jargon.txt
    python -m benchmarks.pruning bible.txt jargon.txt            # about 15 minutes of one CPU core
    python -m benchmarks.pruning bible.txt jargon.txt --report   # writes the table again from the .json

LoRAM prunes layers 1-3 (65% of the channels, half of the heads) and trains a LoRA for 100 steps of 8 x 128 bytes, with
and without 100 steps of alignment; LoRAPrune prunes layers 1-2 to half in 120 steps, judged by four criteria. Losses
are nats per byte on held-out text. Writes benchmarks/results/pruning.{json,md}.
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
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.compression import importance
from adapters.compression.loram import recovered
from adapters.compression.loraprune import LoraPrune, Settings
from adapters.compression.slicing import MEMBERS, small_model
from adapters.compression.structure import Pruning, linear_parameters, sizes_of
from adapters.layers.variant import pair, read_layers
from adapters.plugin import Handles

RESULTS = Path(__file__).parent / "results" / "pruning.json"
SEEDS = (0, 1, 2)
BATCH, LENGTH, BASE_STEPS = 8, 128, 800
RATE, BASE_RATE, ALIGN_RATE = 2e-3, 3e-3, 1e-3
LORAM_STEPS, ALIGN_STEPS, PRUNE_STEPS, EVERY = 100, 100, 120, 10
CRITERIA = ("lora", "gradient", "magnitude", "random")
TARGETS = [name.rpartition(".")[2] for name in MEMBERS]
CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


class Text:
    """Bytes of a file; the last tenth is held out."""

    def __init__(self, file: Path) -> None:
        data = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8).long()
        cut = len(data) * 9 // 10
        self.shown, self.held = data[:cut], data[cut:]

    def batch(self, seed: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(0, len(self.shown) - LENGTH, (BATCH,), generator=generator)
        return torch.stack([self.shown[start : start + LENGTH] for start in starts.tolist()])

    def windows(self) -> Tensor:
        """64 windows of held-out text, evenly spaced."""
        starts = torch.linspace(0, len(self.held) - LENGTH, 64).long()
        return torch.stack([self.held[start : start + LENGTH] for start in starts.tolist()])


@torch.no_grad()
def loss_of(model: Any, text: Text) -> float:
    ids = text.windows()
    return float(model.eval()(input_ids=ids, labels=ids).loss)


def learn(
    model: Any, text: Text, steps: int, rate: float, seed: int, before_step: Callable[[int], None] = lambda _: None
) -> None:
    """AdamW with a cosine schedule on every parameter that learns."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step in range(steps):
        ids = text.batch(seed, step)
        optimizer.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        before_step(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()


def base_of(text: Text, cache: Path) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    if cache.is_file():
        model.load_state_dict(torch.load(cache, weights_only=True))
        return model
    learn(model, text, BASE_STEPS, BASE_RATE, 99)
    torch.save(model.state_dict(), cache)
    return model


def with_lora(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))


def both(model: Any, old: Text, new: Text) -> dict[str, float]:
    return {"jargon": round(loss_of(model, old), 4), "bible": round(loss_of(model, new), 4)}


# ------------------------------------------------------------------------------------------------ LoRAM


def loram_arm(base: Any, old: Text, new: Text, seed: int, aligned: bool) -> dict[str, Any]:
    """Prune, align, train, recover."""
    whole, sizes = copy.deepcopy(base), sizes_of(base.config)
    ids = [new.batch(seed + 50, step) for step in range(10)]
    losses = [lambda one=one: whole(input_ids=one, labels=one).loss for one in ids]
    scores = importance.taylor(whole, sizes, [1, 2, 3], losses)
    kept = importance.best(sizes, scores, 2, sizes.channels - math.ceil(sizes.channels * 0.65))
    pruning = Pruning(sizes, kept, "loram taylor", 0.65)
    small = small_model(copy.deepcopy(base), pruning)
    found: dict[str, Any] = {"cut": both(small, old, new)}
    if aligned:
        small.requires_grad_(True)
        small.lm_head.requires_grad_(False)
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


def loraprune_arm(base: Any, old: Text, new: Text, seed: int, criterion: Any) -> dict[str, Any]:
    """Prune while a LoRA learns the source text; the cut and merged model is measured."""
    plugin = LoraPrune(Settings(0.5, EVERY, keep_first=1, keep_last=1, criterion=criterion))
    plugin.configure(object())
    model = copy.deepcopy(base)
    plugin.before_inject({"model": model})
    adapted = with_lora(model, seed)
    handles = Handles({"model": adapted}, steps=PRUNE_STEPS, seed=seed)
    plugin.initialise(handles)
    plugin.after_inject(handles)
    learn(adapted, old, PRUNE_STEPS, RATE, seed, plugin.grads_ready)
    merged = copy.deepcopy(base)
    for name, layer in read_layers(adapted).items():
        merged.get_parameter(f"{name}.weight").data.add_(layer.delta())
    small = small_model(merged, plugin.pruning())
    with_masks, cut = loss_of(adapted, old), loss_of(small, old)
    assert abs(with_masks - cut) < 1e-4, (with_masks, cut)
    lora = sum(p.numel() * 4 for _, _, layer in plugin.layers.values() for p in pair(layer))
    dense = sum(layer.base_layer.weight.numel() * 4 for _, _, layer in plugin.layers.values())
    return both(small, old, new) | {"parameters": small.num_parameters(), "lora_bytes": lora, "dense_bytes": dense}


# ------------------------------------------------------------------------------------------------ run and report


def measure(bible: Path, jargon: Path, cache: Path) -> None:
    """All runs; the .json is written after each."""
    torch.set_num_threads(1)
    old, new = Text(jargon), Text(bible)
    begun, worked = time.perf_counter(), time.process_time()
    base = base_of(old, cache)
    found: dict[str, Any] = {"base": both(base, old, new) | {"parameters": base.num_parameters()}, "runs": []}
    print("base", found["base"], flush=True)
    arms: dict[str, Callable[[int], dict[str, Any]]] = {
        "full LoRA": lambda seed: full_arm(base, old, new, seed),
        "LoRAM": lambda seed: loram_arm(base, old, new, seed, False),
        "LoRAM aligned": lambda seed: loram_arm(base, old, new, seed, True),
        **{f"LoRAPrune {c}": lambda seed, c=c: loraprune_arm(base, old, new, seed, c) for c in CRITERIA},
    }  # fmt: skip
    for seed in SEEDS:
        for name, arm in arms.items():
            found["runs"].append({"arm": name, "seed": seed, **arm(seed)})
            print(found["runs"][-1], flush=True)
            found |= {"seconds": round(time.perf_counter() - begun, 1), "machine": platform.machine(),
                      "cpu_seconds": round(time.process_time() - worked, 1), "torch": torch.__version__}  # fmt: skip
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def mean(found: dict[str, Any], arm: str, *keys: str) -> float:
    """Mean over the seeds."""

    def value(run: Any) -> float:
        for key in keys:
            run = run[key]
        return float(run)

    return statistics.mean(value(run) for run in found["runs"] if run["arm"] == arm)


def report(found: dict[str, Any]) -> str:
    base, seeds = found["base"], len({run["seed"] for run in found["runs"]})
    lines = [
        "# Pruned bases: LoRAM and LoRAPrune", "",
        f"Byte-level Llama of {base['parameters']:,} parameters, {BASE_STEPS} steps of {BATCH} x {LENGTH} bytes of the "
        f"Jargon File: {base['jargon']:.3f} nats per byte there, {base['bible']:.3f} on the Bible (both held out). "
        f"Means of {seeds} seeds; made with `python -m benchmarks.pruning` in {found['cpu_seconds']:.0f} s of one "
        "CPU core.",
        "",
        "## LoRAM: the LoRA learns the Bible on a pruned model (Jargon File / Bible)", "",
        "| arm | pruned base | pruned + LoRA | whole base + recovered LoRA | Bible, by seed |", "|---|---|---|---|---|",
    ]  # fmt: skip

    def cell(arm: str, *keys: str) -> str:
        return " / ".join(f"{mean(found, arm, *keys, text):.3f}" for text in ("jargon", "bible"))

    def by_seed(arm: str, *keys: str) -> str:
        runs = [run for run in found["runs"] if run["arm"] == arm]
        return ", ".join(f"{(run[keys[0]] if keys else run)['bible']:.3f}" for run in runs)

    lines.append(f"| LoRA of the whole base | - | - | {cell('full LoRA')} | {by_seed('full LoRA')} |")
    for arm, start in (("LoRAM", "cut"), ("LoRAM aligned", "aligned")):
        lines.append(f"| {arm} | {cell(arm, start)} | {cell(arm, 'pruned_lora')} | {cell(arm, 'recovered')} | "
                     f"{by_seed(arm, 'recovered')} |")  # fmt: skip
    lines += ["", "| bar | wanted | found | |", "|---|---|---|---|"]
    gain = base["bible"] - mean(found, "full LoRA", "bible")
    bars: list[tuple[str, str, float, bool]] = []
    for arm in ("LoRAM", "LoRAM aligned"):
        share = (base["bible"] - mean(found, arm, "recovered", "bible")) / gain
        bars.append((f"{arm}: share of the full LoRA's gain on the task", ">= 0.60", share, share >= 0.6))
    ahead = mean(found, "LoRAM", "pruned_lora", "jargon") - mean(found, "LoRAM", "recovered", "jargon")
    bars.append(("recovered better than pruned + LoRA on the source", ">= 0.10", ahead, ahead >= 0.1))
    lower = mean(found, "LoRAM aligned", "cut", "jargon") - mean(found, "LoRAM aligned", "aligned", "jargon")
    bars.append(("alignment lowers the pruned base's source loss by", "> 0", lower, lower > 0))
    frozen = mean(found, "LoRAM", "frozen")
    bars.append(("linear weights left of the whole model's", "<= 0.55 (spec's own run: 0.57)", frozen, frozen <= 0.55))
    lines += [f"| {what} | {wanted} | {value:.3f} | {'yes' if met else 'no'} |" for what, wanted, value, met in bars]
    lines += ["", "## LoRAPrune: layers 1 and 2 of 4 to half, judged by four criteria", "",
              "| criterion | Jargon File | by seed | Bible |", "|---|---|---|---|"]  # fmt: skip
    for criterion in CRITERIA:
        arm = f"LoRAPrune {criterion}"
        each = ", ".join(f"{run['jargon']:.3f}" for run in found["runs"] if run["arm"] == arm)
        lines.append(f"| {criterion} | {mean(found, arm, 'jargon'):.4f} | {each} | {mean(found, arm, 'bible'):.4f} |")
    ours = mean(found, "LoRAPrune lora", "jargon")
    first = next(run for run in found["runs"] if run["arm"] == "LoRAPrune lora")
    gaps = {c: mean(found, f"LoRAPrune {c}", "jargon") - ours for c in CRITERIA}
    memory = first["lora_bytes"] / first["dense_bytes"]
    bars = [
        ("random minus lora", ">= 0.03", gaps["random"], gaps["random"] >= 0.03),
        ("lora minus true gradient", "<= 0.02", -gaps["gradient"], gaps["gradient"] >= -0.02),
        ("lora minus magnitude", "<= 0.02", -gaps["magnitude"], gaps["magnitude"] >= -0.02),
        ("bytes of gradients, lora over true gradient (rank 8)", "<= 0.10", memory, memory <= 0.1),
    ]
    lines += ["", "| bar | wanted | found | |", "|---|---|---|---|"]
    lines += [f"| {what} | {wanted} | {value:.4f} | {'yes' if met else 'no'} |" for what, wanted, value, met in bars]
    lines += [
        "", f"The pruned models have {first['parameters']:,} parameters.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bible", type=Path)
    parser.add_argument("jargon", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("pruning-base.pt"), help="where the trained base is kept")
    parser.add_argument("--report", action="store_true", help="only write the table from the .json")
    given = parser.parse_args()
    if not given.report:
        measure(given.bible, given.jargon, given.cache)
    text = report(json.loads(RESULTS.read_text(encoding="utf-8")))
    RESULTS.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
