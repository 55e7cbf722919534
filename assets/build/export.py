"""Write the base model as a Stable Diffusion directory: ``python -m assets.build.export``.

Takes the averaged weights of the latest checkpoint (or ``--checkpoint``), half precision, and puts
the model's card beside them.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import assets
from assets.build import base, cards
from assets.build.common import build_dir, write_json


def default_target() -> Path:
    """Return ``models/tinymoji`` inside the assets package, whether or not it exists yet."""
    return Path(assets.__file__).parent / "models" / "tinymoji"


def export(model: base.Model, target: Path) -> Path:
    """Save the whole pipeline in fp16 safetensors; a previous card and scores in ``target`` are kept.

    The directory is written beside ``target`` and swapped in at the end.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=".export-"))
    fresh.chmod(0o755)
    pipeline = base.make_pipeline(model).to(torch.float16)
    pipeline.save_pretrained(fresh, safe_serialization=True)
    for config in fresh.rglob("config.json"):  # diffusers notes where each part was loaded from on this machine
        write_json(config, {key: value for key, value in cards.read_json(config).items() if key != "_name_or_path"})
    base.text.save_tokenizer(pipeline.tokenizer, fresh / "tokenizer")
    for kept in ("README.md", "scores.json", "learning-curve.json", "curve.png", "samples.png", "training.json"):
        if (target / kept).is_file():
            shutil.copy2(target / kept, fresh / kept)
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)
    if target.exists():
        shutil.rmtree(target)
    fresh.rename(target)
    return target


def main(arguments: Sequence[str] | None = None) -> None:
    """Export the latest (or a named) checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="checkpoint.pt or average-*.pt; the latest if not given")
    parser.add_argument("--untrained", action="store_true", help="export random weights, for trying things out")
    parser.add_argument("--target", type=Path, default=default_target())
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = base.Model()
    facts: dict[str, object] = {"step": 0}
    if not options.untrained:
        facts = base.load_average(model, options.checkpoint or base.latest(build_dir() / "base"))
    target = export(model, options.target)
    known = cards.read_json(target / "training.json")
    curve = cards.read_json(build_dir() / "base" / "curve.json")
    vae = cards.read_json(build_dir() / "vae" / "facts.json") or known.get("vae", {})
    write_json(target / "training.json", {**curve, "vae": vae})
    cards.write_model_card(target)
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    print(f"wrote {target} ({size / 1e6:.1f} MB) from {facts}")


if __name__ == "__main__":
    main()
