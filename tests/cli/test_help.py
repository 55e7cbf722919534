"""Every --help answers at once."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from studio.cli.app import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "diffusers", "transformers", "gradio", "huey", "huggingface_hub", "PIL", "numpy")

SUBCOMMANDS = [
    "train image", "library list", "library import", "library show", "jobs list", "jobs watch", "jobs resume",
    "lora inspect", "lora merge",
]  # fmt: skip

PROGRAM = """
import sys
from studio.cli.app import run
code = run(sys.argv[1:])
heavy = [name for name in {heavy!r} if name in sys.modules]
print("HEAVY", *heavy)
sys.exit(code)
"""


@pytest.mark.parametrize("command", ["", *COMMANDS, *SUBCOMMANDS])
def test_help_imports_nothing_heavy(command):
    program = PROGRAM.format(heavy=HEAVY)
    asked = subprocess.run(
        [sys.executable, "-c", program, *command.split(), "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert asked.returncode == 0, asked.stderr
    assert "Usage: studio" in asked.stdout
    assert asked.stdout.splitlines()[-1].split() == ["HEAVY"]


@pytest.mark.parametrize("command", ["", "compose", "train image"])
def test_help_takes_less_than_half_a_second(command):
    arguments = [sys.executable, "-c", "from studio.cli import main; main()", *command.split(), "--help"]
    best = 9.0
    for _ in range(5):  # the best of some: other programs share the machine
        begun = time.perf_counter()
        subprocess.run(arguments, capture_output=True, check=True, cwd=ROOT)
        best = min(best, time.perf_counter() - begun)
    assert best < 0.5
