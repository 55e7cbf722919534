"""The root command: which commands there are, and how every error becomes one sentence and an exit code.

Exit codes: 0 done, 1 failed although the input was right, 2 wrong input, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from adapters.errors import Cancelled, StudioError
from studio.printable import printable

if TYPE_CHECKING:
    from studio.jobs.kinds import Kind


@dataclass(frozen=True)
class Command:
    """One command: the module whose ``register`` adds it, and its line of help."""

    module: str
    help: str
    example: str = ""
    """One line to try; shown below the help of the command itself."""


COMMANDS: dict[str, Command] = {
    "compose": Command(
        "studio.composition.command",
        "Make pictures with several adapters.",
        "studio compose --prompt 'a flat icon of a fox left of a robot' -l fox#left -l robot#right --width 128",
    ),
    "train": Command("", "Train an adapter."),
    "data": Command("studio.datasets.command", "Training pictures: check a folder, edit captions and tags."),
    "chat": Command("studio.conversation.command", "Talk to a language model, with adapters.", "studio chat smollm2"),
    "ask": Command(
        "studio.conversation.ask_command",
        "Ask about a picture, with adapters.",
        "studio ask cat.png 'What is it?'",
    ),
    "federate": Command(
        "studio.federation.command",
        "Train one adapter on the data of several clients, which stay with them.",
        "studio federate simulate federation.yaml",
    ),
    "classify": Command(
        "studio.genomics.command",
        "Tell RNA transcripts apart: long non-coding or messenger RNA.",
        "studio classify rna transcripts.fa.gz --out scores.tsv",
    ),
    "transcribe": Command(
        "studio.transcription.command",
        "Write down speech, with times and adapters.",
        "studio transcribe talk.m4a --format srt",
    ),
    "reconstruct": Command(
        "studio.reconstruction.command",
        "Photos in, 3D out: cameras, points, self-calibration.",
        "studio reconstruct photos/ --calibrate",
    ),
    "demo": Command(
        "studio.composition.demo_command",
        "Compose the shipped adapters with every method, side by side.",
        "studio demo --out studio-demo",
    ),
    "methods": Command("studio.cli.methods", "List the methods and the papers they come from.", "studio methods"),
    "library": Command(
        "studio.library.command",
        "Adapters and base models: list, show, import, rename, delete.",
        "studio library list --bases",
    ),
    "lora": Command(
        "studio.adapter_files.command",
        "Adapter files: inspect, convert, merge, extract.",
        "studio lora merge fox:0.8 robot:0.6 --out both.safetensors",
    ),
    "compress": Command(
        "studio.compression.command",
        "Make a base smaller: fewer bits, fewer heads and channels.",
        "studio compress lq smollm2 --bits 2.75",
    ),
    "generate": Command(
        "studio.generation.command",
        "Learn a generator of adapters, and make the adapter of a task with it.",
        "studio generate sample generator.safetensors --task sums",
    ),
    "transfer": Command(
        "studio.transfer.command",
        "Move a language adapter to another base without its data.",
        "studio transfer run my-bundle --to my-other-base",
    ),
    "inspect": Command(
        "studio.inspection.command",
        "What training did to the weights: intruder dimensions, forgetting.",
        "studio inspect intruders fox --base tinymoji",
    ),
    "doctor": Command(
        "studio.inspection.doctor_command",
        "Will these adapters get along? Overlap, strengths, trigger words, advice.",
        "studio doctor fox robot --prompt 'a fox and a robot'",
    ),
    "serve": Command(
        "studio.serving.command",
        "Serve a language model with its adapters over HTTP, as OpenAI does.",
        "studio serve smollm2 --adapters my-adapters/",
    ),
    "audit": Command(
        "studio.audit.command",
        "Does an adapter weaken refusals, refuse harmless requests, or cost ability?",
        "studio audit my-adapter --base smollm2 --harmful requests.csv",
    ),
    "jobs": Command("studio.jobs.command", "Jobs: list, watch, cancel, resume, run again, delete.", "studio jobs list"),
    "worker": Command("studio.jobs.worker_command", "Work on queued jobs in this terminal.", "studio worker"),
    "ui": Command("studio.cli.ui", "Open the web app.", "studio ui"),
    "settings": Command(
        "studio.cli.settings",
        "Show or change folders and other settings.",
        "studio settings --set adapter_folders=[/data/loras]",
    ),
}
"""Commands by name; each module has ``register(app)`` (``train`` is a group, see :mod:`studio.jobs.kinds`)."""

_STOPPED = 130


def run(arguments: Sequence[str]) -> int:
    """Run one command; errors are printed, never raised."""
    try:
        result = build(arguments)(args=list(arguments), prog_name="studio", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return _fail("Stopped.", _STOPPED, arguments)
    except Cancelled as error:
        return _fail(str(error), _STOPPED, arguments)
    except BrokenPipeError:
        # The reader of our output has gone; keep Python from complaining when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _report(error, arguments)


def build(arguments: Sequence[str] = ()) -> typer.Typer:
    """The command line with the command that ``arguments`` names; the others have a name and a line of help only."""
    app = typer.Typer(
        help="Adapter Studio: make, combine, check and use LoRA adapters.", no_args_is_help=True,
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    )  # fmt: skip
    app.callback()(_root)
    chosen, second, *_ = [*(word for word in arguments if not word.startswith("-")), "", ""]
    for name, command in COMMANDS.items():
        if name == chosen == "train":
            app.add_typer(_train_group(second), name=name, help=command.help)
        elif name == chosen:
            importlib.import_module(command.module).register(app)
            _show_example(app, name, command)
        else:
            app.command(name, help=command.help)(_named_only(name))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        print(f"adapter-studio {metadata.version('adapter-studio')}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Adapter Studio: make, combine, check and use LoRA adapters."""


def _train_group(chosen: str) -> typer.Typer:
    from studio.jobs import kinds

    group = typer.Typer(no_args_is_help=True)
    for name, kind in kinds.trainings().items():
        if name == chosen:
            importlib.import_module(kind.command).register(group, kind)
            _show_example(group, name, kind)
        else:
            group.command(name, help=kind.help)(_named_only(name))
    return group


def _show_example(app: typer.Typer, name: str, command: Command | Kind) -> None:
    """Put the example below the first line of the command's help."""
    if command.example:
        listed: list[Any] = [*app.registered_commands, *app.registered_groups]
        for made in listed:
            if made.name == name:
                made.help = f"{command.help}\n\nExample:  {command.example}".replace("[", "\\[")


def _named_only(name: str) -> Callable[[], None]:
    def command() -> None:
        raise AssertionError(f"'{name}' is only a line of help here")

    return command


def _report(error: Exception, arguments: Sequence[str]) -> int:
    usage = getattr(error, "format_message", None)
    if usage is not None:  # typer's own: unknown option, missing argument ...
        return _fail(usage(), 2, arguments) if usage() else 2
    from studio import error_sentences

    if os.environ.get("ADAPTER_STUDIO_DEBUG"):
        import traceback

        traceback.print_exc()
    text = error_sentences.sentence(error)
    if not error_sentences.expected(error):
        text += " (set ADAPTER_STUDIO_DEBUG=1 to see where)"
    return _fail(text, 2 if isinstance(error, StudioError) else 1, arguments)


def _fail(text: str, code: int, arguments: Sequence[str]) -> int:
    print(f"studio: {printable(' '.join(text.split()))}", file=sys.stderr)
    if "--json" in arguments:
        print(json.dumps({"error": text}))
    return code
