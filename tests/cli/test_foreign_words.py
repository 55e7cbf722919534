"""What the libraries below print (bars, advice, deprecations) does not reach whoever runs a command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm.auto import tqdm

import assets
from benchmarks.presets import cut
from studio import silence
from tests.ui.conftest import environment

FOREIGN = re.compile(r"it/s|\d%\||Warning|\[transformers\]|\[diffusers\]|deprecat|torchvision", re.IGNORECASE)


def test_no_bar_is_drawn_inside(capsys: pytest.CaptureFixture[str]) -> None:
    with silence.no_bars():
        assert list(tqdm(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(tqdm(range(3))) == [0, 1, 2]
    assert "3/3" in capsys.readouterr().err


@pytest.mark.slow
def test_commands_speak_for_themselves(tmp_path: Path) -> None:
    pictures = cut(assets.path("adapters/fox/samples.png"), tmp_path / "pictures")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a?", "completion": "b"}) + "\n")
    (tmp_path / "prompts.txt").write_text("a flat icon of a dog\n")
    image = ["train", "image", "--data", str(pictures), "--trigger", "fox", "--preset", "concept-quick"]
    text = ["train", "language", "--data", str(tmp_path / "rows.jsonl"), "--preset", "quick"]
    few = ["train", "distill", "--prompts", str(tmp_path / "prompts.txt"), "--preset", "guidance", "--steps", "1"]
    for words in (
        [*image, "--estimate"], [*image, "--steps", "2"], [*text, "--check"], [*text, "--estimate"],
        [*text, "--steps", "1", "--sample-prompts", "a?"], [*few, "--trajectory-count", "1"],
        ["compose", "--prompt", "a fox", "--lora", "fox", "--steps", "2", "--out", str(tmp_path / "fox.png")],
        ["doctor", "fox", "robot"],
    ):  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "studio", *words], capture_output=True, text=True, check=False,
                              env=environment(tmp_path / "home"))  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert not FOREIGN.search(done.stderr + done.stdout), done.stderr[-500:]
