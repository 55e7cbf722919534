"""Training sets of the shipped adapters: ``python -m assets.build.adapters prepare``.

For every held-out subject a folder of single-subject pictures in the base styles, for every held-out
style a folder of base subjects in that style; pictures are PNG, captions lie beside them as ``.txt``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from assets.build import data
from assets.build.common import build_dir, write_json, write_text

CONCEPT_PICTURES = 24
STYLE_PICTURES = 60


@dataclass(frozen=True)
class Adapter:
    """One adapter to be trained: file name, ``concept`` or ``style``, and the word that calls it."""

    name: str
    kind: str
    trigger: str


def shipped_adapters() -> list[Adapter]:
    """Return every concept and style adapter, concepts first."""
    concepts = [Adapter(slug(word), "concept", word) for word in data.HELD_CONCEPTS]
    return concepts + [Adapter(f"style-{slug(word)}", "style", word) for word in data.HELD_STYLES]


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
    write_json(target / "adapters.json", [vars(adapter) for adapter in made])
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the training sets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("prepare",))
    parser.add_argument("--target", type=Path, default=None, help="default: adapters/ in the build folder")
    options = parser.parse_args(arguments)
    target = options.target or build_dir() / "adapters"
    print(f"{len(prepare(target))} training sets in {target}")


if __name__ == "__main__":
    main()
