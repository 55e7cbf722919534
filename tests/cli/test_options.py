"""Options made from schemas, and the one-word form of an adapter."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from typer.testing import CliRunner

from adapters.errors import InputError
from studio.cli.schema_options import with_options
from studio.composition import lora_option
from studio.composition.schema import AdapterUse
from studio.schema import JobConfig


class Everything(JobConfig):
    """One field of every sort."""

    kind: ClassVar[str] = "everything"

    word: str = Field("x", description="A word [odd].")
    count: int = Field(1, description="A number.")
    ratio: float | None = Field(None, description="A ratio.")
    on: bool = Field(False, description="A switch.")
    choice: Literal["a", "b"] = Field("a", description="A choice.", json_schema_extra={"group": "Choices"})
    words: list[str] = Field(default_factory=list, description="Words.")
    numbers: list[int] = Field(default_factory=list, description="Numbers.")
    factors: dict[str, float] = Field(default_factory=dict, description="Factors.")
    mixed: str | list[str] = Field("auto", description="One or several.")
    no_fill: bool = Field(False, description="A switch that forbids.")


def ask(*arguments: str):
    """What the command gets, or the runner's failed result."""
    app = typer.Typer()
    seen = {}

    def command(fields, own: int = 0):
        """A command."""
        seen.update(fields=fields, own=own)

    app.command()(with_options(Everything)(command))
    result = CliRunner().invoke(app, arguments)
    return seen if result.exit_code == 0 else result


def test_only_what_is_given_counts():
    assert ask() == {"fields": {}, "own": 0}
    assert ask("--own", "3", "--count", "2")["fields"] == {"count": 2}


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        (["--word", "007"], {"word": "007"}),
        (["--word", "null"], {"word": "null"}),
        (["--no-fill"], {"no_fill": True}),
        (["--fill"], {"no_fill": False}),
        (["--ratio", "null"], {"ratio": None}),
        (["--ratio", "1e-4"], {"ratio": 1e-4}),
        (["--on"], {"on": True}),
        (["--no-on"], {"on": False}),
        (["--choice", "b"], {"choice": "b"}),
        (["--words", "a", "--words", "b"], {"words": ["a", "b"]}),
        (["--numbers", "1", "--numbers", "2"], {"numbers": [1, 2]}),
        (["--factors", "mid=0.5", "--factors", "up=1"], {"factors": {"mid": 0.5, "up": 1}}),
        (["--mixed", "auto"], {"mixed": "auto"}),
        (["--mixed", "[a, b]"], {"mixed": ["a", "b"]}),
    ],
)
def test_values_of_every_sort(arguments, fields):
    given_fields = ask(*arguments)["fields"]
    parsed = Everything.parse(given_fields).model_dump()
    assert {name: parsed[name] for name in fields} == fields


def test_help_comes_from_the_schema():
    text = ask("--help")
    app = typer.Typer()
    app.command()(with_options(Everything)(lambda fields: None))
    text = CliRunner().invoke(app, ["--help"], terminal_width=200, env={"COLUMNS": "200"}).output
    for part in ("A word [odd].", "(default x)", "a|b", "KEY=VALUE", "Choices", "--no-on"):
        assert part in text


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("cat", {"path": "cat"}),
        ("cat:0.8", {"path": "cat", "weight": 0.8}),
        ("cat:-.5", {"path": "cat", "weight": -0.5}),
        ("a=dir/cat.safetensors:1", {"name": "a", "path": "dir/cat.safetensors", "weight": 1.0}),
        ("C:\\loras\\cat.safetensors", {"path": "C:\\loras\\cat.safetensors"}),
        ("dir/a=b.safetensors", {"path": "dir/a=b.safetensors"}),
        ("owner/repo", {"path": "owner/repo"}),
        ("cat@0-1", {"path": "cat", "schedule": [[0, 1], [1, 1]]}),
        (
            "cat@sigma=0.6-14",
            {"path": "cat", "schedule_by": "sigma", "schedule": [[0.6, 0], [0.6, 1], [14, 1], [14, 0]]},
        ),
        ("cat:2@0-0.4", {"path": "cat", "weight": 2.0, "schedule": [[0, 1], [0.4, 1], [0.4, 0], [1, 0]]}),
        ("cat@0.5-1", {"path": "cat", "schedule": [[0, 0], [0.5, 0], [0.5, 1], [1, 1]]}),
    ],
)
def test_adapters_in_one_word(text, use):
    assert lora_option.parse(text) == use
    AdapterUse.parse(use)


@pytest.mark.parametrize("text", ["", ":0.5", "cat@0.5-0.2", "cat@0-2", "@0-1"])
def test_words_that_are_no_adapter(text):
    with pytest.raises(InputError, match="--lora"):
        lora_option.parse(text)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.999))
def test_a_range_is_a_window(start, end, progress):
    from pipelines.diffusion.schedule import factor_at

    start, end = sorted((round(start, 3), round(end, 3)))
    if start == end:
        return
    keyframes = lora_option.parse(f"cat@{start}-{end}")["schedule"]
    assert factor_at([tuple(frame) for frame in keyframes], progress) == (
        1.0 if start <= progress < end or (end == 1 and progress >= start) else 0.0
    )
