"""The shipped adapters: ``python -m assets.build.adapters prepare``, then ``train``, then ``score``.

``prepare`` writes for every held-out subject a folder of single-subject pictures in the base styles, for
every held-out style a folder of base subjects in that style; pictures are PNG, captions lie beside them
as ``.txt``. ``train`` runs the studio's own image trainer on them (values in ``configs/``), goes on where
an interrupted run stopped, and puts the result into ``assets/adapters/NAME``. ``score`` asks the judge
what it sees in pictures made with one adapter alone, and writes the answer beside it. The adapters of tinydit are
named ``tinydit-fox`` and so on, and learn from the same folders.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from adapters.files import write_text
from assets.build import data
from assets.build.cards import percent
from assets.build.common import build_dir, from_home, write_json
from assets.build.evaluate import STEPS, Case, guidance_for, score
from assets.build.judge import Judge, load_judge

CONCEPT_PICTURES = 24
STYLE_PICTURES = 60
SCORE_SEEDS = 8
TINYDIT = ("fox", "robot", "cactus", "snowman", "style-monochrome")
"""The adapters that tinydit has too."""

CONFIGS = Path(__file__).parent / "configs"
SHIPPED = Path(__file__).parents[1] / "adapters"
SAMPLES = "![samples](samples.png)"


@dataclass(frozen=True)
class Adapter:
    """One adapter to be trained: file name, ``concept`` or ``style``, the word that calls it, its base, its folder."""

    name: str
    kind: str
    trigger: str
    base: str = "tinymoji"
    pictures: str = ""

    @property
    def folder(self) -> str:
        """The name of the folder with its training pictures."""
        return self.pictures or self.name


def shipped_adapters() -> list[Adapter]:
    """Return every concept and style adapter of tinymoji, concepts first."""
    concepts = [Adapter(slug(word), "concept", word) for word in data.HELD_CONCEPTS]
    return concepts + [Adapter(f"style-{slug(word)}", "style", word) for word in data.HELD_STYLES]


def tinydit_adapters() -> list[Adapter]:
    """Return the adapters of tinydit, which learn from the pictures of tinymoji's."""
    there = [adapter for adapter in shipped_adapters() if adapter.name in TINYDIT]
    return [Adapter(f"tinydit-{a.name}", a.kind, a.trigger, "tinydit", a.name) for a in there]


def slug(words: str) -> str:
    """Return a file name for some words: "teddy bear" -> "teddy-bear"."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def concept_scenes(word: str, count: int, seed: int = 0) -> list[data.Scene]:
    """Return ``count`` scenes of one held-out subject, styles in turn, half of them on white."""
    rng = np.random.default_rng([31, seed, *word.encode()])
    return [_single(rng, word, list(data.BASE_STYLES)[i % 3], list(data.BACKGROUNDS)[1:]) for i in range(count)]


def style_scenes(word: str, count: int, seed: int = 0) -> list[data.Scene]:
    """Return scenes of ``count`` different base subjects in a held-out style, never on black.

    Raises ``ValueError`` when there are fewer base subjects than that.
    """
    names = list(data.BASE_CONCEPTS)
    if count > len(names):
        raise ValueError(f"there are {len(names)} base subjects, {count} asked for")
    rng = np.random.default_rng([32, seed, *word.encode()])
    picked = sorted(rng.permutation(len(names))[:count])
    return [_single(rng, names[i], word, list(data.BACKGROUNDS)[1:-1]) for i in picked]


def _single(rng: np.random.Generator, name: str, style: str, colours: Sequence[str]) -> data.Scene:
    """Draw a single-subject scene in a given style; the caption names style, subject and any colour."""
    background = "white" if rng.random() < 0.5 else colours[int(rng.integers(len(colours)))]
    caption = data.make_caption(style, [name], None if background == "white" else background)
    return data.Scene(style, data.place(rng, [name]), background, caption)


def write_folder(folder: Path, scenes: Sequence[data.Scene], sprites: np.ndarray) -> Path:
    """Write ``NN.png`` and ``NN.txt`` for each scene; files of the same names are replaced."""
    for number, scene in enumerate(scenes):
        data.save_png(folder / f"{number:02d}.png", data.render(scene, sprites))
        write_text(folder / f"{number:02d}.txt", scene.caption + "\n")
    return folder


def prepare(target: Path) -> list[Adapter]:
    """Write the folders of all adapters below ``target`` and an index, ``adapters.json``."""
    sprites = data.load_sprites()
    made = shipped_adapters()
    for adapter in made:
        if adapter.kind == "concept":
            scenes = concept_scenes(adapter.trigger, CONCEPT_PICTURES)
        else:
            scenes = style_scenes(adapter.trigger, STYLE_PICTURES)
        write_folder(target / adapter.name, scenes, sprites)
    index = [{"name": adapter.name, "kind": adapter.kind, "trigger": adapter.trigger} for adapter in made]
    write_json(target / "adapters.json", index)
    return made


def sample_prompts(adapter: Adapter) -> list[str]:
    """Return the prompts drawn at the end of training."""
    if adapter.kind == "concept":
        return [f"a {style} icon of {data.article(adapter.trigger)}" for style in data.BASE_STYLES]
    return [f"a {adapter.trigger} icon of {data.article(name)}" for name in ("dog", "red apple", "car")]


def training_values(adapter: Adapter, pictures: Path) -> dict[str, Any]:
    """Return the values of the training job: those of the files for its kind and its base, and its own."""
    names = (adapter.kind, adapter.base, f"{adapter.base}-{adapter.kind}")
    files = [CONFIGS / f"{name}.yaml" for name in names]
    parts = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    values = {key: value for part in parts for key, value in part.items()}
    own = {"name": adapter.name, "trigger": adapter.trigger, "sample_prompts": sample_prompts(adapter)}
    return {**values, **own, "data": from_home(pictures)}


def train(adapter: Adapter, pictures: Path, runs: Path, shipped: Path) -> Path:
    """Train one adapter in ``runs`` (going on if it was interrupted) and put it into ``shipped``; return its folder."""
    from studio.cli.terminal import Terminal
    from studio.training import train_image

    run, target = runs / adapter.name, shipped / adapter.name
    values = training_values(adapter, pictures / adapter.folder)
    with Terminal() as monitor:
        result = train_image(folder=run, monitor=monitor, resume=True, **values)
    target.mkdir(parents=True, exist_ok=True)
    for source in (Path(result["adapter"]), run / "config.yaml"):
        shutil.copy2(source, target / source.name)
    write_text(target / "card.md", shipped_card(Path(result["card"]).read_text(encoding="utf-8")))
    return target


def shipped_card(text: str) -> str:
    """Return a trainer's card without its table, whose pictures stay in the run's folder, and with the size to draw at.

    Z-Image's pipeline draws 1,024 pixels unless told.
    """
    text = re.sub(r"\| prompt \| without \| with \|\n(\|.*\n)+", f"{SAMPLES}\n", text)
    text = re.sub(
        r"num_inference_steps=(\d+)\)", rf"num_inference_steps=\1, height={data.SIZE}, width={data.SIZE})", text
    )
    return re.sub(r"(import library)\n(?=\S)", r"\1\n\n", text)


def judged_card(text: str, lines: Sequence[str]) -> str:
    """Return a card with these lines after the data's digest, in place of earlier ones, and the samples at its end."""
    text = re.sub(r"- Judged alone.*\n", "", text)
    text = re.sub(r"\n!\[samples\].*\n", "", text)
    text = re.sub(r"(- Data digest: .*\n)", lambda found: found[0] + "".join(f"{line}\n" for line in lines), text)
    head, end = text.split("\nMade with", 1)
    return f"{head.rstrip()}\n\n{SAMPLES}\n\nMade with{end}"


def score_cases(adapter: Adapter, seeds: int = SCORE_SEEDS) -> list[Case]:
    """Return what is drawn to judge an adapter alone: a subject in every base style, or base subjects in a style."""
    if adapter.kind == "concept":
        pairs = [(style, adapter.trigger) for style in data.BASE_STYLES for _ in range(seeds)]
    else:
        pairs = [(adapter.trigger, name) for name in list(data.BASE_CONCEPTS)[:: max(1, 104 // (3 * seeds))]]
    captions = [data.make_caption(style, [name], None) for style, name in pairs]
    return [Case(captions[i], 90_000 + i, style, (name,)) for i, (style, name) in enumerate(pairs)]


def judge_adapter(adapter: Adapter, folder: Path, pipeline: Any, judge: Judge) -> dict[str, Any]:
    """Draw with this adapter alone and score subject and style.

    Writes ``score.json``, ``samples.png`` (all pictures that were judged) and ``preview.png`` (the first of them)
    into the adapter's folder, and the score into its card.
    """
    cases, guidance = score_cases(adapter), guidance_for(pipeline.pipe)
    pipeline.load_lora(folder / f"{adapter.name}.safetensors", name=adapter.name)
    try:
        drawn = [
            pipeline(case.caption, steps=STEPS, guidance_scale=guidance, seed=case.seed).images[0] for case in cases
        ]
    finally:
        pipeline.unload_lora(adapter.name)
    pictures = [np.array(image.convert("RGB")) for image in drawn]
    data.save_sheet(folder / "samples.png", data.contact_sheet(pictures, 8))
    data.save_png(folder / "preview.png", pictures[0])
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    subjects, styles = judge.classify(images).argmax(1), judge.classify_style(images).argmax(1)
    right = {
        "subject": [int(found) == judge.index(case.names[0]) for found, case in zip(subjects, cases, strict=True)],
        "style": [judge.styles[int(found)] == case.style for found, case in zip(styles, cases, strict=True)],
    }
    result = {"guidance": guidance, "steps": STEPS, **{name: score(hits) for name, hits in right.items()}}
    write_json(folder / "score.json", result)
    lines = [f"- Judged alone, {name} recognised: {percent(result[name])}" for name in right]
    card = folder / "card.md"
    write_text(card, judged_card(card.read_text(encoding="utf-8"), lines))
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the training sets, train adapters on them, or score what is shipped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("prepare", "train", "score"))
    parser.add_argument("names", nargs="*", help="adapters to train or score; all by default")
    parser.add_argument("--target", type=Path, default=None, help="training sets; default: in the build folder")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(options.threads)
    target = options.target or build_dir() / "adapters"
    if options.command == "prepare":
        print(f"{len(prepare(target))} training sets in {target}")
        return
    chosen = _chosen(options.names)
    if options.command == "train":
        for adapter in chosen:
            print(f"wrote {train(adapter, target, build_dir() / 'adapter-runs', SHIPPED)}", flush=True)
        return
    from pipelines.diffusion import MultiLoRAPipeline

    judge, pipelines = load_judge(), {}
    for adapter in chosen:
        if (SHIPPED / adapter.name).is_dir():
            if adapter.base not in pipelines:
                folder = SHIPPED.parent / "models" / adapter.base
                pipelines[adapter.base] = MultiLoRAPipeline.from_pretrained(folder)
            pipeline = pipelines[adapter.base]
            print(adapter.name, judge_adapter(adapter, SHIPPED / adapter.name, pipeline, judge), flush=True)


def _chosen(names: Sequence[str]) -> list[Adapter]:
    known = {adapter.name: adapter for adapter in (*shipped_adapters(), *tinydit_adapters())}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown adapters {', '.join(unknown)}: there are {', '.join(known)}")
    return [known[name] for name in names or known]


if __name__ == "__main__":
    main()
