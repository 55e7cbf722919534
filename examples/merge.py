"""Several adapters as one ordinary LoRA file that any program loads."""

from __future__ import annotations

import argparse
from pathlib import Path

import studio
from studio import library


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("adapters", nargs="*", default=["fox:0.8", "style-monochrome:0.6"], help="NAME:WEIGHT")
    options.add_argument("--out", type=Path, default=Path("out/merged.safetensors"))
    options.add_argument("--rank", type=int, help="cut the result to this rank")
    chosen = options.parse_args()

    pipe = studio.load("tinymoji")
    for text in chosen.adapters:
        name, _, weight = text.partition(":")
        pipe.load_lora(library.resolve_adapter(name), name=name, weight=float(weight or 1))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    merged = pipe.compose("merge").export(chosen.out, rank=chosen.rank)
    errors = [float(values["error"]) for values in merged.report.values() if "error" in values]
    print(f"{len(chosen.adapters)} adapters in {chosen.out}; largest relative error {max(errors, default=0.0):.2g}")


if __name__ == "__main__":
    main()
