"""What distillation saves and what it costs in quality, on the embedded base.

    python -m benchmarks.distillation [--guided FILE] [--few FILE] [--cases 72] [--write]

passes    samples through the denoiser per picture, counted by a hook: teacher 2 T, student T.
time      denoiser CPU time of a guided step (both halves in one batch) over a student's, with the adapter merged into
          the weights and beside them, at two latent sizes; medians of calls that take turns.
memory    bytes of weights, gradients and optimiser state after one training step, every storage counted once, and
          the peak of the process: LoRA on the shared base against a full copy (teacher and student UNet, the way of
          microsoft/DeepSpeedExamples, restated here), same batch.
error     R = sum |student - guided|^2 / sum |unguided - guided|^2 over states of the teacher's paths for prompts and
          noise unseen in training. 1 = the untrained student.
pictures  share of single subjects the judge recognises, with 95 % Wilson intervals: teacher (two passes), base without
          guidance, student; few-step student against the teacher at as many steps and at 30; mean squared difference
          of the latents to the teacher's from the same noise.
concepts  shipped concept adapters on the guided teacher and on the student (one prompt per base style and seed).
rival     a small adapter after AGD (arXiv 2503.07274; see benchmarks/agd.py), trained equally long on the same states.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapters.formats import read
from assets.build import data
from assets.build.evaluate import Case, part, pipeline_draw, score, single_cases
from assets.build.judge import load_judge
from benchmarks.measures import peak_memory
from pipelines.diffusion.distillation.consistency import DiffusionPath
from pipelines.diffusion.distillation.guidance import guided
from pipelines.diffusion.distillation.mark import Mark, read_mark
from pipelines.diffusion.distillation.trajectories import follow

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
BASE = ROOT / "assets/models/tinymoji"
STEPS = 20
LONG = 30
CONCEPTS = ("fox", "robot", "cactus")
SIZES = (16, 32, 48)
"""Sides of the latents that are timed; the base draws at 16."""


def pipeline() -> Any:
    """The embedded base in fp32."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def merged(pipe: Any, file: Path) -> Any:
    """``pipe`` with the adapter added to its weights."""
    pipe.load_lora_weights(file)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe


# ------------------------------------------------------------------------------------------------ work


def passes(file: Path, steps: int, w: float) -> dict[str, int]:
    """Samples through the denoiser for two pictures."""
    counts = {}
    for name, adapter, guidance in (("teacher", None, w), ("student", file, 1.0)):
        pipe = pipeline()
        if adapter is not None:
            pipe.load_lora_weights(adapter)
        seen: list[int] = []
        pipe.unet.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(len(args[0])))
        pipe("a flat icon of a dog", num_inference_steps=steps, guidance_scale=guidance, num_images_per_prompt=2,
             output_type="latent")  # fmt: skip
        counts[name] = sum(seen)
    return counts


def times(file: Path, rounds: int) -> list[dict[str, Any]]:
    """Median CPU seconds of one step, by size: guided base, student merged, student with the adapter beside."""
    base, joined, beside = pipeline().unet, merged(pipeline(), file).unet, pipeline()
    beside.load_lora_weights(file)
    rows = []
    for side in SIZES:
        state, words, level = torch.randn(1, 4, side, side), torch.randn(1, 40, 192), torch.tensor([500])
        calls: dict[str, Callable[[], Any]] = {
            "guided": lambda s=state, w=words, t=level: base(s.repeat(2, 1, 1, 1), t, w.repeat(2, 1, 1)),
            "merged": lambda s=state, w=words, t=level: joined(s, t, w),
            "beside": lambda s=state, w=words, t=level: beside.unet(s, t, w),
        }
        taken: dict[str, list[float]] = {name: [] for name in calls}
        with torch.no_grad():
            for number in range(rounds + 2):
                for name, call in calls.items():
                    began = time.process_time()
                    call()
                    if number >= 2:
                        taken[name].append(time.process_time() - began)
        medians = {name: statistics.median(values) for name, values in taken.items()}
        rows.append({
            "latent side": side, "seconds": {name: round(value, 5) for name, value in medians.items()},
            "merged ratio": round(medians["guided"] / medians["merged"], 3),
            "beside ratio": round(medians["guided"] / medians["beside"], 3),
        })  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------------ memory


def distinct_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def training_memory(variant: str, rank: int, batch: int) -> dict[str, int]:
    """One training step of ``variant`` ("lora" or "copy"): static bytes, and the peak of this process."""
    from peft import LoraConfig

    teacher = pipeline().unet.requires_grad_(False)
    before = peak_memory()
    if variant == "lora":
        names = [n for n, m in teacher.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and "conv_" not in n[:5]]
        teacher.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
        student = teacher
    else:
        student = copy.deepcopy(teacher).requires_grad_(True)
    learning = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5)
    state, words = torch.randn(batch, 4, 16, 16), torch.randn(batch, 40, 192)
    level = torch.randint(0, 1000, (batch,))
    with torch.no_grad():
        if variant == "lora":
            teacher.disable_adapters()
        both = teacher(state.repeat(2, 1, 1, 1), level.repeat(2), words.repeat(2, 1, 1)).sample.chunk(2)
        if variant == "lora":
            teacher.enable_adapters()
    loss = (student(state, level, words).sample - guided(both[0], both[1], 4.0)).square().mean()
    loss.backward()
    optimizer.step()
    held = [*teacher.parameters(), *teacher.buffers(), *student.parameters(), *(p.grad for p in learning)]
    moments = [
        v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor) and v.numel() > 1
    ]
    return {
        "static": distinct_bytes([t for t in [*held, *moments] if t is not None]),
        "without optimiser": distinct_bytes([*teacher.parameters(), *student.parameters()]),
        "learning": sum(p.numel() for p in learning),
        "base": sum(p.numel() for n, p in teacher.named_parameters() if "lora_" not in n),
        "peak": peak_memory() - before,
    }


def in_own_process(variant: str, rank: int, batch: int) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.distillation", "--memory", variant, "--rank", str(rank),
               "--batch", str(batch)]  # fmt: skip
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, int] = json.loads(printed.strip().splitlines()[-1])
    return found


# ------------------------------------------------------------------------------------------------ error


def held_prompts(count: int) -> list[str]:
    """Prompts that the shipped adapters have not seen: two of three with one subject."""
    from assets.build.distilled import prompts

    seen = set(prompts())
    return [prompt for prompt in prompts(10 * count, seed=99) if prompt not in seen][:count]


@torch.no_grad()
def held_states(w: float, count: int, knots: int) -> dict[str, Tensor]:
    """States of guided paths for ``count`` unseen prompts, with the two predictions of the base there."""
    pipe = pipeline()
    path = DiffusionPath(pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type, knots)
    captions = held_prompts(count)
    words, null = pipe.encode_prompt(captions, "cpu", 1, True)
    halves: list[tuple[Tensor, Tensor]] = []

    def predict(state: Tensor, level: Tensor) -> Tensor:
        both = pipe.unet(torch.cat([state, state]), torch.cat([level, level]), torch.cat([null, words])).sample
        without, with_prompt = both.chunk(2)
        halves.append((without, with_prompt))
        return guided(without, with_prompt, w)

    start = torch.randn(len(captions), 4, 16, 16, generator=torch.Generator().manual_seed(4711))
    states, _ = follow(path, start, predict)
    levels = path.start().flip(0)
    without, with_prompt = (torch.stack([half[k] for half in halves], 1).flatten(0, 1) for k in (0, 1))
    return {
        "states": states.flatten(0, 1), "levels": levels.repeat(len(captions)), "without": without, "with": with_prompt,
        "words": words.repeat_interleave(len(levels), 0),
    }  # fmt: skip


@torch.no_grad()
def error_ratio(answer: Callable[[Tensor, Tensor, Tensor], Tensor], held: dict[str, Tensor], w: float) -> float:
    """R of a student ``answer(states, levels, words)``."""
    target = guided(held["without"], held["with"], w)
    found = torch.cat([
        answer(s, t, c)
        for s, t, c in zip(held["states"].split(32), held["levels"].split(32), held["words"].split(32), strict=True)
    ])  # fmt: skip
    return float((found - target).square().sum() / (held["with"] - target).square().sum())


def answers_of(unet: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda s, t, c: unet(s, t, c).sample


def errors(file: Path, mark: Mark, held: dict[str, Tensor]) -> dict[str, float]:
    """R of the adapter at its guidance, and at others by its weight."""
    found = {}
    for w in sorted({2.0, mark.guidance, 6.0}):
        pipe = pipeline()
        pipe.load_lora_weights(file)
        pipe.set_adapters(pipe.get_active_adapters(), [(w - 1) / (mark.guidance - 1)])
        found[f"{w:g}"] = round(error_ratio(answers_of(pipe.unet), held, w), 4)
    return found


# ------------------------------------------------------------------------------------------------ pictures


def with_sampler(pipe: Any, name: str) -> Any:
    from pipelines.diffusion.samplers import sampler

    pipe.scheduler = sampler(name, pipe.scheduler, flow=False)
    return pipe


def pictures(guided_file: Path, few_file: Path | None, w: float, cases: Sequence[Case]) -> dict[str, Any]:
    """Judge's answers and distances to the teacher, by who drew."""
    judge = load_judge()
    artists: dict[str, tuple[Any, int, float]] = {
        "teacher": (pipeline(), STEPS, w),
        "base without guidance": (pipeline(), STEPS, 1.0),
        "student": (merged(pipeline(), guided_file), STEPS, 1.0),
        f"teacher, {LONG} steps": (pipeline(), LONG, w),
    }
    if few_file is not None:
        mark = read_mark(read(few_file).metadata)
        assert mark is not None
        artists[f"few-step student, {mark.steps} steps"] = (
            with_sampler(merged(pipeline(), few_file), mark.sampler), mark.steps, 1.0
        )  # fmt: skip
        artists[f"teacher, {mark.steps} steps"] = (pipeline(), mark.steps, w)
    found: dict[str, Any] = {}
    rows: list[Tensor] = []
    reference: Tensor | None = None
    for name, (pipe, steps, guidance) in artists.items():
        drawn = torch.cat([pipeline_draw(pipe, steps, guidance)(cases[k : k + 12]) for k in range(0, len(cases), 12)])
        right = (judge.classify(drawn).argmax(1) == torch.tensor([judge.index(c.names[0]) for c in cases])).tolist()
        reference = drawn if reference is None else reference
        found[name] = {**score(right), "difference": round(float((drawn - reference).square().mean()), 5)}
        rows.append(drawn[:8])
    return {"scores": found, "rows": list(artists), "grid": torch.cat(rows)}


def concepts(guided_file: Path, w: float, seeds: int) -> dict[str, Any]:
    """Shipped concept adapters on the guided base and on the student."""
    from pipelines.diffusion import MultiLoRAPipeline

    judge = load_judge()
    found: dict[str, Any] = {}
    for way in ("teacher", "student"):
        right: list[bool] = []
        for name in CONCEPTS:
            file = ROOT / "assets/adapters" / name / f"{name}.safetensors"
            if not file.is_file():
                continue
            pipe = MultiLoRAPipeline(pipeline())
            pipe.load_lora(file)
            if way == "student":
                pipe.load_lora(guided_file, name="distilled")
            for style in data.BASE_STYLES:
                caption = data.make_caption(style, [name], None)
                out = pipe(
                    caption, steps=STEPS, guidance_scale=w if way == "teacher" else 1.0, images=seeds, seed=90_000
                )
                stack = np.stack([np.array(image.convert("RGB")) for image in out.images])
                images = torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 255
                right += (judge.classify(images).argmax(1) == judge.index(name)).tolist()
        found[way] = score(right)
    return found


# ------------------------------------------------------------------------------------------------ report


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything the options ask for."""
    file = options.guided
    mark = read_mark(read(file).metadata)
    assert mark is not None, f"{file} is not distilled"
    w, rank = mark.guidance, max(read(file).ranks())
    result: dict[str, Any] = {
        "base": BASE.name, "guidance": w, "rank": rank, "steps": STEPS, "cases": options.cases,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(), "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    result["passes"] = passes(file, STEPS, w)
    result["times"] = times(file, options.rounds)
    print(result, flush=True)
    memory = {variant: in_own_process(variant, rank, options.batch) for variant in ("copy", "lora")}
    result["memory"] = {"batch": options.batch, **memory}
    print(memory, flush=True)
    held = held_states(w, options.prompts, STEPS)
    result["errors"] = errors(file, mark, held)
    print(result["errors"], flush=True)
    if options.rival:
        from assets.build.distilled import prompts
        from benchmarks import agd

        result["rival"] = agd.measure(pipeline, held, w, options.rival, error_ratio, prompts(24))
        print(result["rival"], flush=True)
    drawn = pictures(file, options.few, w, part(single_cases(1), options.cases / len(single_cases(1))))
    result["pictures"], result["grid rows"] = drawn["scores"], drawn["rows"]
    if options.write:
        flat = [(image.permute(1, 2, 0).numpy() * 255 + 0.5).astype(np.uint8) for image in drawn["grid"]]
        data.save_png(RESULTS / "distillation.png", data.contact_sheet(flat, 8))
    print(result["pictures"], flush=True)
    result["concepts"] = concepts(file, w, options.seeds)
    return result


def as_markdown(r: dict[str, Any]) -> str:
    """The result for people."""
    copied, lora = r["memory"]["copy"], r["memory"]["lora"]
    lines = [
        "# Distillation",
        "",
        f"Base {r['base']}, guidance {r['guidance']:g}, rank {r['rank']}, {r['steps']} DDIM steps, fp32, "
        f"{r['threads']} thread, torch {r['torch']} (load {r['load']}). "
        "Made by `python -m benchmarks.distillation --write`.",
        "",
        f"**Passes** for two pictures: teacher {r['passes']['teacher']}, student {r['passes']['student']}.",
        "",
        "**Time** of a guided step over the student's (CPU time, medians):",
        "",
        "| latents | merged | adapter beside the weights |",
        "|---|---|---|",
        *[f"| {t['latent side']} x {t['latent side']} | {t['merged ratio']:.2f}x | {t['beside ratio']:.2f}x |"
          for t in r["times"]],
        "",
        f"**Memory** of a training step of batch {r['memory']['batch']} ({lora['base']:,} weights in the base, "
        f"{lora['learning']:,} learn):",
        "",
        "| | full copy | LoRA on the shared base | share |",
        "|---|---|---|---|",
        *[f"| {name} | {copied[key] / 2**20:.1f} MiB | {lora[key] / 2**20:.1f} MiB | {lora[key] / copied[key]:.0%} |"
          for name, key in (("weights, gradients, optimiser", "static"), ("weights alone", "without optimiser"),
                            ("peak of the process above the loaded base", "peak"))],
        "",
        "**Error** R (1 = untrained): " + ", ".join(f"{value:.3f} at w = {w}" for w, value in r["errors"].items())
        + " (other w by the adapter's weight).",
        "",
        "**Pictures**: single subjects that the judge recognises.",
        "",
        "| | recognised | difference to the teacher's pictures |",
        "|---|---|---|",
        *[f"| {name} | {s['share']:.1%} ({s['low']:.1%} to {s['high']:.1%}; {s['right']} of {s['pictures']}) "
          f"| {s['difference']:.4f} |" for name, s in r["pictures"].items()],
        "",
        f"![rows: {', '.join(r['grid rows'])}](distillation.png)",
        "",
        f"Rows: {', '.join(r['grid rows'])}.",
        "",
        f"**Concept adapters** ({', '.join(CONCEPTS)}) recognised: "
        + "; ".join(
            f"with the {way} {s['share']:.0%} ({s['right']} of {s['pictures']})" for way, s in r["concepts"].items()
        )
        + ".",
    ]  # fmt: skip
    if "rival" in r:
        rival = r["rival"]
        lines += [
            "",
            f"**AGD-style adapter** ({rival['parameters']:,} weights) after {rival['steps']} steps: "
            f"R {rival['error']:.3f}; a fresh LoRA of rank 8 ({rival['lora parameters']:,} weights) on the same "
            f"states: R {rival['lora error']:.3f}.",
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = ROOT / "assets/adapters"
    parser.add_argument("--guided", type=Path, default=shipped / "guided/guided.safetensors")
    parser.add_argument("--few", type=Path, default=None, help="few-step adapter; default: the shipped one, if any")
    parser.add_argument("--cases", type=int, default=72)
    parser.add_argument("--prompts", type=int, default=12, help="held-out prompts for the error")
    parser.add_argument("--seeds", type=int, default=4, help="pictures per concept and style")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rival", type=int, default=0, help="also train an AGD-style adapter for so many steps")
    parser.add_argument("--memory", choices=("lora", "copy"), help="measure one training step in this process")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(training_memory(options.memory, options.rank, options.batch)))
        return
    few = shipped / "few-steps/few-steps.safetensors"
    options.few = options.few or (few if few.is_file() else None)
    result = measure(options)
    text = as_markdown(result)
    print(text)
    if options.write:
        (RESULTS / "distillation.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "distillation.md").write_text(text)


if __name__ == "__main__":
    main()
