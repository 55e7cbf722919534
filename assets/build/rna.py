"""Puts the embedded k-mer model and its adapter together, from the first seed of benchmarks/rna.py.

    python -m assets.build.transcripts
    python -m benchmarks.rna --seeds 0 --keep FOLDER
    python -m assets.build.rna --runs FOLDER/seed-0

``assets/models/tinyrna`` is the base that learnt hidden k-mers, ``assets/adapters/lncrna`` the LoRA that tells lncRNA
from mRNA. The example transcripts are of genes that neither has seen.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters import files
from assets.build.common import build_dir
from assets.build.transcripts import written
from benchmarks.rna import LABELS, RESULTS, TEST
from studio.datasets import transcripts
from studio.datasets.transcripts import Transcript
from studio.training.export import RECIPE_ENTRY

ASSETS = Path(__file__).parents[1]
BASE, ADAPTER = "tinyrna", "lncrna"
EACH, LONGEST = 30, 3000
"""Transcripts of each label in the example, and their greatest length."""


def example(items: Sequence[Transcript]) -> str:
    """Held-out transcripts of both labels in turns, as FASTA with their labels in the headers."""
    kept = [item for item in items if len(item.record.sequence) <= LONGEST]
    each = [[item for item in kept if item.label == label][:EACH] for label in (1, 0)]
    return "".join(
        written(f"{item.record.id} gene={item.gene} label={LABELS[item.label or 0]}", item.record.sequence)
        for pair in zip(*each, strict=False) for item in pair
    )  # fmt: skip


def base(runs: Path, data: Path) -> Path:
    """Write the base with its card and example; returns its folder."""
    place = ASSETS / "models" / BASE
    items = transcripts.read([str(data / "labelled.fa")], LABELS).items
    _, held = transcripts.split(items, TEST, 0)
    with files.whole(place) as part:
        shutil.copytree(runs / "base" / "base", part)
        files.write_text(part / "README.md", card())
        files.write_text(part / "examples" / "demo.fa", example(held))
    return place


def adapter(runs: Path) -> Path:
    """Write the adapter, whose base is called by its name here; returns its folder."""
    place, source = ASSETS / "adapters" / ADAPTER, runs / "LoRA-r8" / "it"
    with files.whole(place) as part:
        shutil.copytree(source, part)
        config = json.loads((part / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = BASE
        files.write_text(part / "adapter_config.json", json.dumps(config, indent=2) + "\n")
        weights = part / "adapter_model.safetensors"
        with safe_open(weights, "pt") as opened:
            notes = dict(opened.metadata())
        recipe = json.loads(notes[RECIPE_ENTRY])
        recipe["name"], recipe["base"]["name"] = ADAPTER, BASE
        notes[RECIPE_ENTRY] = json.dumps(recipe, ensure_ascii=False)
        tensors = load_file(weights)
        save_file(tensors, weights, notes)
        text = (part / "README.md").read_text(encoding="utf-8")
        text = text.replace("# it\n", f"# {ADAPTER}\n").replace("**base**", f"**{BASE}**")
        text = text.replace("base = 'base'  # the folder of the base model",
                            f"from studio import library\nbase = library.resolve_base({BASE!r})")  # fmt: skip
        files.write_text(part / "README.md", text)
    return place


def card() -> str:
    """What the base is, and how its adapter does in the first seed of the benchmark, if that has been run."""
    return "\n".join([
        "---", "library_name: transformers", "license: bsd-3-clause", "tags:", "- rna", "- k-mer", "- adapter-studio",
        "pipeline_tag: fill-mask",
        "description: A tiny BERT over RNA 3-mers, to try things; not for answers.", "---",
        f"# {BASE}", "",
        "A BERT of 3 layers, width 96, 4 heads, 384 positions over 3-mers (stride 1). It learnt hidden 3-mers of human "
        "transcripts of chromosome X for a few minutes. It is there to try methods, **not to give answers**.", "",
        f"The adapter `{ADAPTER}` (LoRA, rank 8, with pooler and classifier) tells lncRNA from mRNA. {_measured()}", "",
        "Data: Debian's transdecoder-doc (BSD-3-Clause, see assets/NOTICE). `examples/demo.fa` holds transcripts of "
        "genes that were never learnt from. Made by `python -m assets.build.rna`.", "",
    ])  # fmt: skip


def _measured() -> str:
    file = RESULTS / "rna.json"
    seeds = json.loads(file.read_text(encoding="utf-8"))["seeds"] if file.is_file() else []
    found = next((s for s in seeds if s["seed"] == 0 and "LoRA r8" in s["models"]), None)
    if found is None:
        return "How well has not been measured."
    return (
        f"On {found['test']} transcripts of other genes its area under the ROC curve is "
        f"{found['models']['LoRA r8']['auc']['mean']:.3f}; the length of the longest ORF alone reaches "
        f"{found['auc']['ORF length alone']:.3f}: use that length if you need an answer. Everything measured: "
        "benchmarks/results/rna.md."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, required=True, help="what the benchmark kept of its first seed")
    parser.add_argument("--data", type=Path, default=build_dir() / "transcripts")
    options = parser.parse_args()
    for place in (base(options.runs, options.data), adapter(options.runs)):
        print(f"{place}: {sum(file.stat().st_size for file in place.rglob('*') if file.is_file())} bytes")


if __name__ == "__main__":
    main()
