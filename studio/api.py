"""The functions of ``import studio``: values are checked like a job's YAML file, then the job runs in this process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapters.compression.backends import Quantization
from adapters.errors import InputError, nearest
from adapters.progress import Monitor, Silent

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.diffusion import MultiLoRAPipeline
    from pipelines.speech.transcript import Transcript

Adapters = Iterable[str | os.PathLike[str] | Mapping[str, Any]]
"""Adapters as names or paths ("fox", "fox:0.8", Path), or as mappings with the keys of a composition's adapter."""

Device = str
Dtype = Literal["auto", "fp32", "fp16", "bf16"]
Message = Mapping[str, str]


def load(
    base: str | os.PathLike[str] = "tinymoji",
    *,
    family: str = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    attention: Literal["auto", "sdpa", "xformers"] = "auto",
    memory: Literal["none", "balanced", "low"] = "none",
    quantization: Quantization = "none",
    denoiser: str | os.PathLike[str] = "",
) -> MultiLoRAPipeline:
    """Open a text-to-image base model.

    Args:
        base: name in the library, hub id, directory or ``.safetensors`` file.
        family: model family, recognised if "auto".
        dtype: precision of the weights; "auto" fits the device.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        attention: attention backend.
        memory: "balanced" and "low" need less memory and more time (offloading, tiling).
        quantization: store the denoiser's linear layers in few bits.
        denoiser: a ``.gguf`` or ``.safetensors`` file whose denoiser replaces the base's.

    Returns:
        The pipeline: ``load_lora``, ``compose``, then a call makes pictures.

    Raises:
        InputError: no such model, or a choice it does not offer.
    """
    from studio import library, silence

    silence.library_warnings()
    from pipelines.diffusion import MultiLoRAPipeline

    silence.loading_bars()
    from studio.composition import base_settings

    place = library.resolve_pipeline(os.fspath(base))
    pipe = MultiLoRAPipeline.from_pretrained(
        place, family, dtype, device, attention, memory, quantization, os.fspath(denoiser)
    )
    pipe.usual = base_settings.of_pipeline(os.fspath(base), pipe.pipe)
    return pipe


def compose(
    prompt: str,
    adapters: Adapters = (),
    *,
    method: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    monitor: Monitor | None = None,
    **values: Any,
) -> list[Image.Image]:
    """Make pictures from one prompt with several adapters.

    Args:
        prompt: what to draw.
        adapters: names in the library, files, PEFT directories or hub ids, each with ``:weight`` if not 1; or mappings
            with the keys of :class:`studio.composition.schema.AdapterUse`.
        method: how they are combined (``studio methods``); default "merge", with ``regions`` "activation".
        folder: where the pictures and their recipe are saved; if left out, nothing is saved.
        monitor: told of every step; may cancel.
        values: every other key of :class:`studio.composition.schema.ComposeConfig` (base, steps, seed, images ...);
            ``image``, ``mask`` and ``control_image`` may be PIL images, too.

    Returns:
        The pictures; each carries its recipe in ``image.info["adapter-studio"]``.

    Raises:
        InputError: an adapter, the base or a value that cannot be used.
        Cancelled: ``monitor`` asked to stop.
    """
    from studio import silence
    from studio.composition import distilled_adapters, job
    from studio.composition.picture_schema import PICTURES
    from studio.composition.region_schema import DEFAULT_METHOD
    from studio.composition.schema import ComposeConfig

    silence.library_warnings()
    chosen = method or (DEFAULT_METHOD if values.get("regions") else "merge")
    values |= {name: _inside(name, values[name]) for name in PICTURES if name in values}
    values |= {"prompt": prompt, "adapters": _uses(adapters), "method": chosen}
    config = ComposeConfig.parse({**distilled_adapters.sampler(values), **values})
    if folder is not None:
        return _pictures(job.run(config, _made(folder), monitor or Silent()))
    with tempfile.TemporaryDirectory(prefix="adapter-studio-") as place:
        return _pictures(job.run(config, Path(place), monitor or Silent()))


def train(
    kind: str = "image",
    *,
    folder: str | os.PathLike[str],
    resume: bool = False,
    monitor: Monitor | None = None,
    **values: Any,
) -> dict[str, Any]:
    """Train an adapter.

    Args:
        kind: "image", "distill", "language", "vision-language", "speech", "rna" or "scene".
        folder: where the run lives: adapter, card, samples, checkpoints.
        resume: go on from the newest checkpoint in ``folder``.
        monitor: told of every step; may cancel (a checkpoint is written then).
        values: the keys of the kind's configuration (``studio train KIND --help``); one of them, ``preset``, is a
            starting point ("concept", "style-quick" ...) below the others.

    Returns:
        ``adapter`` (its path), ``loss``, ``steps``, ``seconds`` and whatever else the kind reports.

    Raises:
        InputError: a kind or value that cannot be used, or data that cannot be learnt from.
        Cancelled: ``monitor`` asked to stop.
    """
    from studio import silence
    from studio.jobs import kinds

    silence.library_warnings()
    known = kinds.trainings()
    if kind not in known:
        raise InputError(f"There is no training of kind '{kind}'{nearest(kind, known)}: choose {', '.join(known)}.")
    found = known[kind]
    config = found.parse(values)
    found.check(config)
    silence.loading_bars()
    return found.function()(config, _made(folder), monitor or Silent(), resume=resume)


def reconstruct(
    images: Iterable[str | os.PathLike[str]] | str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str],
    monitor: Monitor | None = None,
    **values: Any,
) -> dict[str, Any]:
    """Photos of one scene in, cameras and 3D points out.

    Args:
        images: photos in any order, a folder of them, or one video.
        folder: gets ``scene.glb``, ``scene.npz``, depth pictures and ``cameras.json``.
        monitor: told of the progress; may cancel.
        values: every other key of :class:`studio.reconstruction.schema.ReconstructConfig` (model, calibrate ...).

    Returns:
        ``glb`` and ``scene`` (paths), ``points`` (their number), ``cameras``, ``warnings`` and more.

    Raises:
        InputError: pictures, weights or settings that cannot be used.
        Cancelled: ``monitor`` asked to stop.
    """
    from studio.reconstruction import job
    from studio.reconstruction.schema import ReconstructConfig

    given = [images] if isinstance(images, str | os.PathLike) else list(images)
    places = [os.fspath(place) for place in given]
    if len(places) == 1 and Path(places[0]).is_dir():
        places = job.pictures_in(places[0])
    config = ReconstructConfig.parse({**values, "images": places})
    return job.run(config, _made(folder), monitor or Silent())


def chat(
    message: str | Sequence[Message],
    adapters: Adapters = (),
    *,
    base: str | os.PathLike[str] = "smollm2",
    system: str = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
    **sampling: Any,
) -> str:
    """Ask a language model; the model and the adapters stay loaded for the next question.

    Args:
        message: one message, or a conversation of ``{"role": ..., "content": ...}`` that ends with the user's.
        adapters: names or paths, each with ``:strength`` if not 1; their updates are added.
        base: name in the library, directory or hub id.
        system: a system message put in front.
        sampling: ``max_tokens`` (256), ``temperature`` (0 = the likeliest token), ``top_p``, ``repetition_penalty``,
            ``seed``.

    Returns:
        The whole answer.

    Raises:
        InputError: the base, an adapter or a value cannot be used.
    """
    from studio import silence

    silence.library_warnings()
    talk = [{"role": "user", "content": message}] if isinstance(message, str) else [dict(turn) for turn in message]
    return _said("", talk, adapters, os.fspath(base), system, device, dtype, sampling)


def ask(
    picture: str | os.PathLike[str] | Image.Image,
    question: str,
    adapters: Adapters = (),
    *,
    base: str | os.PathLike[str] = "tinysight",
    system: str = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
    **sampling: Any,
) -> str:
    """Ask a vision-language model about a picture; the model and the adapters stay loaded for the next question.

    Args:
        picture: a path, or a PIL image.
        question: what to ask.
        adapters: names or paths, each with ``:strength`` if not 1; their updates are added.
        base: name in the library, directory or hub id.
        system: a system message put in front.
        sampling: as for :func:`chat`.

    Returns:
        The whole answer.

    Raises:
        InputError: the picture, the base, an adapter or a value cannot be used.
    """
    from studio import silence

    silence.library_warnings()
    talk: list[Message] = [{"role": "user", "content": question}]
    return _said(_inside("picture", picture), talk, adapters, os.fspath(base), system, device, dtype, sampling)


def classify(
    file: str | os.PathLike[str],
    adapter: str | os.PathLike[str] = "lncrna",
    *,
    base: str | os.PathLike[str] = "tinyrna",
    folder: str | os.PathLike[str] | None = None,
    monitor: Monitor | None = None,
    **values: Any,
) -> list[dict[str, str]]:
    """Tell RNA transcripts apart.

    Args:
        file: a FASTA file, plain or compressed.
        adapter: name in the library or folder; empty: the base has a classifier of its own.
        base: a k-mer model, name in the library or directory.
        folder: where ``scores.tsv`` and ``summary.json`` are kept; if left out, nothing is.
        monitor: told of every few transcripts; may cancel.
        values: every other key of :class:`studio.genomics.schema.ClassifyRnaConfig` (view, long, threshold ...).

    Returns:
        One row per transcript by column (id, length, label, probabilities, ORF), all text as in the table. For files
        with millions of transcripts use :func:`studio.genomics.job.run`, which keeps none in memory.

    Raises:
        InputError: a file, base, adapter or value that cannot be used.
        Cancelled: ``monitor`` asked to stop.
    """
    from studio import silence
    from studio.genomics import job, table
    from studio.genomics.schema import ClassifyRnaConfig

    silence.library_warnings()
    silence.loading_bars()
    asked = {**values, "file": os.fspath(file), "adapter": os.fspath(adapter), "base": os.fspath(base)}
    config = ClassifyRnaConfig.parse(asked, source="classify")
    if folder is not None:
        return table.read(Path(job.run(config, _made(folder), monitor or Silent())["table"]))
    with tempfile.TemporaryDirectory(prefix="adapter-studio-") as place:
        return table.read(Path(job.run(config, Path(place), monitor or Silent())["table"]))


def transcribe(
    sound: str | os.PathLike[str] | tuple[Any, int],
    adapters: Adapters = (),
    *,
    base: str | os.PathLike[str] = "whisper-tiny.en",
    monitor: Monitor | None = None,
    **values: Any,
) -> Transcript:
    """Write down speech; the model and the adapters stay loaded for the next sound.

    Args:
        sound: a sound or video file of any format, or (samples, samples per second) with an array (n,) or (n,
            channels).
        adapters: names or paths, each with ``:strength`` if not 1; their updates are added.
        base: a Whisper: name in the library, directory or hub id.
        monitor: told after each window; may cancel.
        values: every other key of :class:`studio.transcription.schema.TranscribeConfig` (language, task, times ...).

    Returns:
        The transcript: ``text``, and ``segments`` with ``start`` and ``end`` in seconds.

    Raises:
        InputError: the sound, the base, an adapter or a value cannot be used.
        Cancelled: ``monitor`` asked to stop.
    """
    from studio import silence
    from studio.transcription.schema import TranscribeConfig

    silence.library_warnings()
    from pipelines.speech import audio
    from studio.transcription.listener import listener

    if values.get("compare") or "sound" in values:
        raise InputError("transcribe gives one transcript of its first argument: leave compare and sound out.")
    chosen = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    if any(isinstance(use, Mapping) for use in chosen):
        raise InputError("An adapter of a transcription is a name or path, with ':strength' if it is not 1.")
    names = [os.fspath(use) for use in chosen if not isinstance(use, Mapping)]
    config = TranscribeConfig.parse({**values, "base": os.fspath(base), "adapters": names})
    heard = audio.of_array(*sound) if isinstance(sound, tuple) else audio.read(Path(sound).expanduser())
    found: Transcript = listener().hear(heard, config, monitor)[0]["transcript"]
    return found


def _said(
    picture: str, talk: Sequence[Message], adapters: Adapters, base: str, system: str, device: str, dtype: str,
    sampling: Mapping[str, Any],
) -> str:  # fmt: skip
    """The answer at the end of a conversation, by this process's session."""
    from studio.conversation import Question, Variant, parse_adapter
    from studio.conversation.session import Session

    global _session
    turns = [*([{"role": "system", "content": system}] if system else []), *(dict(turn) for turn in talk)]
    chosen = []
    for use in [adapters] if isinstance(adapters, str | os.PathLike) else adapters:
        if isinstance(use, Mapping):
            raise InputError("An adapter of a conversation is a name or path, with ':strength' if it is not 1.")
        chosen.append(parse_adapter(os.fspath(use)))
    question = Question(
        base, (Variant("", tuple(chosen)),), (tuple(turns),), device, dtype, sampling, picture=picture
    )  # fmt: skip
    if _session is None:
        _session = Session()
    return "".join(event["text"] for event in _session.ask(question) if event["event"] == "piece")


_session: Any = None
"""This process's :class:`studio.conversation.session.Session`, made by the first question."""


def _uses(adapters: Adapters) -> list[Mapping[str, Any]]:
    from studio.conversation import parse_adapter

    if isinstance(adapters, str | os.PathLike):
        adapters = [adapters]
    uses: list[Mapping[str, Any]] = []
    for use in adapters:
        if isinstance(use, Mapping):
            uses.append(use)
        else:
            path, weight = parse_adapter(os.fspath(use))
            uses.append({"path": path, "weight": weight})
    return uses


def _inside(name: str, picture: Any) -> str:
    """A picture of a configuration as text: the path, or a PIL image as a ``data:`` URI."""
    from PIL import Image

    from pipelines import pictures

    if not isinstance(picture, Image.Image):
        return os.fspath(picture or "")
    return pictures.as_uri(pictures.to_mask(picture) if name == "mask" else pictures.to_rgb(picture))


def _pictures(result: Mapping[str, Any]) -> list[Image.Image]:
    from PIL import Image

    pictures = []
    for path in result["images"]:
        with Image.open(path) as file:
            file.load()
            pictures.append(file.copy())
    return pictures


def _made(folder: str | os.PathLike[str]) -> Path:
    place = Path(folder).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder '{place}' cannot be created: {error.strerror}.") from None
    return place
