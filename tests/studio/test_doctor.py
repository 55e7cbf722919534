"""``studio doctor`` on the shipped adapters: what it prints, its picture, its plain values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from studio.cli.app import run
from studio.inspection import doctor


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "overlap.png"
    assert run(["doctor", "fox", "robot:0.5", "--prompt", "a fox", "--plot", str(plot), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found["adapters"]] == ["fox", "robot"]
    assert 0 < found["pairs"][0]["interference"] < 1
    assert any("robot" in remark for remark in found["remarks"])
    assert found["advice"]["regions"]  # two concepts in one picture
    with Image.open(plot) as image:
        assert image.width > 300
    assert run(["doctor", "fox", "robot"]) == 0
    assert "fox + robot" in capsys.readouterr().out
    assert run(["doctor", "fox", "nobody"]) == 2


def test_a_style_and_a_concept_get_along_better_than_two_concepts() -> None:
    found = doctor.diagnose(["fox", "robot", "style-monochrome"]).predicted()
    assert found["fox", "robot"] > found["fox", "style-monochrome"]
    assert doctor.report(["fox", "fox"])["pairs"][0]["interference"] == pytest.approx(1)


CONCEPTS = ("alien", "cactus", "cupcake", "fox", "octopus", "robot", "rocket", "snowman", "unicorn")


@pytest.mark.slow
def test_adapters_at_the_advised_strengths_still_draw_their_subjects(tmp_path: Path) -> None:
    """An undertrained adapter among them; the judge looks at each of the others alone."""
    import numpy as np
    import torch

    import studio as python
    from adapters import formats
    from adapters.formats.lora import LoraFile, LoraLayer
    from assets.build.judge import load_judge
    from studio import library

    fox = formats.read(Path(library.find("fox").path))
    parts = {
        part: {name: LoraLayer(layer.A, 0.05 * layer.B, layer.alpha) for name, layer in layers.items()}
        for part, layers in fox.parts.items()
    }
    hardly = formats.write(LoraFile(parts), tmp_path / "hardly.safetensors", "diffusers")
    advice = doctor.diagnose([hardly, *CONCEPTS]).advice
    assert any(reason.startswith("hardly is far weaker") for reason in advice.reasons)
    judge, right = load_judge(), []
    for name in CONCEPTS:
        trigger = library.find(name).triggers[0]
        pictures = python.compose(f"a flat icon of a {trigger}", {name: advice.weights[name]}, seed=500, images=4,
                                  guidance_scale=4.0, folder=tmp_path / name)  # fmt: skip
        pixels = torch.stack([torch.from_numpy(np.array(one.convert("RGB"))) for one in pictures])
        seen = judge.classify(pixels.permute(0, 3, 1, 2).float() / 255).argmax(1)
        right += [judge.labels[int(number)] == trigger for number in seen]
    assert np.mean(right) >= 0.8
