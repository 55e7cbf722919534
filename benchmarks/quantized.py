"""Adapters on quantised denoisers: what N of them cost over one, and over the bare quantised denoiser.

    python -m benchmarks.quantized [--rounds 7] [--write]

Needs ``pip install 'adapter-studio[quantized]'``. A Flux denoiser with random weights (width 256, 2 + 4 blocks, latents
of 16 x 16 tokens, 64 text tokens) is stored in every way of :mod:`adapters.compression.backends` and as GGUF. One
call of it is timed without adapters, and with 1, 4 and 8 LoRAs of rank 16 on every linear layer of its blocks that
take part in a merge, by our engine and by PEFT (``set_adapters``), which loops over the adapters.

Times are CPU times of one process with all settings taking turns, so that other load on the machine affects all alike.
Reported are medians of the ratios within single rounds, which say more than seconds on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

RESULTS = Path(__file__).parent / "results"
COUNTS = (1, 4, 8)
NAMES = ("none", "int8", "4bit", "gguf Q8_0", "8bit", "int4", "gguf Q4_0")
RANK = 16
TOKENS, TEXT = 256, 64
TARGETS = r"(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff.*|proj_\w+)"


def denoiser() -> Any:
    """The denoiser in full precision."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=64, num_attention_heads=4,
        joint_attention_dim=256, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24), guidance_embeds=False,
    ).eval()  # fmt: skip


def stored(name: str) -> Any:
    """The denoiser, stored as ``name`` says: "none", a quantisation, or "gguf TYPE"."""
    from adapters.compression.backends import quantize

    model = denoiser()
    if not name.startswith("gguf"):
        quantize(model, name, torch.float32)
        return model
    import diffusers

    from tests.pipelines.test_quantized import write_gguf

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model.save_config(place / "transformer")
        path = write_gguf(model, place / "denoiser.gguf", name.split()[1])
        opened: Any = diffusers.FluxTransformer2DModel.from_single_file(
            str(path), config=str(place), subfolder="transformer", dtype=torch.float32,
            quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        )  # fmt: skip
    return opened.eval()


def inputs() -> dict[str, torch.Tensor]:
    """The arguments of one call."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(16.0), torch.arange(16.0))
    return {
        "hidden_states": noise(1, TOKENS, 64), "encoder_hidden_states": noise(1, TEXT, 256),
        "pooled_projections": noise(1, 64), "timestep": torch.tensor([0.5]), "img_ids": grid,
        "txt_ids": torch.zeros(TEXT, 3),
    }  # fmt: skip


def adapters(model: nn.Module, count: int) -> list[Any]:
    """Random adapters of the engine for ``model``."""
    import re

    from adapters.formats.lora import LoraLayer
    from adapters.layers.gated import Adapter

    generator = torch.Generator().manual_seed(2)
    places = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(TARGETS, name)
    }
    return [
        Adapter(
            {
                name: LoraLayer(
                    torch.randn(RANK, module.in_features, generator=generator) / 16,
                    torch.randn(module.out_features, RANK, generator=generator) / 16,
                    float(RANK),
                )
                for name, module in places.items()
            }
        )
        for _ in range(count)
    ]


def with_peft(model: Any, made: list[Any]) -> Any:
    """``model`` with the same adapters by PEFT."""
    from peft import LoraConfig

    names = list(made[0].layers)
    for number, adapter in enumerate(made):
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names), adapter_name=f"a{number}")
        for name, layer in adapter.layers.items():
            module = model.get_submodule(name)
            module.lora_A[f"a{number}"].weight.data, module.lora_B[f"a{number}"].weight.data = layer.A, layer.B
    model.set_adapters([f"a{number}" for number in range(len(made))])
    return model


@torch.no_grad()
def measure(name: str, rounds: int) -> dict[str, Any]:
    """Median ratios of CPU times for one way of storing."""
    from adapters.compression.storage import storage
    from adapters.layers.gated import GatedAdapters

    model, given = stored(name), inputs()
    runs: dict[str, Callable[[], Any]] = {"bare": lambda: model(**given)}
    outputs: dict[str, torch.Tensor] = {}
    for count in COUNTS:
        made = adapters(model, count)
        joined = GatedAdapters(model, made, torch.device("cpu"), torch.float32)

        def ours(joined: Any = joined, count: int = count) -> Any:
            with joined.attached() as gates:
                gates.joint([1.0] * count)
                return model(**given)

        other = with_peft(stored(name), made)  # GGUF layers cannot be copied
        runs[f"ours {count}"] = ours
        runs[f"peft {count}"] = lambda other=other: other(**given)
    times: dict[str, list[float]] = {key: [] for key in runs}
    for number in range(rounds + 1):  # the first warms up
        for key, run in runs.items():
            begun = time.process_time()
            outputs[key] = run()[0]
            if number:
                times[key].append(time.process_time() - begun)
    layers = [storage(module) for module in model.modules() if isinstance(module, nn.Linear)]

    def ratio(first: str, second: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[first], times[second], strict=True)), 3)

    return {
        "stored": name,
        "quantised_layers": sum(map(bool, layers)),
        "layers": len(layers),
        "bare_ms": round(1000 * statistics.median(times["bare"]), 2),
        "one_over_bare": ratio("ours 1", "bare"),
        "ours_over_one": {str(count): ratio(f"ours {count}", "ours 1") for count in COUNTS[1:]},
        "peft_over_one": {str(count): ratio(f"peft {count}", "ours 1") for count in COUNTS},
        "difference": max(
            float((outputs[f"ours {n}"] - outputs[f"peft {n}"]).abs().max() / outputs[f"peft {n}"].abs().max())
            for n in COUNTS
        ),
    }


def table(found: list[dict[str, Any]]) -> str:
    """The results in words."""
    rows = [
        f"| {one['stored']} | {one['quantised_layers']} of {one['layers']} | {one['one_over_bare']:.2f} | "
        + " | ".join(f"{one['ours_over_one'][str(n)]:.2f}" for n in COUNTS[1:])
        + " | "
        + " | ".join(f"{one['peft_over_one'][str(n)]:.2f}" for n in COUNTS)
        + f" | {one['difference']:.1e} |"
        for one in found
    ]
    return "\n".join(
        [
            "# Adapters on quantised denoisers",
            "",
            "    python -m benchmarks.quantized --write",
            "",
            f"A random Flux denoiser of width 256, {TOKENS} + {TEXT} tokens, LoRAs of rank {RANK} on the linear layers",
            "of its blocks, merged; CPU times of one call within one process, settings taking turns, medians of the",
            "ratios of single rounds. `ours` is the engine (all adapters as one pair of products beside the layer, not",
            "folded), `peft` is `set_adapters` of diffusers. The machine was busy: read the ratios. No GPU was used.",
            "",
            "| stored | quantised layers | ours: 1 over bare | ours: 4 over 1 | ours: 8 over 1 | peft: 1 over ours 1 | "
            "peft: 4 over ours 1 | peft: 8 over ours 1 | largest difference |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    """Measure, print, and write with ``--write``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    versions = {name: metadata.version(name) for name in
                ("torch", "diffusers", "peft", "bitsandbytes", "torchao", "gguf")}  # fmt: skip
    for name in NAMES:
        found.append(measure(name, asked.rounds))
        print(json.dumps(found[-1]), flush=True)
        if not asked.write:
            continue
        kept = {"machine": platform.processor() or platform.machine(), "rounds": asked.rounds, "versions": versions,
                "results": found}  # fmt: skip
        (RESULTS / "quantized.json").write_text(json.dumps(kept, indent=1) + "\n")
        (RESULTS / "quantized.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
