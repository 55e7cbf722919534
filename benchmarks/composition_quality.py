"""Several subjects in one picture: is each at its own place, and only there?

    python -m benchmarks.composition_quality [--seeds 16] [--minutes 60] [--write]

On the embedded base with the shipped concept adapters, sets of two and three side by side in pictures twice as wide as
high, one seed of its own for every picture of a set. Regional methods are told the same sentence as the others in every
region ("a flat icon of a fox left of a robot"); only the adapters differ by region. LoRA-Composer works in all layers
that have places, not in cross-attention alone: most of these adapters' weights are there. Every method draws the same
sets from the same seeds. The judge network (trained on renders only) looks at each region's part of every picture:

right       the concept is the judge's first answer in its own region.
all right   that holds for every concept of the picture.
bleed       a concept is the first answer in a region that is not its own.
likeness    cosine of EfficientNet-Lite0 features between a region and the pictures its adapter was trained on, less
            the same against the pictures of the other adapters of the set (0: no more like its own).

Shares come with 95 % Wilson intervals. Pictures and answers are kept in the build folder as they are made, so the same
command goes on where it stopped; answers made with other files of base or adapters are not used again. Last, the
doctor's prediction of interference is compared with the bleed of "merge" over the pairs (``benchmarks.interference``).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import assets
from adapters.errors import InputError
from assets.build import data
from assets.build.adapters import slug
from assets.build.common import build_dir, write_json
from assets.build.evaluate import GUIDANCE, STEPS, wilson
from assets.build.judge import Judge, load_judge
from benchmarks import interference

RESULTS = Path(__file__).parent / "results"
STYLE = "flat"
PARTS = {"self_mask": False, "reinit": False, "refine": False}


@dataclass(frozen=True)
class Way:
    """One column of the table: a method with its options; ``regional`` ones are told the places."""

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    regional: bool = False


def _composer(name: str, **options: Any) -> Way:
    parts = {"scope": "spatial", "self_mask": True, "reinit": True, "refine": True}
    return Way(name, "lora-composer", parts | options, True)


WAYS = (
    Way("merge", "merge"),
    Way("switch", "switch"),
    Way("composite", "composite"),
    Way("output", "output", regional=True),
    Way("activation", "activation", regional=True),
    Way("cross", "cross", regional=True),
    _composer("lora-composer"),
    _composer("lora-composer, cross-attention only", scope="cross"),
    _composer("injection only", **PARTS),
    _composer("without self mask", self_mask=False),
    _composer("without re-initialisation", reinit=False),
    _composer("without refinement", refine=False),
    _composer("without filling loss", fill_loss=False),
    _composer("without Gaussian", gaussian=False),
    _composer("without region loss", region_loss=False),
)


@dataclass(frozen=True)
class Answer:
    """What was seen in one picture: the judge's word per region, and its likeness per region."""

    way: str
    subjects: tuple[str, ...]
    seed: int
    found: tuple[str, ...]
    likeness: tuple[float, ...]

    @property
    def right(self) -> tuple[bool, ...]:
        return tuple(a == b for a, b in zip(self.found, self.subjects, strict=True))

    @property
    def bleed(self) -> bool:
        return any(seen in self.subjects and seen != own for own, seen in zip(self.subjects, self.found, strict=True))


def boxes(count: int) -> list[tuple[float, float, float, float]]:
    """Equal columns from left to right."""
    return [(k / count, 0.0, (k + 1) / count, 1.0) for k in range(count)]


def sets(concepts: Sequence[str], pairs: int, triples: int) -> list[tuple[str, ...]]:
    """The sets to draw: pairs and triples in which every concept comes about equally often, order drawn once."""
    rng = np.random.default_rng(5)
    made: list[tuple[str, ...]] = []
    for size, wanted in ((2, pairs), (3, triples)):
        known = list(itertools.combinations(concepts, size))
        used = dict.fromkeys(concepts, 0)
        for _ in range(min(wanted, len(known))):
            best = min(known, key=lambda names: (sum(used[name] for name in names), rng.random()))
            known.remove(best)
            used.update({name: used[name] + 1 for name in best})
            made.append(tuple(str(name) for name in rng.permutation(best)))
    return made


def shipped_concepts(least: float) -> dict[str, str]:
    """Name -> trigger of the shipped concept adapters that the judge recognises alone in at least this share."""
    words = {slug(word): word for word in data.HELD_CONCEPTS}
    made = {}
    for file in sorted(assets.path("adapters").glob("*/score.json")):
        name = file.parent.name
        if name in words and json.loads(file.read_text(encoding="utf-8"))["subject"]["share"] >= least:
            made[name] = words[name]
    return made


class Studio:
    """The pipeline with the adapters of one set, asked for pictures."""

    def __init__(self, triggers: dict[str, str]) -> None:
        from pipelines.diffusion import MultiLoRAPipeline

        self.triggers = triggers
        self.pipe = MultiLoRAPipeline.from_pretrained(str(assets.path("models/tinymoji")))
        for name, trigger in triggers.items():
            self.pipe.load_lora(_file(name), name=name, triggers=(trigger,))

    def draw(self, way: Way, names: Sequence[str], seed: int) -> Image.Image:
        """One picture of the set, subjects from left to right."""
        words = [self.triggers[name] for name in names]
        if way.regional:
            places = [
                {"adapters": [name], "box": box, "words": [word]}
                for name, word, box in zip(names, words, boxes(len(names)), strict=True)
            ]
            self.pipe.compose(way.method, adapters=names, regions=places, **way.options)
        else:
            self.pipe.compose(way.method, adapters=names, **way.options)
        prompt = data.make_caption(STYLE, words, None)
        made = self.pipe(prompt, steps=STEPS, guidance_scale=GUIDANCE, seed=seed, width=2 * data.SIZE, height=data.SIZE)
        return made.images[0].convert("RGB")


class Observer:
    """The judge, and the likeness to each adapter's training pictures."""

    def __init__(self, judge: Judge, triggers: dict[str, str]) -> None:
        from benchmarks.efficientnet import Features

        self.judge, self.features, self.triggers = judge, Features(), triggers
        self.own = {name: self._mean_of(build_dir() / "adapters" / name) for name in triggers}

    def _mean_of(self, folder: Path) -> Tensor:
        files = sorted(folder.glob("*.png"))
        if not files:
            raise InputError(f"{folder} has no pictures: run `python -m assets.build.adapters prepare`.")
        return self.features(torch.stack([_tensor(Image.open(file)) for file in files])).mean(0)

    def look(self, way: Way, names: Sequence[str], seed: int, picture: Image.Image) -> Answer:
        image = _tensor(picture)[None]
        places = boxes(len(names))
        found = [self.judge.labels[int(self.judge.classify_region(image, box).argmax())] for box in places]
        seen = torch.cat([self.features(_square(_crop(image, box))) for box in places])
        likeness = []
        for number, name in enumerate(names):
            others = [float(seen[number] @ self.own[other]) for other in names if other != name]
            likeness.append(float(seen[number] @ self.own[name]) - sum(others) / len(others))
        names_of = {word: name for name, word in self.triggers.items()}
        return Answer(way.name, tuple(names), seed, tuple(names_of.get(w, w) for w in found), tuple(likeness))


def _crop(image: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    height, width = image.shape[-2:]
    return image[..., round(box[1] * height) : round(box[3] * height), round(box[0] * width) : round(box[2] * width)]


def _square(image: Tensor) -> Tensor:
    """Fill to a square with the edge pixels, as the judge sees it."""
    height, width = image.shape[-2:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    return torch.nn.functional.pad(image, (left, side - width - left, top, side - height - top), mode="replicate")


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def _file(name: str) -> Path:
    return assets.path("adapters") / name / f"{name}.safetensors"


def state_key(names: Iterable[str]) -> str:
    """Names the files that the answers depend on."""
    files = [*sorted(assets.path("models/tinymoji").rglob("*.safetensors")), *(_file(name) for name in sorted(names))]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:12]


class Kept:
    """Answers and pictures made so far, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "answers.jsonl"
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        rows = [json.loads(line) for line in lines]
        self.answers = [
            Answer(r["way"], tuple(r["subjects"]), r["seed"], tuple(r["found"]), tuple(r["likeness"])) for r in rows
        ]
        self.known = {(a.way, a.subjects, a.seed) for a in self.answers}

    def add(self, answer: Answer, picture: Image.Image) -> None:
        picture.save(self.picture(answer.way, answer.subjects, answer.seed))
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(vars(answer)) + "\n")
        self.answers.append(answer)

    def picture(self, way: str, subjects: Sequence[str], seed: int) -> Path:
        return self.folder / f"{'-'.join(way.replace(',', '').split())}_{'+'.join(subjects)}_{seed}.png"


def todo(
    groups: Sequence[tuple[str, ...]], seeds: int, ways: Sequence[Way]
) -> Iterator[tuple[Way, tuple[str, ...], int]]:
    """All pictures, round by round, so that what is there after any time is balanced; no two sets share a seed."""
    for turn in range(seeds):
        for number, names in enumerate(groups):
            for way in ways:
                yield way, names, 1000 * turn + number


def summary(answers: Sequence[Answer], ways: Sequence[Way]) -> list[dict[str, Any]]:
    """One row per way and size of set."""
    rows = []
    for size in sorted({len(a.subjects) for a in answers}):
        for way in ways:
            mine = [a for a in answers if a.way == way.name and len(a.subjects) == size]
            if mine:
                own = [ok for a in mine for ok in a.right]
                row: dict[str, Any] = {"method": way.name, "subjects": size, "pictures": len(mine)}
                row |= _share("all right", [all(a.right) for a in mine]) | _share("right", own)
                row |= _share("bleed", [a.bleed for a in mine])
                values = np.array([value for a in mine for value in a.likeness])
                row |= {"likeness": round(float(values.mean()), 4)}
                row |= {"likeness error": round(float(values.std(ddof=1) / np.sqrt(len(values))), 4)}
                rows.append(row)
    return rows


def _share(name: str, hits: Sequence[bool]) -> dict[str, Any]:
    low, high = wilson(sum(hits), len(hits))
    return {
        name: round(sum(hits) / len(hits), 4),
        f"{name} low": round(max(low, 0.0), 4),
        f"{name} high": round(high, 4),
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    head = "| subjects | method | pictures | all right | each right | bleed | likeness |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for row in rows:
        shares = " | ".join(
            f"{row[key]:.1%} ({row[f'{key} low']:.1%} to {row[f'{key} high']:.1%})"
            for key in ("all right", "right", "bleed")
        )
        likeness = f"{row['likeness']:+.3f} ± {1.96 * row['likeness error']:.3f}"
        lines.append(f"| {row['subjects']} | {row['method']} | {row['pictures']} | {shares} | {likeness} |")
    return lines


def measured_bleed(answers: Sequence[Answer], way: str = "merge") -> dict[tuple[str, str], float]:
    """Per pair of adapters, the share of pictures of one way in which a concept is where it should not be."""
    pairs: dict[tuple[str, str], list[bool]] = {}
    for answer in answers:
        if answer.way == way and len(answer.subjects) == 2:
            first, second = sorted(answer.subjects)
            pairs.setdefault((first, second), []).append(answer.bleed)
    return {pair: sum(hits) / len(hits) for pair, hits in pairs.items()}


def grid(kept: Kept, groups: Sequence[tuple[str, ...]], ways: Sequence[Way], cell: int = 64) -> Image.Image:
    """The first seed of every set (rows) by every way (columns, names on top); ``cell`` is the height of a picture."""
    from PIL import ImageDraw, ImageFont

    font, left, top, wide = ImageFont.load_default(11), 80, 34, 2 * cell
    made = Image.new("RGB", (left + len(ways) * (wide + 4), top + len(groups) * (cell + 4)), "white")
    pen = ImageDraw.Draw(made)
    for column, way in enumerate(ways):
        words = way.name.replace("without ", "without\n").replace(", ", ",\n").replace("injection ", "injection\n")
        pen.multiline_text((left + column * (wide + 4), 2), words, fill="black", font=font)
    for row, names in enumerate(groups):
        pen.multiline_text((4, top + row * (cell + 4) + 8), "\nand ".join(names), fill="black", font=font)
        for column, way in enumerate(ways):
            file = kept.picture(way.name, names, row)
            if file.is_file():
                with Image.open(file) as picture:
                    made.paste(picture.resize((wide, cell)), (left + column * (wide + 4), top + row * (cell + 4)))
    return made


def main() -> None:
    """Draw, judge and print; ``--write`` also writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16, help="pictures of each set per method")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--triples", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop drawing after this time")
    parser.add_argument("--least", type=float, default=0.7, help="use concepts recognised alone in at least this share")
    parser.add_argument("--ways", default="", help="names of methods, separated by ';' (all by default)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/composition_quality.*")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    triggers = shipped_concepts(options.least)
    if len(triggers) < 2:
        raise SystemExit(f"fewer than two shipped concepts reach {options.least:.0%} alone")
    ways = [way for way in WAYS if not options.ways or way.name in options.ways.split(";")]
    groups = sets(list(triggers), options.pairs, options.triples)
    kept = Kept(build_dir() / "composition-quality" / state_key(triggers))
    work = [item for item in todo(groups, options.seeds, ways) if (item[0].name, *item[1:]) not in kept.known]
    print(f"{len(kept.answers)} pictures are there, {len(work)} to draw", flush=True)
    if work:
        studio, observer, end = (
            Studio(triggers),
            Observer(load_judge(), triggers),
            time.monotonic() + 60 * options.minutes,
        )
        for way, names, seed in work:
            if time.monotonic() > end:
                break
            picture = studio.draw(way, names, seed)
            kept.add(observer.look(way, names, seed, picture), picture)
    chosen = [a for a in kept.answers if a.subjects in groups]
    rows = summary(chosen, ways)
    print("\n".join(table(rows)))
    bleed = measured_bleed(kept.answers)
    agreement = None
    if len(bleed) >= 3:
        agreement = interference.validate(interference.predicted_for(sorted(triggers)), bleed)
        print(f"doctor's prediction against measured bleed of merge: {agreement}")
    if options.write:
        _write(rows, kept, groups, ways, agreement, options)


def _write(
    rows: list[dict[str, Any]], kept: Kept, groups: list[tuple[str, ...]], ways: list[Way],
    agreement: interference.Agreement | None, options: argparse.Namespace,
) -> None:  # fmt: skip
    conditions = {
        "date": time.strftime("%Y-%m-%d"), "seeds": options.seeds, "steps": STEPS, "guidance": GUIDANCE,
        "sets": [" + ".join(names) for names in groups], "files": kept.folder.name,
    }  # fmt: skip
    doctor = vars(agreement) if agreement else None
    write_json(RESULTS / "composition_quality.json", {"conditions": conditions, "rows": rows, "doctor": doctor})
    lines = ["# Composition: is each subject at its own place?", ""]
    command = f"python -m benchmarks.composition_quality --seeds {options.seeds} --write"
    about = f"base tinymoji, {STEPS} steps, guidance {GUIDANCE}; sets: {'; '.join(conditions['sets'])}"
    lines += [f"`{command}`; {about}. Shares with 95 % Wilson intervals.", ""]
    lines += table(rows)
    if agreement:
        lines += ["", f"Doctor's prediction against the measured bleed of merge over pairs: {agreement}."]
    lines += ["", "![one seed of every set](composition_quality.png)"]
    (RESULTS / "composition_quality.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    grid(kept, groups, ways).save(RESULTS / "composition_quality.png")


if __name__ == "__main__":
    main()
