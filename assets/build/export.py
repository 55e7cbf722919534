"""Write a base model as a directory of diffusers: ``python -m assets.build.export [tinydit]``.

Takes the averaged weights of the latest checkpoint (or ``--checkpoint``), half precision, and puts
the model's card beside them.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import assets
from assets.build import base, cards, flow
from assets.build.common import build_dir, write_json

PROGRAMS = {"tinymoji": base, "tinydit": flow}
"""Model -> the program that trains it: its ``Model``, ``FOLDER``, ``load_average`` and ``make_pipeline``."""


def program(name: str) -> Any:
    """Return the training program of a model; that of tinymoji for any other name."""
    return PROGRAMS.get(name, base)


def default_target(name: str) -> Path:
    """Return the model's directory inside the assets package, whether or not it exists yet."""
    return Path(assets.__file__).parent / "models" / name


def export(pipeline: Any, target: Path) -> Path:
    """Save the whole pipeline in fp16 safetensors; a previous card and scores in ``target`` are kept.

    The directory is written beside ``target`` and swapped in at the end. An autoencoder equal to tinymoji's becomes a
    link to that one, if the two directories are neighbours.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=".export-"))
    fresh.chmod(0o755)
    pipeline.to(torch.float16).save_pretrained(fresh, safe_serialization=True)
    for config in fresh.rglob("config.json"):  # diffusers notes where each part was loaded from on this machine
        write_json(config, {key: value for key, value in cards.read_json(config).items() if key != "_name_or_path"})
    if target.name != "tinymoji":
        _share_vae(fresh / "vae", target.parent / "tinymoji" / "vae")
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


def _share_vae(made: Path, other: Path) -> None:
    """Replace the weights in ``made`` by a link to those in ``other``, of the model beside it, if they are equal."""
    weights = "diffusion_pytorch_model.safetensors"
    if (other / weights).is_file() and (made / weights).read_bytes() == (other / weights).read_bytes():
        (made / weights).unlink()
        (made / weights).symlink_to(Path("..") / ".." / other.parent.name / other.name / weights)


def main(arguments: Sequence[str] | None = None) -> None:
    """Export the latest (or a named) checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="checkpoint.pt or average-*.pt; the latest if not given")
    parser.add_argument("--untrained", action="store_true", help="export random weights, for trying things out")
    parser.add_argument("--target", type=Path, help="default: the model's place in the assets")
    parser.add_argument("model", nargs="?", default="tinymoji", choices=tuple(PROGRAMS))
    options = parser.parse_intermixed_args(arguments)
    torch.manual_seed(0)
    made_by = program(options.model)
    model, folder = made_by.Model(), build_dir() / made_by.FOLDER
    facts: dict[str, object] = {"step": 0}
    if not options.untrained:
        facts = made_by.load_average(model, options.checkpoint or base.latest(folder))
    target = export(made_by.make_pipeline(model), options.target or default_target(options.model))
    known = cards.read_json(target / "training.json")
    curve = cards.read_json(folder / "curve.json")
    vae = cards.read_json(build_dir() / "vae" / "facts.json") or known.get("vae", {})
    write_json(target / "training.json", {**curve, **made_by.data_facts(), "vae": vae})
    cards.write_model_card(target)
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    print(f"wrote {target} ({size / 1e6:.1f} MB) from {facts}")


if __name__ == "__main__":
    main()
