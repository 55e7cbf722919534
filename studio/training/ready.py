"""Checks of a training before its job is made: one function for each kind, without torch and models.

Commands, pages and Python call them (through :meth:`studio.jobs.kinds.Kind.check`), so that a mistake is reported at
once and no job is recorded that can only fail.
"""

from __future__ import annotations

import os
from pathlib import Path

from adapters.compression.backends import check_quantization
from adapters.errors import InputError
from pipelines.diffusion.families import FAMILIES, parts_of
from pipelines.pictures import open_picture
from studio import library
from studio.datasets import texts
from studio.datasets.pictures import FolderReport, usable_pictures
from studio.datasets.prompts import read_prompts
from studio.library import packaged, scan
from studio.reconstruction.job import pictures_in
from studio.training import labelled_rows
from studio.training.language import experts, rows
from studio.training.records import check_tracker
from studio.training.rna import rows as rna_rows
from studio.training.schemas.base import TrainConfig
from studio.training.schemas.classifier import TrainClassifierConfig
from studio.training.schemas.distill import DistillConfig, style
from studio.training.schemas.image import TrainImageConfig
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.schemas.rna import NEW, TrainRnaConfig
from studio.training.schemas.scene import TrainSceneConfig
from studio.training.schemas.speech import TrainSpeechConfig
from studio.training.schemas.vision_language import TrainVisionLanguageConfig

PLAIN = ("adamw", "adafactor", "sgd")
"""Optimisers that need no package of their own."""


def image(config: TrainImageConfig) -> None:
    """Check base, pictures, class pictures, the adapter to continue from, and what the base's family lacks.

    Raises:
        InputError: the first thing that would make the training fail.
    """
    _picture_base(config)
    kept_out(len(read_folder(config).pictures), config.validation_split)
    if config.prior_preservation and config.class_data:
        usable_pictures(Path(config.class_data).expanduser(), skip_broken=config.skip_broken)
    _common(config)


def language(config: TrainLanguageConfig) -> None:
    """Check base, rows with their columns, chat template and the adapter to continue from.

    Raises:
        InputError: the first thing that would make the training fail.
    """
    if not _packaged(config.base, "language model"):
        library.resolve_language(config.base)
    if not (texts.on_hub(config.data) or texts.on_hub(config.validation_data)):
        rows.read(config)
    rows.template_of(config)
    if experts.frozen(config.method):
        experts.places(config)
    check_quantization(config.quantization)
    _common(config)


def remark(config: TrainLanguageConfig | TrainVisionLanguageConfig) -> str:
    """What a ready training may do otherwise than meant, in words; usually nothing."""
    found = experts.remark(config)
    return f"{found[0].upper()}{found[1:]}." if found else ""


def vision_language(config: TrainVisionLanguageConfig) -> None:
    """Check base, rows with their columns and pictures, sample pictures and the adapter to continue from.

    Raises:
        InputError: the first thing that would make the training fail.
    """
    library.resolve_vision_language(config.base)
    if not (texts.on_hub(config.data) or texts.on_hub(config.validation_data)):
        rows.pictured(config)
    for prompt in config.sample_prompts:
        open_picture(Path(prompt.partition(": ")[0]).expanduser())
    if experts.frozen(config.method):
        experts.places(config)
    check_quantization(config.quantization)
    _common(config)


def rna(config: TrainRnaConfig) -> None:
    """Check base, transcripts with their labels, and the adapter to continue from.

    Raises:
        InputError: the first thing that would make the training fail.
    """
    if config.base != NEW:
        library.resolve_rna(config.base)
    rna_rows.read(config)
    if experts.frozen(config.method):
        experts.places(config)
    _common(config)


def classifier(config: TrainClassifierConfig) -> None:
    """Check base, rows with their pictures and labels, and the adapter to continue from.

    Raises:
        InputError: the first thing that would make the training fail.
    """
    labelled_rows.read(config)
    _common(config)


def speech(config: TrainSpeechConfig) -> None:
    """Check base, recordings with their texts, sample sounds and the adapter to continue from.

    Raises:
        InputError: the first thing that would make the training fail.
    """
    if not _packaged(config.base, "speech model"):
        library.resolve_speech(config.base)
    if not (texts.on_hub(config.data) or texts.on_hub(config.validation_data)):
        rows.spoken(config)
    for place in config.sample_prompts:
        if not Path(place).expanduser().is_file():
            raise InputError(f"There is no sound file '{place}' (sample_prompts).")
    check_quantization(config.quantization)
    _common(config)


def _packaged(base: str, kind: str) -> bool:
    """Whether ``base`` is a model of this kind that is unpacked from its package when it is used."""
    known = packaged.known().get(base)
    return known is not None and known.kind == kind


def distill(config: DistillConfig) -> None:
    """Check base, prompts or pictures, and the adapters below.

    Raises:
        InputError: the first thing that would make the training fail.
    """
    training = config.training()
    _picture_base(training)
    if config.data.strip():
        read_folder(training)
    if config.prompts.strip():
        read_prompts(Path(config.prompts).expanduser())
    if config.trajectories.strip():
        writable(Path(config.trajectories).expanduser())
    for name in config.styles:
        library.resolve_adapter(style(name)[0])
    _common(training)


def scene(config: TrainSceneConfig) -> None:
    """Check pictures or a video of every scene, and the adapter to continue from.

    Raises:
        InputError: the first thing that would make the training fail.
    """
    read_scenes(config)
    _common(config)


def read_scenes(config: TrainSceneConfig) -> list[list[str]]:
    """Files of every scene: those of a folder, or one video; raises :class:`InputError` where there are none."""
    if not config.data:
        raise InputError("There are no pictures: name the folder of a scene, or its video, in data.")
    return [[place] if Path(place).is_file() else pictures_in(place) for place in config.data]


def read_folder(config: TrainImageConfig) -> FolderReport:
    """The pictures of the job, checked for its mode; raises :class:`InputError` for what cannot be used."""
    return usable_pictures(
        Path(config.data).expanduser(),
        skip_broken=config.skip_broken,
        need_captions=config.mode == "captioned" and not config.allow_missing_captions,
    )


def kept_out(count: int, share: float) -> int:
    """How many of ``count`` pictures are held out: a ``share`` of them, at least one if any.

    Raises:
        InputError: none would be left to learn from.
    """
    held = max(1, round(share * count)) if share else 0
    if held >= count:
        raise InputError(f"validation_split {share} leaves none of the {count} pictures to learn from.")
    return held


def check_family(config: TrainImageConfig, name: str) -> None:
    """Refuse what the family ``name`` does not have; raises :class:`InputError`."""
    about = FAMILIES[name]
    if "kohya" in config.export and about.denoiser != "unet":
        raise InputError("The kohya format is written for SD and SDXL only: remove it from export.")
    if config.train_text_encoder and not about.learning_encoders:
        raise InputError(f"Text encoder LoRAs of {name} are not trained: set train_text_encoder to false.")


def writable(folder: Path) -> None:
    """Refuse a folder that cannot be created or written to; raises :class:`InputError`."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"The folder '{folder}' cannot be created: '{there}' is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"The folder '{folder}' cannot be written: choose another one.")


def _picture_base(config: TrainImageConfig) -> None:
    """Check that the base exists and its family offers what is asked (a hub id is unknown before it is loaded)."""
    check_quantization(config.quantization)
    place = Path(library.resolve_pipeline(config.base))
    family = config.family
    if family == "auto" and place.exists():
        family = scan.record(place.absolute(), "base").family
    if family in FAMILIES:
        TrainImageConfig.parse({**config.model_dump(), "family": family})  # the schema's own rules about a family
        check_family(config, family)
        if refusal := FAMILIES[family].training_refusal(*parts_of(place)):
            raise InputError(refusal)


def _common(config: TrainConfig) -> None:
    check_tracker(config.tracker)
    if config.optimizer not in PLAIN:
        from studio.training.optimizers import check_installed

        check_installed(config.optimizer)
    if config.continue_from:
        library.resolve_adapter(config.continue_from)
    if cache := getattr(config, "cache_folder", ""):
        writable(Path(cache).expanduser())
