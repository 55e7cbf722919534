"""What each preset for pictures comes to on the embedded base: trained with nothing changed, seen by the judge.

A preset goes through the Train page's own form at its default values. A concept (fox, which the base has never seen)
is learnt from 24 pictures without captions, or with them for the captioned presets; a style (3d) from 60 captioned
pictures. The judge then names the subject of pictures drawn with the adapter alone (20 steps, guidance 4): by the
prompt that training uses for pictures without caption, and by the captions' wording. Pictures come from
``python -m assets.build.adapters prepare`` (needs npm once).

A preset of distilling has one prompt for each subject of the base, in styles that take turns. The judge names the
subjects of prompts with another style each, drawn as the adapter is meant to be used, and by the base: with guidance in
20 steps, and with as many passes through the network as the adapter needs.

    python -m benchmarks.presets --pictures FOLDER [PRESET ...]    # adds to benchmarks/results/presets.{json,md}
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import assets
from adapters.files import write_text
from adapters.progress import Silent
from assets.build import data
from assets.build.judge import Judge, load_judge
from studio.composition import distilled_adapters
from studio.training.presets import PRESETS
from studio.training.schemas.distill import DistillConfig
from studio.training.schemas.image import TrainImageConfig
from studio.training.tasks import distillation
from studio.training.tasks.image import run
from ui.components.schema_form import show
from ui.pages import distill, train

RESULTS = Path(__file__).parent / "results" / "presets.json"
STEPS, GUIDANCE = 20, 4.0
NAMES = [name for name in PRESETS[train.JOB] if "-" in name]
DISTILLED = list(PRESETS[distill.JOB])


def page_config(preset: str, pictures: Path, trigger: str) -> TrainImageConfig:
    """The job of the Train page's form with a preset chosen and nothing else changed."""
    mode, length = preset.split("-")
    values = {name: show(item, item.default) for name, item in train.KNOWN.items()}
    base = str(values["base"])
    values |= dict(zip(train.PRESET_FIELDS, train.preset_values(mode, length, base), strict=True))
    values |= {"mode": mode, "name": "made", "trigger": trigger, "data": str(pictures)}
    return train.config_of([], [values[name] for name in train.NAMES])


def judged(
    adapter: str | Path | None, prompts: Sequence[str], subjects: Sequence[str], judge: Judge, **settings: Any
) -> dict[str, Any]:
    """Draw every prompt with one adapter (None: the base alone): share of right subjects, and the styles that the judge
    sees. ``settings`` replace 20 steps and guidance 4."""
    from pipelines.diffusion import MultiLoRAPipeline

    pipe = MultiLoRAPipeline.from_pretrained(assets.path("models/tinymoji"))
    if adapter is not None:
        pipe.load_lora(adapter, name="made")
    how = {"steps": STEPS, "guidance_scale": GUIDANCE, **settings}
    drawn = [
        np.array(pipe(prompt, **how, seed=9000 + number).images[0].convert("RGB"))
        for number, prompt in enumerate(prompts)
    ]
    images = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255
    found = [judge.labels[int(best)] for best in judge.classify(images).argmax(1)]
    styles = [judge.styles[int(best)] for best in judge.classify_style(images).argmax(1)]
    right = sum(seen == subject for seen, subject in zip(found, subjects, strict=True))
    return {"subject": right / len(prompts), "styles": styles}


def cut(sheet: Path, folder: Path, side: int = 64, gap: int = 2) -> Path:
    """The pictures of a shipped adapter's sheet of samples as files in ``folder``."""
    picture = Image.open(sheet).convert("RGB")
    folder.mkdir(parents=True, exist_ok=True)
    for top in range(gap, picture.height - side + 1, side + gap):
        for left in range(gap, picture.width - side + 1, side + gap):
            picture.crop((left, top, left + side, top + side)).save(folder / f"{top:03d}-{left:03d}.png")
    return folder


def measure(preset: str, pictures: Path, judge: Judge) -> dict[str, Any]:
    """Train a preset and look at what it draws."""
    mode = preset.split("-")[0]
    subject = "3d" if mode == "style" else "fox"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "pictures"
        shutil.copytree(pictures / (f"style-{subject}" if mode == "style" else subject), folder)
        if mode == "concept":
            for caption in folder.glob("*.txt"):
                caption.unlink()
        config = page_config(preset, folder, subject)
        began = time.perf_counter()
        adapter = run(config, Path(place) / "run", Silent())["adapter"]
        seconds = time.perf_counter() - began
        row: dict[str, Any] = {"preset": preset, "subject": subject, "seconds": round(seconds, 1)}
        if mode == "style":
            names = list(data.BASE_CONCEPTS)[::5][:20]
            seen = judged(adapter, [data.make_caption(subject, [name], None) for name in names], names, judge)
            row |= {"by caption": seen["subject"], "style": seen["styles"].count(subject) / len(names)}
        else:
            looks = [list(data.BASE_STYLES)[number % 3] for number in range(18)]
            captions = [data.make_caption(look, [subject], None) for look in looks]
            row["by caption"] = judged(adapter, captions, [subject] * 18, judge)["subject"]
            row["by prompt"] = judged(adapter, [f"a picture of {subject}"] * 12, [subject] * 12, judge)["subject"]
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}


def distilled_config(preset: str, prompts: Path) -> DistillConfig:
    """The job of a preset of distilling with nothing else changed; ``prompts`` is written with one per subject."""
    lines = [data.make_caption(style, [name], None) for style, name in _subjects(0)]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return DistillConfig.parse({"preset": preset, "base": "tinymoji", "prompts": str(prompts), "name": "made"})


def _subjects(turn: int) -> list[tuple[str, str]]:
    """``(style, subject)`` for every subject of the base, in styles that take turns from number ``turn`` on."""
    styles = list(data.BASE_STYLES)
    return [(styles[(number + turn) % len(styles)], name) for number, name in enumerate(data.BASE_CONCEPTS)]


def measure_distilled(preset: str, judge: Judge) -> dict[str, Any]:
    """Train a preset of distilling and look at what it draws."""
    with tempfile.TemporaryDirectory() as place:
        config = distilled_config(preset, Path(place) / "prompts.txt")
        began = time.perf_counter()
        adapter = distillation.run(config, Path(place) / "run", Silent())["adapter"]
        seconds = time.perf_counter() - began
        return {"preset": preset, "seconds": round(seconds, 1), **seen_of(Path(adapter), judge)}


def seen_of(adapter: Path, judge: Judge) -> dict[str, Any]:
    """Shares of subjects recognised: by a distilled adapter, its teacher, and the base at the same price."""
    known = distilled_adapters.of(adapter)
    assert known is not None
    asked = _subjects(1)[::2]
    prompts, names = [data.make_caption(style, [name], None) for style, name in asked], [name for _, name in asked]
    steps = known.steps or STEPS
    fewer = {"steps": steps, "guidance_scale": 1.0} if known.steps else {"guidance_scale": 1.0}
    found = {
        "adapter": judged(adapter, prompts, names, judge, **known.settings())["subject"],
        "teacher": judged(None, prompts, names, judge)["subject"],
        "base": judged(None, prompts, names, judge, **fewer)["subject"],
    }
    return {"steps": steps, "pictures": len(names), **{name: round(share, 3) for name, share in found.items()}}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results for people."""

    def share(row: dict[str, Any], name: str) -> str:
        return f"{row[name]:.0%}" if name in row else ""

    lines = [
        "# Presets of image training on the embedded base",
        "",
        "Each preset as the Train page offers it, nothing changed; 64 px, one CPU thread of a busy machine. Concepts"
        " learn `fox` from 24 pictures (without captions in the concept presets), styles learn `3d` from 60 captioned"
        " ones. Shares of pictures whose subject the judge names rightly; `style`: whose style it names so.",
        "",
        "| preset | `a picture of fox` (12) | worded as captions (18 or 20) | style (20) | seconds |",
        "|---|---|---|---|---|",
        *(f"| {row['preset']} | {share(row, 'by prompt')} | {share(row, 'by caption')} | {share(row, 'style')} | "
          f"{row['seconds']:.0f} |" for row in rows if "teacher" not in row),
        *_distilled_table([row for row in rows if "teacher" in row]),
        "",
        "Made by `python -m benchmarks.presets`.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _distilled_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines about presets of distilling, if there are any."""
    if not rows:
        return []
    return [
        "",
        "Presets of distilling: single subjects of the base that the judge recognises, in styles that the prompts of"
        f" the training did not give them. Teacher: guidance {GUIDANCE:g}, {STEPS} steps; base: without guidance, in as"
        " many steps as the adapter.",
        "",
        "| preset | steps | pictures | adapter | teacher | base | seconds |",
        "|---|---|---|---|---|---|---|",
        *(f"| {row['preset']} | {row['steps']} | {row['pictures']} | {row['adapter']:.0%} | {row['teacher']:.0%} | "
          f"{row['base']:.0%} | {row['seconds']:.0f} |" for row in rows),
    ]  # fmt: skip


def main() -> None:
    """Measure the presets that are named (all by default) and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=[*NAMES, *DISTILLED])
    parser.add_argument("--pictures", type=Path, help="of the presets of training; distilling needs none")
    options = parser.parse_args()
    if options.pictures is None and not set(options.presets) <= set(DISTILLED):
        parser.error("presets of training need --pictures")
    torch.set_num_threads(1)
    rows = {row["preset"]: row for row in (json.loads(RESULTS.read_text()) if RESULTS.is_file() else [])}
    judge = load_judge()
    for preset in options.presets:
        made = measure_distilled(preset, judge) if preset in DISTILLED else measure(preset, options.pictures, judge)
        rows[preset] = made
        print(rows[preset], flush=True)
        keep(rows)


def keep(rows: Mapping[str, dict[str, Any]]) -> None:
    """Write the rows by preset, and the table, after every preset: a run that is stopped keeps what it has measured."""
    ordered = [rows[name] for name in [*NAMES, *DISTILLED] if name in rows]
    write_text(RESULTS, json.dumps(ordered, indent=1) + "\n")
    write_text(RESULTS.with_suffix(".md"), table(ordered))


if __name__ == "__main__":
    main()
