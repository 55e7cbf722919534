"""``studio transcribe``: speech in a file becomes text with times, with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.errors import InputError
from pipelines.speech.transcript import ENDINGS
from studio import silence
from studio.cli.output import Json, Output, Quiet, table
from studio.cli.schema_options import with_options
from studio.conversation import options
from studio.training.commands import launch
from studio.transcription.schema import TranscribeConfig

HELP = "Write down speech, with times and adapters."
FORMS = tuple(ENDINGS)
BY_ENDING = {f".{ending}": form for form, ending in ENDINGS.items()}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("transcribe", help=HELP)(
        with_options(TranscribeConfig, skip=["sound", "name", "adapters", "compare"])(transcribe)
    )


def transcribe(
    fields: dict[str, Any],
    file: Annotated[Path, typer.Argument(help="Sound or video file of any format.")],
    adapter: options.Adapters = None,
    compared: options.Compare = False,
    form: Annotated[
        str | None, typer.Option("--format", "-f", metavar="|".join(FORMS), help="Form on stdout (default text).",
                                 rich_help_panel="Output"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write this file: .txt, .json, .srt or .vtt.",
                                  rich_help_panel="Output"),
    ] = None,
    detach: launch.Detach = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Write down speech, with times and adapters."""
    from studio.transcription import job

    output = Output(json, quiet)
    silence.library_warnings()
    chosen = _form(form, out)
    config = TranscribeConfig.parse(
        {**fields, "sound": str(file.expanduser().resolve()), "name": file.stem[:80] or "transcript",
         "adapters": list(adapter or ()), "compare": compared}, source="transcribe",
    )  # fmt: skip
    if out is not None and compared:
        raise InputError("--out writes one transcript: leave --compare out.")
    job.ready(config)
    if detach:
        if out is not None or form is not None:
            raise InputError("--detach excludes --out and --format: the job keeps its files in every form.")
        launch.detach("transcribe", config, output)
        return
    from studio import jobs

    done = launch.here(lambda terminal: jobs.run_here("transcribe", config, terminal), output)
    result = dict(done.result or {})
    for remark in result["sound"]["remarks"]:
        output.note(f"The sound: {remark}.")
    written = {}
    if out is not None:
        from adapters.files import write_text

        text = Path(result["transcripts"][0]["files"][chosen]).read_text(encoding="utf-8")
        write_text(out, text)
        written = {"written": str(out)}
    output.result({"job": done.id, **result, **written}, lambda: str(out) if out else _shown(result, chosen))
    scored = [one for one in result["transcripts"] if one["score"]]
    if scored and not json:
        output.result({}, lambda: _scores(scored))


def _form(form: str | None, out: Path | None) -> str:
    """The form of the text; raises :class:`InputError` for one that there is not."""
    if out is not None:
        if out.suffix.lower() not in BY_ENDING:
            raise InputError(f"--out: '{out.name}' must end in .txt, .json, .srt or .vtt.")
        if form not in (None, BY_ENDING[out.suffix.lower()]):
            raise InputError(f"--format {form} does not fit --out {out.name}: leave one of them out.")
        return BY_ENDING[out.suffix.lower()]
    if form is not None and form not in FORMS:
        raise InputError(f"--format is {', '.join(FORMS)}, got '{form}'.")
    return form or "text"


def _shown(result: dict[str, Any], form: str) -> str:
    found = result["transcripts"]
    texts = [Path(one["files"][form]).read_text(encoding="utf-8").rstrip("\n") for one in found]
    if len(found) == 1:
        return texts[0]
    return "\n\n".join(f"[{one['variant']}]\n{text}" for one, text in zip(found, texts, strict=True))


def _scores(found: list[dict[str, Any]]) -> Any:
    rows = [(one["variant"], f"{one['score']['wer']:.1%}", f"{one['score']['cer']:.1%}") for one in found]
    return table(("variant", "words wrong", "characters wrong"), rows)
