"""Write the base model's card and the plot of its curves from what the other programs left behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from adapters.files import write_text
from assets.build import data

UNFINISHED = (
    "**The goals are not reached yet: the training was too short.** Colours, backgrounds and rough outlines follow the "
    "caption; inner detail mostly does not, and two subjects tend to mix. The judge always names the nearest of its "
    "subjects, so a right colour and outline is often enough for it where a person would still hesitate.\n\n"
)
"""Said in the card as long as a goal is missed."""


def read_json(file: Path) -> dict[str, Any]:
    """Return the parsed file, or an empty mapping when there is none."""
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found


def percent(scores: dict[str, Any]) -> str:
    """Write a share with its interval and count."""
    interval = f"{scores['low']:.1%} to {scores['high']:.1%}"
    return f"{scores['share']:.1%} ({interval}; {scores['right']} of {scores['pictures']})"


def draw_panel(
    series: dict[str, Sequence[tuple[float, float]]], title: str, size: tuple[int, int] = (520, 320)
) -> np.ndarray:
    """Plot lines on white: ``series`` maps a label to (x, y) points, y from 0 up; uint8 (H, W, 3)."""
    width, height = size
    left, right, top, bottom = 56, 14, 30, 34
    image = np.full((height, width, 3), 255, np.uint8)
    points = [p for line in series.values() for p in line]
    font, grey = cv2.FONT_HERSHEY_SIMPLEX, (110, 110, 110)
    cv2.putText(image, title, (left, 20), font, 0.48, (30, 30, 30), 1, cv2.LINE_AA)
    if not points:
        return image
    x_top, y_top = max(p[0] for p in points) or 1.0, 1.05 * max(p[1] for p in points) or 1.0

    def spot(x: float, y: float) -> tuple[int, int]:
        across = left + x / x_top * (width - left - right)
        return round(across), round(height - bottom - y / y_top * (height - top - bottom))

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = share * y_top
        cv2.line(image, spot(0, y), spot(x_top, y), (225, 225, 225), 1)
        cv2.putText(image, f"{y:.2f}", (8, spot(0, y)[1] + 4), font, 0.4, grey, 1, cv2.LINE_AA)
        x, where = share * x_top, spot(share * x_top, 0)
        cv2.putText(image, f"{x / 1000:.0f}k", (where[0] - 10, height - 14), font, 0.4, grey, 1, cv2.LINE_AA)
    colours = [(31, 90, 180), (214, 80, 30), (40, 150, 70)]
    for index, (label, line) in enumerate(series.items()):
        colour = colours[index % len(colours)]
        path = np.asarray([spot(x, y) for x, y in line], np.int32).reshape(-1, 1, 2)
        cv2.polylines(image, [path], False, colour, 2, cv2.LINE_AA)
        place = (width - 150, top + 16 + 18 * index)
        cv2.putText(image, label, place, font, 0.45, colour, 1, cv2.LINE_AA)
    return image


def curve_plot(target: Path, rows: Sequence[Sequence[float]], scores: dict[str, Any]) -> Path:
    """Write the training loss and the recognised shares over training samples as one PNG."""
    loss = [(row[1], row[3]) for row in rows]
    lines = {
        key: [(r["samples"], r[key]["share"]) for r in sorted(scores.values(), key=lambda r: r["samples"])]
        for key in ("single", "pair")
    }
    panels = [draw_panel({"loss": loss}, "training loss (v), by samples")]
    if scores:
        panels.append(draw_panel(lines, "recognised by the judge, by samples"))
    return data.save_png(target, np.concatenate(panels, 1))


def score_lines(scores: dict[str, Any]) -> str:
    """Write the table of scores, or a sentence when nothing has been measured."""
    if not scores:
        return "Not measured yet: run `python -m assets.build.evaluate`."
    rows = [
        ("one subject, recognised", scores["single"], "80 %"),
        ("two subjects, each recognised on its own side", scores["pair"], "60 %"),
        ("style of the single-subject pictures recognised", scores["single style"], ""),
        *((f"one subject, {style}", s, "") for style, s in scores["by style"].items()),
    ]
    for name, most in scores.get("ceiling", {}).items():
        rows += [
            (f"one subject: {name}", most["single"], "ceiling"),
            (f"two subjects: {name}", most["pair"], "ceiling"),
        ]
    table = "\n".join(f"| {what} | {percent(s)} | {goal} |" for what, s, goal in rows)
    weak = sorted(scores["by subject"].items(), key=lambda item: item[1])[:12]
    missed = ", ".join(f"{name} {share:.0%}" for name, share in weak if share < 0.5) or "none below 50 %"
    part = "all cases" if scores["fraction"] == 1 else f"an evenly spread {scores['fraction']:.0%} of the cases"
    missing = scores["single"]["share"] < 0.8 or scores["pair"]["share"] < 0.6
    return (UNFINISHED if missing else "") + (
        f"Measured on {part}, {scores.get('sampler', 'DDIM')}, {scores['steps']} steps, guidance "
        f"{scores['guidance']:g}, shares with 95 % Wilson intervals.\n\n"
        f"| measure | share | goal |\n|---|---|---|\n{table}\n\nWeakest subjects: {missed}."
    )


TINYMOJI = """# tinymoji

A very small text-to-image model in Stable Diffusion's own format: `CLIPTextModel` (3 layers of width
192, own tokenizer of 2,014 pieces, 40 tokens), `UNet2DConditionModel` (64, 160, 224 channels, attention
on all three levels, v-prediction) and `AutoencoderKL` (f=4, four channels). Pictures are 64 x 64 pixels, or
128 x 64: wide ones have more room for two or three subjects.
It exists so that everything that works on Stable Diffusion (LoRA training and composition above all)
can be run, tested and measured anywhere in seconds. It draws emoji-like icons and nothing else.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("assets/models/tinymoji")
pipe("a flat icon of a dog left of a cat", height=64, width=64, num_inference_steps=20, guidance_scale=4).images[0]
```
"""

TINYDIT = """# tinydit

A very small text-to-image model in the format of Z-Image (Z-Image Team 2025, arXiv 2511.22699), an architecture of
today: `ZImageTransformer2DModel` (one stream: picture and caption tokens attend to one another in all 6 layers of
width 256; rotary places; flow matching), `Qwen3Model` as text encoder (2 layers of width 192, of which Z-Image reads
the first; tinymoji's tokenizer of 2,014 pieces) and tinymoji's `AutoencoderKL`. Pictures are 64 x 64 pixels, or
128 x 64. It exists so that what works on such models (regions in joint attention, LoRA training and composition) can be
run, tested and measured anywhere in seconds. It draws emoji-like icons and nothing else.

```python
from diffusers import ZImagePipeline

pipe = ZImagePipeline.from_pretrained("assets/models/tinydit")
pipe("a flat icon of a dog left of a cat", height=64, width=64, num_inference_steps=20, guidance_scale=3).images[0]
```

Guidance counts from 0 in this pipeline: 3 here is 4 in Stable Diffusion's.
Outlines and colours are right more often than inner detail, which looks painted: the training was short.
"""


def tinymoji_training(run: dict[str, Any], vae: dict[str, Any]) -> str:
    """Say how tinymoji learned."""
    steps, samples, minutes = (run.get("rows") or [[0, 0, 0.0]])[-1][:3]
    return f"""\
Scenes of one, two and three subjects are composed from renders of emoji art at random sizes and places on
plain backgrounds; from sample 316,500 on, a fifth of the batches is twice as wide as high.
The autoencoder learned on {vae.get("crops", 0):,} crops of 32 pixels, its decoder then on
{vae.get("decoder pictures", 0):,} whole pictures, of all icons that the three base sets share (without the
held-out subjects). Error of a round trip (squared, values in -1 to 1): {vae.get("mse base styles", 0):.4f}, on the
held-out styles {vae.get("mse held-out styles", 0):.4f}.
Text encoder and denoiser learned together on {int(samples):,} samples ({int(steps):,} steps, {minutes:.0f} minutes,
bf16 on CPU), 10 % empty captions, AdamW, averaged weights. From sample 287,100 on, a second loss taught the
cross-attention where each named subject stands (`assets/build/grounding.py`, after TokenCompose, arXiv 2312.03626):
before it, two subjects changed places in as many pictures as they stood right. `python -m assets.build.base` continues
the training from its checkpoint.
"""


def tinydit_training(run: dict[str, Any], vae: dict[str, Any]) -> str:
    """Say how tinydit learned; ``vae`` is not looked at, the autoencoder is tinymoji's."""
    steps, samples, minutes = (run.get("rows") or [[0, 0, 0.0]])[-1][:3]
    rows = run.get("lesson rows", {})
    return f"""\
**It is a pupil of tinymoji** (`../tinymoji`), not trained on the data alone: scenes as there, composed from renders
of emoji art, with noise; the target is the flow velocity that tinymoji finds in them, its v-prediction converted at the
same ratio of signal to noise (`assets/build/lessons.py`). Only above noise level 0.936, where tinymoji was never
asked, the data's own target stands. So what tinymoji draws badly is drawn badly here too.
{int(samples):,} samples ({int(steps):,} steps, {minutes:.0f} minutes on one CPU core, bf16) from
{rows.get("1", 0):,} noisy scenes and {rows.get("2", 0):,} wide ones, each seen several times; 10 % empty captions;
Muon for the matrices in the blocks, AdamW for the rest; averaged weights. The token embedding began as tinymoji's,
everything else at random. The second layer of the text encoder is never read and untrained. From sample 39,300 on, a
second loss taught the attention of picture tokens to the caption's in three layers where each named subject stands
(`assets/build/grounding.py`), and scenes of several subjects came more often. Before it the two of a pair were mostly
mixed on both sides (0 of 12 right at 31,000 samples, 3 of 12 at 33,000), soon after it, at 45,500, 16 of 24 were right.
`python -m assets.build.flow` continues the training from its checkpoint.
"""


ABOUT = {"tinymoji": TINYMOJI, "tinydit": TINYDIT}
TRAINING = {"tinymoji": tinymoji_training, "tinydit": tinydit_training}


def model_card(
    name: str, scores: dict[str, Any], run: dict[str, Any], vae: dict[str, Any], judge: dict[str, Any]
) -> str:
    """Write the text of the card of the model ``name`` (tinymoji's for an unknown one)."""
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
{ABOUT.get(name, TINYMOJI)}
## Scores

{score_lines(scores)}

The judge is a network trained only on renders of the art (`../judge`). Its own accuracy on held-out
renders: {judge["seen"][0] if judge else 0:.1%} of subjects. Samples of these runs: `samples.png`; training loss and
scores over training: `curve.png`.

![samples](samples.png)
![curve](curve.png)

## What it knows

Styles: {", ".join(f"**{word}** ({icon_set})" for word, icon_set in data.BASE_STYLES.items())}.
Backgrounds: {", ".join(data.BACKGROUNDS)} (white when none is named).
{len(data.BASE_CONCEPTS)} subjects: {", ".join(data.BASE_CONCEPTS)}.

Captions look like `a flat icon of a red apple`, `a bold icon of a dog left of a cat, blue background`,
`a cartoon icon of on the left a dog, on the right a cat`, `an icon of a sun, a tree and a house`.

Kept out of all its training, to become adapters: the subjects {", ".join(data.HELD_CONCEPTS)}, in every
style; and the styles {", ".join(f"{word} ({icon_set})" for word, icon_set in data.HELD_STYLES.items())}.

## Training

{TRAINING.get(name, tinymoji_training)(run, vae)}
## Limits

Memorised icons, plain backgrounds, only the words above; counting beyond three, relations other than left and
right, and unusual colours do not work.

## Licences

Weights and programs: Apache-2.0. The pictures it learned from: Noto Emoji (Apache-2.0, Google), Twemoji
(CC-BY-4.0, Twitter and contributors), Fluent Emoji flat (MIT, Microsoft). See `assets/NOTICE`.
"""


def write_model_card(folder: Path) -> Path:
    """Write ``README.md`` and ``curve.png`` in the model directory from scores and training records."""
    run = read_json(folder / "training.json")
    curve_plot(folder / "curve.png", run.get("rows", []), read_json(folder / "learning-curve.json"))
    scores = read_json(folder / "scores.json")
    judge = read_json(folder.parent / "judge" / "facts.json")
    return write_text(folder / "README.md", model_card(folder.name, scores, run, run.get("vae", {}), judge))
