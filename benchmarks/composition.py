"""Composition against other programs' ways: how long one picture's denoising takes.

    python -m benchmarks.composition [--models tinymoji,random9m] [--rounds 5] [--write]
    python -m benchmarks.composition --even [--write]

Compared, on the same base, adapters, prompt, seed, sampler and guidance, 25 steps (what a call does by itself):

bare        diffusers' pipeline without adapters, in the same passes: for composite, N pictures at once.
ours        our pipeline: adapters in the weights where that pays (``fold``).
beside      ours with ``fold=False``: adapters beside the weights.
theirs      composite: the official program's loop (maszhongming/Multi-LoRA-Composition): per step and adapter
            ``pipe.set_adapters``, then the denoiser with ``cross_attention_kwargs={"scale": ...}``; N passes,
            predictions averaged. switch: its callback, ``pipe.set_adapters`` when the turn changes.
            merge: ``pipe.set_adapters(all, weights)`` in diffusers.
fused       merge: the same after diffusers' ``fuse_lora`` and ``unload_lora_weights``, not counted in the time.
change      writing new gates, per step.

With N adapters in use and N or 22 loaded (22 is the number of the paper's test set), at two latent sizes. Times are CPU
times of one process with the programs taking turns, so that other load on the machine affects all alike: medians, and
for what ours, beside and fused take over bare, the median of the ratios of single rounds (theirs runs in every third).

``--even`` measures after how many calls of the denoiser folding has paid: the time of making the weights over what a
call then saves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
STEPS = 25
SIZES = (8, 16)
"""Sides of the latents."""
RANK = 8
PROMPT = "a flat icon of a red apple left of a dog"
GUIDANCE = 5.0


def tinymoji() -> Any:
    """The embedded base model."""
    from diffusers import StableDiffusionPipeline

    folder = Path(__file__).parents[1] / "assets/models/tinymoji"
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random9m() -> Any:
    """A random Stable Diffusion of 9 million parameters, heads 32 wide."""
    from tests import tiny

    return tiny.sd(
        block_out_channels=(64, 96, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=(2, 3, 4),  # diffusers calls the number of heads so
    )


MODELS: dict[str, Callable[[], Any]] = {"tinymoji": tinymoji, "random9m": random9m}


def adapters(pipe: Any, count: int) -> list[dict[str, Tensor]]:
    """Random LoRAs on the attention layers, as diffusers state dicts."""
    made = []
    modules = {
        name: module
        for name, module in pipe.unet.named_modules()
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    }
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for name, module in modules.items():
            out, into = module.weight.shape
            state[f"unet.{name}.lora_A.weight"] = torch.randn(RANK, into, generator=generator) / into**0.5
            state[f"unet.{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.2 / RANK**0.5
        made.append(state)
    return made


class Official:
    """The official program's semantics on diffusers and PEFT."""

    def __init__(self, pipe: Any, states: list[dict[str, Tensor]]) -> None:
        self.pipe = pipe
        self.size = 0
        for k, state in enumerate(states):
            pipe.load_lora_weights(dict(state), adapter_name=f"a{k}")

    @torch.no_grad()
    def composite(self, count: int) -> Tensor:
        """N passes per step, ``set_adapters`` before each."""
        pipe = self.pipe
        positive, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
        text = torch.cat([negative, positive])
        pipe.scheduler.set_timesteps(STEPS)
        latents = start(pipe, self.size)
        for t in pipe.scheduler.timesteps:
            wide = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), t)
            guided = []
            for k in range(count):
                pipe.set_adapters(f"a{k}")
                noise = pipe.unet(
                    wide, t, encoder_hidden_states=text, cross_attention_kwargs={"scale": 1.0}, return_dict=False
                )[0]
                without, with_text = noise.chunk(2)
                guided.append(without + GUIDANCE * (with_text - without))
            latents = pipe.scheduler.step(torch.stack(guided).mean(0), t, latents, return_dict=False)[0]
        return latents

    def switch(self, count: int) -> Tensor:
        """A callback that changes the adapter after each step."""

        def change(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe.set_adapters(f"a{(index + 1) % count}")
            return {}

        self.pipe.set_adapters("a0")
        return self._picture(callback_on_step_end=change)

    def merge(self, count: int) -> Tensor:
        """diffusers' own way to use several adapters."""
        self.pipe.set_adapters([f"a{k}" for k in range(count)], [0.8] * count)
        return self._picture()

    def _picture(self, **extra: Any) -> Tensor:
        return self.pipe(
            PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=start(self.pipe, self.size),
            **pixels(self.pipe, self.size),
            output_type="latent",
            cross_attention_kwargs={"scale": 1.0},
            **extra,
        ).images


class Ours:
    """The same through MultiLoRAPipeline."""

    def __init__(self, pipe: Any, states: list[dict[str, Tensor]]) -> None:
        from adapters.formats.diffusers_file import parse_diffusers
        from pipelines.diffusion import MultiLoRAPipeline

        self.fold = True
        self.merged = MultiLoRAPipeline(pipe)
        self.alone = MultiLoRAPipeline(pipe)
        self.size = 0
        for k, state in enumerate(states):
            file = parse_diffusers(state, {}, "benchmark")
            self.merged.load_lora(file, f"a{k}", weight=0.8)
            self.alone.load_lora(file, f"a{k}")

    def beside(self, method: str, count: int) -> Tensor:
        """With adapters beside the weights."""
        self.fold = False
        try:
            made: Tensor = getattr(self, method)(count)
        finally:
            self.fold = True
        return made

    def composite(self, count: int) -> Tensor:
        return self._picture(self.alone, "composite", count)

    def switch(self, count: int) -> Tensor:
        return self._picture(self.alone, "switch", count)

    def merge(self, count: int) -> Tensor:
        return self._picture(self.merged, "merge", count)

    def _picture(self, composer: Any, method: str, count: int) -> Tensor:
        names = tuple(f"a{k}" for k in range(count))
        now = composer.composition
        if (now.method, now.adapters, now.fold) != (method, names, self.fold):
            composer.compose(method, names, fold=self.fold)
        result: Tensor = composer(
            PROMPT,
            steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type="latent",
            seed=0,
            **pixels(composer.pipe, self.size),
        ).images
        return result


def start(pipe: Any, size: int) -> Tensor:
    """The first noise, as seed 0 makes it in our pipeline."""
    return torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0)) * pipe.scheduler.init_noise_sigma


def pixels(pipe: Any, size: int) -> dict[str, int]:
    """The picture's size for latents of ``size`` x ``size``."""
    return {"width": size * pipe.vae_scale_factor, "height": size * pipe.vae_scale_factor}


def bare(pipe: Any, size: int, pictures: int) -> Tensor:
    """The pipeline without adapters."""
    result: Tensor = pipe(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(0) for _ in range(pictures)],
        num_images_per_prompt=pictures,
        output_type="latent",
        **pixels(pipe, size),
    ).images
    return result


def fused(make: Callable[[], Any], states: list[dict[str, Tensor]], count: int) -> Any:
    """diffusers' pipeline with the merge in its weights."""
    pipe = make()
    for k, state in enumerate(states[:count]):
        pipe.load_lora_weights(dict(state), adapter_name=f"a{k}")
    pipe.set_adapters([f"a{k}" for k in range(count)], [0.8] * count)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe


RARE = {"theirs": 3}
"""Programs that run in every so many rounds only."""


def interleaved(programs: dict[str, Callable[[], Tensor]], rounds: int) -> tuple[dict[str, list[float]], float]:
    """CPU seconds of each program, and the largest difference of the results but bare's."""
    results = {name: program() for name, program in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for k in range(rounds):
        order = list(programs) if k % 2 == 0 else list(programs)[::-1]
        for name in order:
            if k % RARE.get(name, 1):
                continue
            before = time.process_time()
            programs[name]()
            times[name].append(time.process_time() - before)
    first = results["ours"]
    difference = max(float((first - other).abs().max()) for name, other in results.items() if name != "bare")
    return times, difference


def over(times: dict[str, list[float]], name: str) -> float:
    """Median ratio of a program's time to the bare one's of the same round."""
    return round(statistics.median(own / free for own, free in zip(times[name], times["bare"], strict=True)), 3)


def gate_change(ours: Ours, count: int) -> float:
    """Milliseconds to write the gates of another adapter (median of 200)."""
    ours.alone.compose("switch", [f"a{k}" for k in range(count)])
    ours._picture(ours.alone, "switch", count)
    gates = ours.alone.joined().denoiser.gates
    values = []
    for k in range(200):
        before = time.perf_counter()
        gates.joint([1.0 if i == k % count else 0.0 for i in range(count)])
        values.append(time.perf_counter() - before)
    return 1000 * statistics.median(values)


def measure(model: str, rounds: int) -> list[dict[str, Any]]:
    """All rows of one model."""
    rows = []
    for count, loaded in ((2, 2), (5, 22)):
        theirs_pipe, our_pipe, plain = MODELS[model](), MODELS[model](), MODELS[model]()
        states = adapters(our_pipe, loaded)
        theirs, ours = Official(theirs_pipe, states), Ours(our_pipe, states)
        in_weights = fused(MODELS[model], states, count)
        for size in SIZES:
            theirs.size = ours.size = size
            for method in ("merge", "switch", "composite"):
                pictures = count if method == "composite" else 1
                programs: dict[str, Callable[[], Tensor]] = {
                    "ours": partial(getattr(ours, method), count),
                    "bare": partial(bare, plain, size, pictures),
                    "beside": partial(ours.beside, method, count),
                    "theirs": partial(getattr(theirs, method), count),
                }
                if method == "merge":
                    programs["fused"] = partial(bare, in_weights, size, 1)
                times, difference = interleaved(programs, rounds)
                medians = {name: statistics.median(values) for name, values in times.items()}
                row = {
                    "model": model,
                    "parameters": sum(p.numel() for p in our_pipe.unet.parameters()),
                    "latents": size,
                    "method": method,
                    "adapters": count,
                    "loaded": loaded,
                    **{f"{name}_ms_per_step": round(1000 * value / STEPS, 1) for name, value in medians.items()},
                    **{f"{name}_over_bare": over(times, name) for name in programs if name not in ("bare", "theirs")},
                    "ratio": round(medians["theirs"] / medians["ours"], 2),
                    "largest_difference": difference,
                    "gate_change_ms": round(gate_change(ours, count), 4),
                }
                rows.append(row)
                print(row_text(row), flush=True)
    return rows


def even(model: str, rounds: int) -> list[dict[str, Any]]:
    """After how many calls of the denoiser folding two adapters has paid."""
    from adapters.formats.diffusers_file import parse_diffusers
    from adapters.layers.gated import Adapter, GatedAdapters, alone

    pipe = MODELS[model]()
    files = [parse_diffusers(state, {}, "benchmark") for state in adapters(pipe, 2)]
    engine = GatedAdapters(
        pipe.unet, [Adapter(file.parts["unet"]) for file in files], torch.device("cpu"), torch.float32
    )
    rows = []
    for size in SIZES:
        for method, blocks in (("merge", ((1.0, 0.8),)), ("composite", alone([0, 1], [1.0, 0.8], 2))):
            samples = 2 * len(blocks)
            latents, moment = torch.randn(samples, 4, size, size), torch.tensor(500)
            text = torch.randn(samples, pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim)

            def call(latents: Tensor = latents, text: Tensor = text, moment: Tensor = moment) -> float:
                before = time.process_time()
                pipe.unet(latents, moment, encoder_hidden_states=text, return_dict=False)
                return 1000 * (time.process_time() - before)

            times: dict[str, list[float]] = {"bare": [], "beside": [], "first": [], "inside": []}
            with torch.no_grad():
                for _ in range(rounds):
                    times["bare"].append(call())
                    for fold in ([], [blocks]):
                        with engine.attached(fold=fold) as gates:
                            if method == "merge":
                                gates.joint(blocks[0])
                            else:
                                gates.grouped([0, 1], [1.0, 0.8])
                            first = call()
                            later = statistics.mean(call() for _ in range(4))
                        times["inside" if fold else "beside"].append(later)
                        if fold:
                            times["first"].append(first)
            saved, cost = (
                statistics.median(one - other for one, other in zip(times[name], times["inside"], strict=True))
                for name in ("beside", "first")
            )
            row = {
                "model": model, "latents": size, "method": method,
                **{f"{name}_ms": round(statistics.median(values), 1) for name, values in times.items()},
                "even_after_calls": round(cost / saved, 1) if saved > 0 else None,
            }  # fmt: skip
            rows.append(row)
            print(even_text(row), flush=True)
    return rows


COLUMNS = ("bare", "ours", "beside", "fused", "theirs")

HEAD = (
    f"| model | latents | method | N | loaded | {', '.join(COLUMNS)}: ms/step | ours / bare | beside / bare "
    "| fused / bare | theirs / ours | difference | gate change, ms |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)

EVEN_HEAD = (
    "| model | latents | method | bare, ms/call | beside | first call | inside | even after calls |\n"
    "|---|---|---|---|---|---|---|---|"
)


def row_text(row: dict[str, Any]) -> str:
    """One line of the table."""
    times = " / ".join(str(row.get(f"{name}_ms_per_step", "-")) for name in COLUMNS)
    return (
        f"| {row['model']} ({row['parameters'] / 1e6:.1f} M) | {row['latents']} x {row['latents']} | {row['method']} "
        f"| {row['adapters']} | {row['loaded']} | {times} | **{row['ours_over_bare']}** | {row['beside_over_bare']} "
        f"| {row.get('fused_over_bare', '-')} | {row['ratio']} | {row['largest_difference']:.1e} "
        f"| {row['gate_change_ms']} |"
    )


def even_text(row: dict[str, Any]) -> str:
    """One line of the table of ``--even``."""
    times = " | ".join(str(row[f"{name}_ms"]) for name in ("bare", "beside", "first", "inside"))
    return (
        f"| {row['model']} | {row['latents']} x {row['latents']} | {row['method']} | {times} "
        f"| {row['even_after_calls'] or 'never'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="tinymoji,random9m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--even", action="store_true", help="measure when folding pays (3 times as many rounds)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/composition.json and .md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(EVEN_HEAD if options.even else HEAD)
    for model in options.models.split(","):
        rows = even(model, 3 * options.rounds) if options.even else measure(model, options.rounds)
        if options.write:
            write("even" if options.even else "rows", rows, options.rounds)


def write(part: str, rows: list[dict[str, Any]], rounds: int) -> None:
    """Write the results; those of other models, and the other ``part``, are kept."""
    target = RESULTS / "composition.json"
    kept = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    measured = {row["model"] for row in rows}
    rows = sorted([*rows, *(row for row in kept.get(part, ()) if row["model"] not in measured)],
                  key=lambda row: row["model"])  # fmt: skip
    conditions = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": 1,
        "steps": STEPS,
        "rank": RANK,
        "rounds": rounds,
    }
    made = {"rows": [], "even": [], **kept, "conditions": conditions, part: rows}
    RESULTS.mkdir(exist_ok=True)
    target.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    shown = ", ".join(f"{key} {value}" for key, value in conditions.items())
    command = "`python -m benchmarks.composition --models MODEL --write` for each model"
    lines = ["# Composition", "", f"{command}; {shown}.", "", HEAD]
    lines += [row_text(row) for row in made["rows"]]
    if made["even"]:
        lines += ["", "When folding pays: `python -m benchmarks.composition --even --write`.", "", EVEN_HEAD]
        lines += [even_text(row) for row in made["even"]]
    (RESULTS / "composition.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
