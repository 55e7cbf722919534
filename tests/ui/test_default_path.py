"""What the page makes when nothing is changed: two adapters, regions side by side, Generate. The judge looks at it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adapters.progress import Silent
from studio import library
from studio.composition import job as compose_job
from ui.components import canvas, rack
from ui.components.schema_form import show
from ui.pages import compose, compose_regions

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "composition_quality.json"
PAIRS = (("snowman", "robot"), ("rocket", "octopus"), ("unicorn", "alien"), ("cupcake", "fox"), ("fox", "cactus"))
SEEDS = 3


def page_config(left: str, right: str, seed: int) -> compose.ComposeConfig:
    """The job of an untouched form with two adapters side by side."""
    rows: list[rack.Row] = []
    for name in (left, right):
        rows = rack.add(rows, library.find(name))
    values = {name: show(compose.KNOWN[name], compose.KNOWN[name].default) for name in compose.NAMES}
    values["prompt"] = "a flat icon of " + " left of ".join(f"a {row['triggers'][0]}" for row in rows)
    mode = compose_regions.DRAWN
    values["method"] = compose_regions.suitable(mode, values["method"])
    width, height = compose_regions.wide(2, values["base"], None, None) or ("", "")
    values |= {"width": str(width), "height": str(height)}
    options = [show(compose_regions.KNOWN[name], compose_regions.KNOWN[name].default) or ""
               for name in compose_regions.OPTIONS]  # fmt: skip
    config = compose.config_of(list(values.values()), rows, [mode, canvas.columns([left, right]), *options])
    return config.model_copy(update={"seed": seed})


@pytest.mark.slow
def test_the_default_path_draws_both_subjects_as_often_as_the_benchmark(tmp_path: Path) -> None:
    import torch
    from PIL import Image

    from assets.build.judge import load_judge

    rows = json.loads(RESULTS.read_text())["rows"]
    promised = next(row for row in rows if row["method"] == "activation" and row["subjects"] == 2 and not row["style"])
    judge, right = load_judge(), []
    for left, right_name in PAIRS:
        for seed in range(SEEDS):
            config = page_config(left, right_name, 100 + seed)
            folder = tmp_path / f"{left}-{seed}"
            folder.mkdir()
            made = compose_job.run(config, folder, Silent())
            pixels = np.array(Image.open(made["images"][0]).convert("RGB"))
            image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
            for name, box in zip((left, right_name), ((0, 0, 0.5, 1), (0.5, 0, 1, 1)), strict=True):
                seen = judge.labels[int(judge.classify_region(image, box).argmax())]
                right.append(seen == library.find(name).triggers[0])
    assert np.mean(right) >= promised["right low"]
