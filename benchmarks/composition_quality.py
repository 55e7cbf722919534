"""Several subjects in one picture: is each at its own place, and only there?

    python -m benchmarks.composition_quality [--base tinydit|three-across] [--seeds 16] [--sets concepts|styles|all]
        [--minutes 60] [--write]

On an embedded base (tinymoji unless told) with its shipped concept adapters: sets of two and three side by side in
pictures twice as wide as high, each picture of a set with its own seed. Then the same pairs, from the same seeds,
with a style adapter that acts everywhere. Regional methods get the same sentence as the others in every region ("a
flat icon of a fox left of a robot"); only the adapters differ by region. LoRA-Composer works in all layers that have
places, not only in cross-attention: most of these adapters' weights are there. Every method draws the same sets from
the same seeds. The judge network (trained on renders only) looks at each region's part of every picture:

right       the concept is the judge's first answer in its own region.
all right   that holds for every concept of the picture.
bleed       a concept is the first answer in another's region.
likeness    cosine of EfficientNet-Lite0 features between a region and the pictures its adapter was trained on, less
            the same against the pictures of the other adapters of the set (0: no more like its own).
style       (sets with a style adapter) the style is the judge's first answer in the region; the judge answers for
            style apart from the subject.

The base "three-across" is tinymoji with the shipped adapter of that name folded into its weights before anything else:
sets of three in pictures three times as wide as high (``--pairs 0 --triples 8``).

Shares come with 95 % Wilson intervals. Pictures and answers are kept in the build folder as they are made, so the same
command continues where it stopped; answers made with other files of base or adapters are not reused. ``--write``
replaces rows that now have more pictures, or that other files made. Last, the doctor's prediction of interference is
compared with the bleed of "merge" over the pairs (``benchmarks.interference``).
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
from adapters import formats
from adapters.errors import InputError
from assets.build import data
from assets.build.adapters import slug
from assets.build.common import build_dir, write_json
from assets.build.evaluate import GUIDANCE, STEPS, wilson
from assets.build.judge import Judge, load_judge
from benchmarks import interference

RESULTS = Path(__file__).parent / "results"
STYLE = "flat"
"""The style that the sentence names where no adapter brings one."""
STYLE_PREFIX = "style-"
EXPECTED = """\
"injection only" (lora-composer with scope spatial and all parts off) is the algorithm of
"activation" with hard edges. Expected was LoRA-Composer before injection only before merge.
Its isolation in self-attention costs on
this base, and with regions nothing bleeds that it could mend: docs/regions.md says how that was found."""
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


@dataclass(frozen=True)
class Base:
    """An embedded base: model directory, how the names of its adapters begin, guidance, results file, its methods, the
    width of its pictures in heights, and an adapter that is folded into its weights ("" for none)."""

    name: str
    prefix: str
    guidance: float
    results: str
    ways: tuple[str, ...] = ()
    across: int = 2
    folded: str = ""

    @property
    def title(self) -> str:
        return self.folded or self.name

    def can(self, way: Way) -> bool:
        """Say whether a method works on this base."""
        return not self.ways or way.name in self.ways


TINYMOJI = Base("tinymoji", "", GUIDANCE, "composition_quality")
TINYDIT = Base(
    "tinydit", "tinydit-", GUIDANCE - 1, "composition_quality_tinydit",
    ("merge", "switch", "composite", "output", "activation"),
)  # fmt: skip
"""Z-Image counts guidance from 0, and has no cross-attention."""
THREE_ACROSS = Base(
    "tinymoji", "", GUIDANCE, "composition_quality_three_across",
    ("merge", "switch", "composite", "output", "activation", "lora-composer"), 3, "three-across",
)  # fmt: skip
BASES = {base.title: base for base in (TINYMOJI, TINYDIT, THREE_ACROSS)}

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
class Group:
    """Concept adapters from left to right, the style adapter that acts everywhere ("" for none), and the number that
    its seeds are made of."""

    subjects: tuple[str, ...]
    style: str
    number: int

    @property
    def adapters(self) -> tuple[str, ...]:
        return (*self.subjects, self.style) if self.style else self.subjects

    @property
    def title(self) -> str:
        return " + ".join(self.adapters)


@dataclass(frozen=True)
class Answer:
    """What was seen in one picture: the judge's words for subject and style per region, and the likeness per region."""

    way: str
    subjects: tuple[str, ...]
    style: str
    seed: int
    found: tuple[str, ...]
    styles: tuple[str, ...]
    likeness: tuple[float, ...]

    @property
    def right(self) -> tuple[bool, ...]:
        return tuple(a == b for a, b in zip(self.found, self.subjects, strict=True))

    @property
    def styled(self) -> tuple[bool, ...]:
        return tuple(self.style.endswith(f"{STYLE_PREFIX}{slug(word)}") for word in self.styles)

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


def grouped(made: Sequence[tuple[str, ...]], styles: Sequence[str], styled: int) -> list[Group]:
    """The sets as groups, then the first ``styled`` pairs again with the styles in turn, from the seeds they had."""
    groups = [Group(names, "", number) for number, names in enumerate(made)]
    pairs = [group for group in groups if len(group.subjects) == 2][:styled] if styles else []
    return groups + [Group(group.subjects, styles[group.number % len(styles)], group.number) for group in pairs]


def shipped_styles(base: Base = TINYMOJI) -> dict[str, str]:
    """Name -> trigger of the shipped style adapters."""
    words = {f"{base.prefix}{STYLE_PREFIX}{slug(word)}": word for word in data.HELD_STYLES}
    return {name: word for name, word in words.items() if _file(name).is_file()}


def shipped_concepts(least: float, base: Base = TINYMOJI) -> dict[str, str]:
    """Name -> trigger of the shipped concept adapters that the judge recognises alone in at least this share."""
    words = {f"{base.prefix}{slug(word)}": word for word in data.HELD_CONCEPTS}
    made = {}
    for file in sorted(assets.path("adapters").glob("*/score.json")):
        name = file.parent.name
        if name in words and json.loads(file.read_text(encoding="utf-8"))["subject"]["share"] >= least:
            made[name] = words[name]
    return made


class Studio:
    """The pipeline with the adapters of one set, asked for pictures."""

    def __init__(self, triggers: dict[str, str], base: Base) -> None:
        from pipelines.diffusion import MultiLoRAPipeline

        self.triggers, self.base = triggers, base
        self.pipe = MultiLoRAPipeline.from_pretrained(str(assets.path(f"models/{base.name}")))
        if base.folded:
            _fold(self.pipe.pipe, _file(base.folded))
        for name, trigger in triggers.items():
            self.pipe.load_lora(_file(name), name=name, triggers=(trigger,))

    def draw(self, way: Way, group: Group, seed: int) -> Image.Image:
        """One picture of the set, subjects from left to right."""
        names = group.subjects
        words = [self.triggers[name] for name in names]
        if way.regional:
            places = [
                {"adapters": [name], "box": box, "words": [word]}
                for name, word, box in zip(names, words, boxes(len(names)), strict=True)
            ]
            self.pipe.compose(way.method, adapters=group.adapters, regions=places, **way.options)
        else:
            self.pipe.compose(way.method, adapters=group.adapters, **way.options)
        prompt = data.make_caption(self.triggers[group.style] if group.style else STYLE, words, None)
        size = {"width": self.base.across * data.SIZE, "height": data.SIZE}
        made = self.pipe(prompt, steps=STEPS, guidance_scale=self.base.guidance, seed=seed, **size)
        return made.images[0].convert("RGB")


@torch.no_grad()
def _fold(pipe: Any, file: Path) -> None:
    """Add an adapter to the weights of a pipeline of diffusers."""
    for component, module, layer in formats.read(file).layers():
        getattr(pipe, component).get_submodule(module).weight += layer.delta()


class Observer:
    """The judge, and the likeness to each adapter's training pictures."""

    def __init__(self, judge: Judge, triggers: dict[str, str], base: Base) -> None:
        from benchmarks.efficientnet import Features

        self.judge, self.features, self.triggers = judge, Features(), triggers
        self.own = {name: self._mean_of(build_dir() / "adapters" / name.removeprefix(base.prefix)) for name in triggers}

    def _mean_of(self, folder: Path) -> Tensor:
        files = sorted(folder.glob("*.png"))
        if not files:
            raise InputError(f"{folder} has no pictures: run `python -m assets.build.adapters prepare`.")
        return self.features(torch.stack([_tensor(Image.open(file)) for file in files])).mean(0)

    def look(self, way: Way, group: Group, seed: int, picture: Image.Image) -> Answer:
        image, names = _tensor(picture)[None], group.subjects
        places = boxes(len(names))
        found = [self.judge.labels[int(self.judge.classify_region(image, box).argmax())] for box in places]
        parts = [_crop(image, box) for box in places]
        styles = [self.judge.styles[int(self.judge.classify_style(part).argmax())] for part in parts]
        seen = torch.cat([self.features(_square(part)) for part in parts])
        likeness = []
        for number, name in enumerate(names):
            others = [float(seen[number] @ self.own[other]) for other in names if other != name]
            likeness.append(float(seen[number] @ self.own[name]) - sum(others) / len(others))
        names_of = {word: name for name, word in self.triggers.items()}
        known = tuple(names_of.get(word, word) for word in found)
        return Answer(way.name, names, group.style, seed, known, tuple(styles), tuple(likeness))


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


def state_key(names: Iterable[str], base: Base = TINYMOJI) -> str:
    """Names the files that the answers depend on."""
    files = [
        *sorted(assets.path(f"models/{base.name}").rglob("*.safetensors")),
        *(_file(name) for name in sorted(names)),
        *([_file(base.folded)] if base.folded else []),
    ]
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
            Answer(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()})
            for row in rows
        ]
        self.known = {(a.way, a.subjects, a.style, a.seed) for a in self.answers}

    def add(self, answer: Answer, picture: Image.Image) -> None:
        picture.save(self.picture(answer.way, (*answer.subjects, answer.style), answer.seed))
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(vars(answer)) + "\n")
        self.answers.append(answer)

    def picture(self, way: str, adapters: Iterable[str], seed: int) -> Path:
        return self.folder / f"{'-'.join(way.replace(',', '').split())}_{'+'.join(filter(None, adapters))}_{seed}.png"


def todo(groups: Sequence[Group], seeds: int, ways: Sequence[Way]) -> Iterator[tuple[Way, Group, int]]:
    """All pictures, round by round, so that what is there after any time is balanced; no two sets of concepts share a
    seed."""
    for turn in range(seeds):
        for group in groups:
            for way in ways:
                yield way, group, 1000 * turn + group.number


def summary(answers: Sequence[Answer], ways: Sequence[Way]) -> list[dict[str, Any]]:
    """One row per way, size of set and style."""
    rows = []
    for size, style in sorted({(len(a.subjects), a.style) for a in answers}):
        for way in ways:
            mine = [a for a in answers if (a.way, len(a.subjects), a.style) == (way.name, size, style)]
            if mine:
                own = [ok for a in mine for ok in a.right]
                row: dict[str, Any] = {"method": way.name, "subjects": size, "style": style, "pictures": len(mine)}
                row |= _share("all right", [all(a.right) for a in mine]) | _share("right", own)
                row |= _share("bleed", [a.bleed for a in mine])
                if style:
                    row |= _share("styled", [ok for a in mine for ok in a.styled])
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
    """The rows as Markdown: sets of concepts, then those with a style."""
    lines = []
    for styled in (False, True):
        mine = [row for row in rows if bool(row["style"]) == styled]
        if not mine:
            continue
        first, more = ("style | method", " style |") if styled else ("subjects | method", "")
        head = f"| {first} | pictures | all right | each right | bleed |{more} likeness |"
        lines += ["", head, "|" + "---|" * (head.count("|") - 1)]
        for row in mine:
            keys = ("all right", "right", "bleed", *(("styled",) if styled else ()))
            shares = " | ".join(f"{row[key]:.1%} ({row[f'{key} low']:.1%} to {row[f'{key} high']:.1%})" for key in keys)
            name = row["style"].removeprefix(STYLE_PREFIX) if styled else row["subjects"]
            likeness = f"{row['likeness']:+.3f} ± {1.96 * row['likeness error']:.3f}"
            lines.append(f"| {name} | {row['method']} | {row['pictures']} | {shares} | {likeness} |")
    return lines[1:]


def measured_bleed(answers: Sequence[Answer], way: str = "merge") -> dict[tuple[str, str], float]:
    """Per pair of adapters, the share of pictures of one way in which a concept is where it should not be."""
    pairs: dict[tuple[str, str], list[bool]] = {}
    for answer in answers:
        if answer.way == way and len(answer.subjects) == 2 and not answer.style:
            first, second = sorted(answer.subjects)
            pairs.setdefault((first, second), []).append(answer.bleed)
    return {pair: sum(hits) / len(hits) for pair, hits in pairs.items()}


def grid(kept: Kept, groups: Sequence[Group], ways: Sequence[Way], cell: int = 64, across: int = 2) -> Image.Image:
    """The first seed of every set (rows) by every way (columns, names on top).

    ``cell`` is the height of a picture, ``across`` how many times it is as wide.
    """
    from PIL import ImageDraw, ImageFont

    font, left, top, wide = ImageFont.load_default(11), 80, 34, across * cell
    made = Image.new("RGB", (left + len(ways) * (wide + 4), top + len(groups) * (cell + 4)), "white")
    pen = ImageDraw.Draw(made)
    for column, way in enumerate(ways):
        words = way.name.replace("without ", "without\n").replace(", ", ",\n").replace("injection ", "injection\n")
        pen.multiline_text((left + column * (wide + 4), 2), words, fill="black", font=font)
    for row, group in enumerate(groups):
        pen.multiline_text((4, top + row * (cell + 4) + 8), "\n+ ".join(group.adapters), fill="black", font=font)
        for column, way in enumerate(ways):
            file = kept.picture(way.name, group.adapters, group.number)
            if file.is_file():
                with Image.open(file) as picture:
                    made.paste(picture.resize((wide, cell)), (left + column * (wide + 4), top + row * (cell + 4)))
    return made


def main() -> None:
    """Draw, judge and print; ``--write`` also writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16, help="pictures of each set per method")
    parser.add_argument("--sets", choices=("concepts", "styles", "all"), default="all")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--triples", type=int, default=2)
    parser.add_argument("--styled", type=int, default=6, help="how many of the pairs are drawn with a style, too")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop drawing after this time")
    parser.add_argument("--least", type=float, default=0.7, help="use concepts recognised alone in at least this share")
    parser.add_argument("--ways", default="", help="names of methods, separated by ';' (all by default)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/composition_quality*.*")
    parser.add_argument("--base", choices=tuple(BASES), default="tinymoji")
    options = parser.parse_args()
    base = BASES[options.base]
    torch.set_num_threads(options.threads)
    triggers, styles = shipped_concepts(options.least, base), shipped_styles(base)
    if len(triggers) < 2:
        raise SystemExit(f"fewer than two shipped concepts reach {options.least:.0%} alone")
    ways = [way for way in WAYS if base.can(way)]
    ways = [way for way in ways if not options.ways or way.name in options.ways.split(";")]
    groups = [
        group
        for group in grouped(sets(list(triggers), options.pairs, options.triples), list(styles), options.styled)
        if options.sets == "all" or bool(group.style) == (options.sets == "styles")
    ]
    files = state_key(triggers, base), state_key([*triggers, *styles], base)
    kept = Kept(build_dir() / "composition-quality" / files[1])
    work = [
        (way, group, seed)
        for way, group, seed in todo(groups, options.seeds, ways)
        if (way.name, group.subjects, group.style, seed) not in kept.known
    ]
    print(f"{len(kept.answers)} pictures are there, {len(work)} to draw", flush=True)
    if work:
        studio, observer = Studio(triggers | styles, base), Observer(load_judge(), triggers, base)
        end = time.monotonic() + 60 * options.minutes
        for way, group, seed in work:
            if time.monotonic() > end:
                break
            picture = studio.draw(way, group, seed)
            kept.add(observer.look(way, group, seed, picture), picture)
    drawn = {(group.subjects, group.style) for group in groups}
    rows = summary([a for a in kept.answers if (a.subjects, a.style) in drawn], ways)
    rows = [{**row, "files": files[bool(row["style"])]} for row in rows]
    print("\n".join(table(rows)))
    bleed = measured_bleed(kept.answers)
    agreement = None
    if len(bleed) >= 3:
        agreement = interference.validate(interference.predicted_for(sorted(triggers)), bleed)
        print(f"doctor's prediction against measured bleed of merge: {agreement}")
    if options.write:
        _write(base, rows, files, kept, groups, ways, agreement)


def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], files: Sequence[str]) -> list[dict[str, Any]]:
    """Old and new rows in the order of the table: of a row that both have the one with more pictures; old rows of
    other files are gone."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in [*(row for row in old if row["files"] in files), *new]:
        key = row["style"], row["subjects"], row["method"]
        if key not in best or row["pictures"] >= best[key]["pictures"]:
            best[key] = row
    order = [way.name for way in WAYS]
    known = [key for key in best if key[2] in order]
    return [best[key] for key in sorted(known, key=lambda key: (*key[:2], order.index(key[2])))]


def _write(
    base: Base, rows: list[dict[str, Any]], files: Sequence[str], kept: Kept, groups: list[Group], ways: list[Way],
    agreement: interference.Agreement | None,
) -> None:  # fmt: skip
    target = RESULTS / f"{base.results}.json"
    before: dict[str, Any] = {"rows": [], "conditions": {"sets": []}, "doctor": None}
    if target.is_file():
        before = json.loads(target.read_text(encoding="utf-8"))
    rows = merged(before["rows"], rows, files)
    titles = list(dict.fromkeys([*before["conditions"]["sets"], *(group.title for group in groups)]))
    conditions = {"date": time.strftime("%Y-%m-%d"), "steps": STEPS, "guidance": base.guidance, "sets": titles}
    doctor = before["doctor"]
    if agreement and (doctor is None or agreement.pairs >= doctor["pairs"]):
        doctor = vars(agreement)
    write_json(target, {"conditions": conditions, "rows": rows, "doctor": doctor})
    lines = ["# Composition: is each subject at its own place?", ""]
    about = f"base {base.title}, {STEPS} steps, guidance {base.guidance}; sets: {'; '.join(titles)}"
    command = "python -m benchmarks.composition_quality" + (f" --base {base.title}" if base != TINYMOJI else "")
    command += " --pairs 0 --triples 8 --seeds 3 --sets concepts" if base.folded else " --seeds 8"
    lines += [f"`{command} --write`; {about}. Shares with 95 % Wilson"]
    styled = "; the styles act everywhere, and the pairs with a style have the seeds of those without"
    lines += [f"intervals{styled if any(row['style'] for row in rows) else ''}.", ""]
    lines += table(rows)
    if base == TINYMOJI:
        lines += ["", EXPECTED]
    if base.folded:
        lines += ["", f"The adapter {base.folded} is folded into the base's weights; the others come on top of it."]
    if doctor:
        shown = interference.Agreement(**doctor)
        lines += ["", f"Doctor's prediction against the measured bleed of merge over pairs: {shown}."]
    for style, name in ((False, f"{base.results}.png"), (True, f"{base.results}_styles.png")):
        mine = [group for group in groups if bool(group.style) == style]
        if mine and all(kept.picture(way.name, g.adapters, g.number).is_file() for way in ways for g in mine):
            grid(kept, mine, ways, across=base.across).save(RESULTS / name)
        if (RESULTS / name).is_file():
            lines += ["", f"![one seed of every set]({name})"]
    (RESULTS / f"{base.results}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
