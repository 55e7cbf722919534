"""The transcription job: listens with every variant and writes the transcripts in every form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapters.errors import InputError
from adapters.files import write_text
from adapters.progress import Monitor, Progress
from pipelines.speech import audio
from pipelines.speech.transcript import ENDINGS, FORMATS
from studio import library
from studio.transcription.schema import TranscribeConfig


def ready(config: TranscribeConfig) -> None:
    """Refuse what is known to fail, before a job is made.

    Raises:
        InputError: no sound file, no such adapter, or a base that is no speech model.
    """
    from studio.conversation import parse_adapter
    from studio.library import packaged

    if not config.sound:
        raise InputError("There is nothing to listen to: name a sound file.")
    if not Path(config.sound).expanduser().is_file():
        raise InputError(f"There is no sound file '{config.sound}'.")
    if config.base not in packaged.known() or packaged.known()[config.base].kind != "speech model":
        library.resolve_speech(config.base)
    for text in config.adapters:
        library.resolve_adapter(parse_adapter(text)[0])


def run(config: TranscribeConfig, folder: Path, monitor: Monitor) -> dict[str, Any]:
    """Write down what is said.

    Returns:
        ``transcripts``: per variant ``variant``, ``adapters``, ``text``, ``segments``, ``seconds`` of work, ``score``
        (with a reference) and ``files`` (form -> path); ``sound``: its ``seconds`` and ``remarks``.

    Raises:
        InputError: the sound, the base or an adapter cannot be used.
        Cancelled: ``monitor`` asked to stop.
    """
    from studio.transcription.listener import Listener

    sound = audio.read(Path(config.sound).expanduser())
    for remark in sound.remarks:
        monitor.report(Progress("reading", message=f"The sound was {remark}" if remark[0] == "r" else remark))
    found = Listener().hear(sound, config, monitor)
    transcripts = []
    for number, one in enumerate(found):
        transcript = one["transcript"]
        stem = config.name if len(found) == 1 else f"{config.name}-{number}"
        files = {}
        for form, write in FORMATS.items():
            files[form] = str(folder / f"{stem}.{ENDINGS[form]}")
            write_text(Path(files[form]), write(transcript))
        transcripts.append({
            "variant": one["variant"], "adapters": one["adapters"], "seconds": one["seconds"],
            **{key: value for key, value in transcript.as_dict().items() if key != "seconds"},
            "score": one["score"].as_dict() if one["score"] else None, "files": files,
        })  # fmt: skip
    return {"transcripts": transcripts, "sound": {"seconds": round(sound.seconds, 3), "remarks": list(sound.remarks)}}
