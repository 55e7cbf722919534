"""Composition against other programs' ways: how long one picture's denoising takes.

    python -m benchmarks.composition [--models tinymoji,random9m] [--rounds 9] [--write]

Compared, on the same base, adapters, prompt, seed, sampler and guidance:

composite   ours (one adapter-major batch through the gated engine) against the official program's loop
            (maszhongming/Multi-LoRA-Composition): per step and adapter ``pipe.set_adapters``, then the denoiser
            with ``cross_attention_kwargs={"scale": ...}``; N passes, predictions averaged.
switch      ours against the official program's callback: ``pipe.set_adapters`` when the turn changes.
merge       ours against ``pipe.set_adapters(all, weights)`` in diffusers.
change      writing new gates, per step.

With N adapters in use and 22 loaded (the number of the paper's test set) or only N loaded, at two latent sizes: we save
the walk over all modules and adapters and the small kernels, so the ratio falls as the arithmetic of the base model
grows ("floor" is the base model alone on the same batch: no composition can be faster). Times are medians of CPU time
of one process with the programs taking turns, so that other load on the machine affects all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
STEPS = 3
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

        self.merged = MultiLoRAPipeline(pipe)
        self.alone = MultiLoRAPipeline(pipe)
        self.size = 0
        for k, state in enumerate(states):
            file = parse_diffusers(state, {}, "benchmark")
            self.merged.load_lora(file, f"a{k}", weight=0.8)
            self.alone.load_lora(file, f"a{k}")

    def composite(self, count: int) -> Tensor:
        return self._picture(self.alone, "composite", count)

    def switch(self, count: int) -> Tensor:
        return self._picture(self.alone, "switch", count)

    def merge(self, count: int) -> Tensor:
        return self._picture(self.merged, "merge", count)

    def _picture(self, composer: Any, method: str, count: int) -> Tensor:
        names = tuple(f"a{k}" for k in range(count))
        if (composer.composition.method, composer.composition.adapters) != (method, names):
            composer.compose(method, names)
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


def floor(pipe: Any, size: int, samples: int) -> Callable[[], Tensor]:
    """The base model's denoiser alone on a batch, once per step."""
    latents, time_step = torch.randn(samples, 4, size, size), torch.tensor(500)
    text = torch.randn(samples, pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim)

    @torch.no_grad()
    def run() -> Tensor:
        for _ in range(STEPS):
            result: Tensor = pipe.unet(latents, time_step, encoder_hidden_states=text, return_dict=False)[0]
        return result

    return run


def interleaved(programs: dict[str, Callable[[], Tensor]], rounds: int) -> tuple[dict[str, float], float]:
    """Median CPU seconds of each program, and the largest difference of their results."""
    results = {name: program() for name, program in programs.items() if name != "floor"}
    programs.get("floor", lambda: None)()  # warm, like the others
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            before = time.process_time()
            program()
            times[name].append(time.process_time() - before)
    first, *others = results.values()
    difference = max(float((first - other).abs().max()) for other in others)
    return {name: statistics.median(values) for name, values in times.items()}, difference


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
    for count, loaded in ((2, 2), (2, 22), (5, 22)):
        theirs_pipe, our_pipe, plain = MODELS[model](), MODELS[model](), MODELS[model]()
        states = adapters(our_pipe, loaded)
        theirs, ours = Official(theirs_pipe, states), Ours(our_pipe, states)
        for size in SIZES:
            theirs.size = ours.size = size
            for method in ("composite", "switch", "merge"):
                programs = {
                    "theirs": lambda program=getattr(theirs, method), n=count: program(n),
                    "ours": lambda program=getattr(ours, method), n=count: program(n),
                    "floor": floor(plain, size, 2 * count if method == "composite" else 2),
                }
                times, difference = interleaved(programs, rounds)
                row = {
                    "model": model,
                    "parameters": sum(p.numel() for p in our_pipe.unet.parameters()),
                    "latents": size,
                    "method": method,
                    "adapters": count,
                    "loaded": loaded,
                    **{f"{name}_ms_per_step": round(1000 * seconds / STEPS, 1) for name, seconds in times.items()},
                    "ratio": round(times["theirs"] / times["ours"], 2),
                    "largest_difference": difference,
                    "gate_change_ms": round(gate_change(ours, count), 4),
                }
                rows.append(row)
                print(row_text(row), flush=True)
    return rows


HEAD = (
    "| model | latents | method | N | loaded | theirs, ms/step | ours, ms/step | floor, ms/step | ratio | difference "
    "| gate change, ms |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def row_text(row: dict[str, Any]) -> str:
    """One line of the table."""
    times = " | ".join(str(row[f"{name}_ms_per_step"]) for name in ("theirs", "ours", "floor"))
    return (
        f"| {row['model']} ({row['parameters'] / 1e6:.1f} M) | {row['latents']} x {row['latents']} | {row['method']} "
        f"| {row['adapters']} | {row['loaded']} | {times} | **{row['ratio']}** | {row['largest_difference']:.1e} "
        f"| {row['gate_change_ms']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="tinymoji,random9m")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/composition.json and .md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(HEAD)
    rows = [row for model in options.models.split(",") for row in measure(model, options.rounds)]
    if options.write:
        write(rows, options.rounds)


def write(rows: list[dict[str, Any]], rounds: int) -> None:
    """Write the results; rows of models that were not measured this time are kept."""
    target = RESULTS / "composition.json"
    measured = {row["model"] for row in rows}
    before = json.loads(target.read_text(encoding="utf-8"))["rows"] if target.is_file() else []
    rows = sorted([*rows, *(row for row in before if row["model"] not in measured)], key=lambda row: row["model"])
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
    RESULTS.mkdir(exist_ok=True)
    target.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    shown = ", ".join(f"{key} {value}" for key, value in conditions.items())
    lines = ["# Composition", "", f"`python -m benchmarks.composition --write`; {shown}.", "", HEAD]
    lines += [row_text(row) for row in rows]
    (RESULTS / "composition.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
