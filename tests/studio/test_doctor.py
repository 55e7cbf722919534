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
