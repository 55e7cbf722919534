"""The root command: which commands there are, and how every error becomes one sentence and an exit code.

Exit codes: 0 done, 1 failed for a reason that is not the person's, 2 wrong input, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence

import typer

from adapters.errors import Cancelled, StudioError

COMMANDS: dict[str, str] = {
    "compose": "Make pictures with several adapters.",
    "train": "Train an adapter.",
    "chat": "Talk to a language model, with adapters.",
    "reconstruct": "Photos in, 3D out: cameras, points, self-calibration.",
    "demo": "Compose the shipped adapters with every method, side by side.",
    "methods": "List the methods and the papers they come from.",
    "library": "Adapters and base models: list, show, import, rename, delete.",
    "lora": "Adapter files: inspect, convert, merge, extract.",
    "inspect": "What training did to the weights: intruder dimensions, forgetting.",
    "doctor": "Will these adapters get along? Overlap, strengths, trigger words, advice.",
    "jobs": "Jobs: list, watch, cancel, resume, run again, delete.",
    "worker": "Work on queued jobs in this terminal.",
    "ui": "Open the web app.",
    "settings": "Show or change folders and other settings.",
}
"""Commands by name with one line of help; each is ``register(app)`` in the module ``studio.cli.<name>``."""

TRAIN: dict[str, str] = {
    "image": "Train a LoRA of a text-to-image model from a folder of pictures.",
    "distill": "Distil guidance (one pass per step instead of two) or few-step sampling into a LoRA.",
    "language": "Train a LoRA of a language model from rows of text.",
}
"""What can be trained; each is ``register(group, text)`` in the module ``studio.cli.train_<name>``."""

_STOPPED = 130


def run(arguments: Sequence[str]) -> int:
    """Do one command; errors are printed, never raised."""
    try:
        result = build(arguments)(args=list(arguments), prog_name="studio", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return _fail("Stopped.", _STOPPED, arguments)
    except Cancelled as error:
        return _fail(str(error), _STOPPED, arguments)
    except BrokenPipeError:
        # Whoever read our output has enough; keep Python from complaining when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _report(error, arguments)


def build(arguments: Sequence[str] = ()) -> typer.Typer:
    """The command line with the command that ``arguments`` names; the others are there by name only."""
    app = typer.Typer(
        help="Adapter Studio: make, combine, check and use LoRA adapters.", no_args_is_help=True,
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    )  # fmt: skip
    app.callback()(_root)
    chosen, second, *_ = [*(word for word in arguments if not word.startswith("-")), "", ""]
    for name, text in COMMANDS.items():
        if name == "train":
            app.add_typer(_train_group(second if chosen == name else ""), name=name, help=text)
        elif name == chosen:
            importlib.import_module(f"studio.cli.{name}").register(app)
        else:
            app.command(name, help=text)(_named_only(name))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        print(f"adapter-studio {metadata.version('adapter-studio')}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and end.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Adapter Studio: make, combine, check and use LoRA adapters."""


def _train_group(chosen: str) -> typer.Typer:
    group = typer.Typer(no_args_is_help=True)
    for name, text in TRAIN.items():
        if name == chosen:
            importlib.import_module(f"studio.cli.train_{name}").register(group, text)
        else:
            group.command(name, help=text)(_named_only(name))
    return group


def _named_only(name: str) -> Callable[[], None]:
    def command() -> None:
        raise AssertionError(f"'{name}' is only a line of help here")

    return command


def _report(error: Exception, arguments: Sequence[str]) -> int:
    usage = getattr(error, "format_message", None)
    if usage is not None:  # typer's own: unknown option, missing argument ...
        return _fail(usage(), 2, arguments) if usage() else 2
    from studio import failures

    if os.environ.get("ADAPTER_STUDIO_DEBUG"):
        import traceback

        traceback.print_exc()
    text = failures.sentence(error)
    if not failures.expected(error):
        text += " (set ADAPTER_STUDIO_DEBUG=1 to see where)"
    return _fail(text, 2 if isinstance(error, StudioError) else 1, arguments)


def _fail(text: str, code: int, arguments: Sequence[str]) -> int:
    print(f"studio: {' '.join(text.split())}", file=sys.stderr)
    if "--json" in arguments:
        print(json.dumps({"error": text}))
    return code
