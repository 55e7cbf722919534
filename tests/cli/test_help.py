"""Every --help answers at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from studio.cli.app import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "diffusers", "transformers", "gradio", "huey", "huggingface_hub", "PIL", "numpy")

SUBCOMMANDS = [
    "train image", "train language", "library list", "library import", "library show", "jobs list",
    "jobs watch", "jobs resume", "lora inspect", "lora merge", "data show", "data caption",
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


def processor_time(arguments: list[str]) -> float:
    """User and system seconds of a command that must succeed."""
    asked = subprocess.Popen(
        [sys.executable, "-c", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    _, status, usage = os.wait4(asked.pid, 0)
    asked.returncode = os.waitstatus_to_exitcode(status)
    assert asked.returncode == 0
    return usage.ru_utime + usage.ru_stime


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs the processor time of a child")
@pytest.mark.parametrize("command", ["", "compose", "train image", "jobs list"])
def test_help_costs_little_more_than_the_libraries_it_is_drawn_with(command):
    """Processor time against importing them, best of some tries: machines differ, and other programs share them."""
    libraries, helped = [], []
    while len(helped) < 8 and min(helped, default=9.0) >= 4 * min(libraries, default=0.0):
        libraries.append(processor_time(["import typer.rich_utils, rich.markdown, pydantic, yaml"]))
        helped.append(processor_time(["from studio.cli import main; main()", *command.split(), "--help"]))
    assert min(helped) < 4 * min(libraries)
