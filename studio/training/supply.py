"""Turns pictures and captions on disk into the tensors of a training step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from adapters.errors import InputError
from adapters.progress import Monitor, Progress, check
from pipelines.diffusion.families.base import stacked
from studio.datasets.buckets import BucketRule, place
from studio.datasets.cache import TensorCache, Tensors, fingerprint, key_of
from studio.datasets.captions import compose_caption
from studio.datasets.folders import shown
from studio.datasets.pictures import FolderReport, Picture, read_pixels
from studio.datasets.plan import Augmentation, Pick, PictureSet, Plan
from studio.datasets.seeds import rng
from studio.training.families import Family
from studio.training.ready import kept_out
from studio.training.schemas.image import TrainImageConfig

INSTANCE_PROMPTS = {"concept": "a picture of {trigger}", "style": "a picture, {trigger} style", "captioned": ""}


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass.

    Attributes:
        moments: mean and deviation of the latents, ``(batch, 2, channels, h, w)``.
        given: conditioning, batch in front.
        numbers: number of every sample in the run, for its random numbers; class pictures come last.
        shown: how many samples are not class pictures.
    """

    moments: torch.Tensor
    given: Tensors
    numbers: list[int]
    shown: int


def bucket_rule(config: TrainImageConfig, family: Family) -> BucketRule:
    """The buckets the configuration and the model allow."""
    resolution = config.resolution or family.resolution
    step = config.bucket_step or family.multiple
    if step % family.smallest_multiple:
        raise InputError(f"bucket_step must be a multiple of {family.smallest_multiple} for this model, got {step}.")
    return BucketRule(
        resolution=resolution,
        shortest=config.bucket_min or max(step, resolution // 2),
        longest=config.bucket_max or resolution * 2,
        step=step,
        keep_aspect=config.buckets,
        upscale=not config.no_upscale,
    )


def picture_set(report: FolderReport, rule: BucketRule, config: TrainImageConfig) -> PictureSet:
    """Prompts and buckets of the job's pictures.

    Raises:
        InputError: pictures that are too small (no_upscale), with their names.
    """
    buckets, small = [], {}
    for picture in report.pictures:
        try:
            buckets.append(rule.assign(picture.size))
        except InputError as error:
            small[picture.path.relative_to(report.folder).as_posix()] = str(error)
    if small:
        names = ", ".join(list(small)[:5])
        raise InputError(f"{len(small)} pictures are too small ({names}): {next(iter(small.values()))}.")
    captions = prompts(report.pictures, config)
    return PictureSet(tuple(report.pictures), captions, tuple(buckets))


def cut_away(pictures: PictureSet) -> list[str]:
    """A sentence per picture of which a bucket shows less than half."""
    said = []
    for picture, bucket in zip(pictures.pictures, pictures.buckets, strict=True):
        placed = place(picture.size, bucket)
        lost = 1 - bucket[0] * bucket[1] / (placed.resized[0] * placed.resized[1])
        if lost > 0.5:
            (width, height), name = picture.size, shown(picture.path.name)
            said.append(f"{name} ({width} x {height}) is so long that {lost:.0%} of it is cut off")
    return said


def prompts(pictures: Sequence[Picture], config: TrainImageConfig) -> tuple[str, ...]:
    """The prompt of each of ``pictures``."""
    return tuple(
        compose_caption(
            picture.caption,
            template=config.caption_template,
            instance_prompt=config.instance_prompt or INSTANCE_PROMPTS[config.mode],
            trigger=config.trigger,
            prefix=config.caption_prefix,
        )
        for picture in pictures
    )


def class_set(report: FolderReport, rule: BucketRule, prompt: str) -> PictureSet:
    """Class pictures, all under the class prompt (their bucket follows the pictures they are shown with)."""
    count = len(report.pictures)
    return PictureSet(tuple(report.pictures), (prompt,) * count, (rule.square,) * count)


def split(pictures: PictureSet, share: float, seed: int) -> tuple[PictureSet, PictureSet | None]:
    """(to learn from, to validate with): ``share`` of the pictures is held out, at least one if any."""
    held = kept_out(len(pictures), share)
    if not held:
        return pictures, None
    order = list(range(len(pictures)))
    rng(seed, "validation-split").shuffle(order)
    return pictures.only(sorted(order[held:])), pictures.only(sorted(order[:held]))


def augmentation(config: TrainImageConfig) -> Augmentation:
    """What the configuration varies per shown picture."""
    return Augmentation(
        random_crop=config.crop == "random",
        flip=config.flip,
        caption_dropout=config.caption_dropout,
        shuffle_tags=config.shuffle_tags,
        keep_tags=config.keep_tags,
    )


class Supply:
    """Makes batches from a plan, through the caches the configuration asks for.

    Args:
        live_text: the text encoders learn, so batches carry tokens for the trainee to encode.
        cache_folder: folder of the disk caches.
    """

    def __init__(self, family: Family, plan: Plan, config: TrainImageConfig, cache_folder: Path) -> None:
        self.family, self.plan, self.workers = family, plan, config.workers
        self.live_text = config.train_text_encoder
        latents, text = cache_modes(config)
        self._latents = _cache(latents, cache_folder / "latents")
        self._texts = _cache(text, cache_folder / "text")
        self._vae_key = fingerprint(family.pipe.vae) if latents == "disk" else ""
        self._text_key = "".join(map(fingerprint, family.encoder_parts.values())) if text == "disk" else ""

    def warm(self, monitor: Monitor, picks: Sequence[Pick] = ()) -> None:
        """Fill the caches for the plan (and more ``picks``), reporting progress."""
        if self._latents is not None:
            wanted = [*self.plan.every_variant(), *picks]
            for done, pick in enumerate(wanted):
                check(monitor)
                self._moments_of(pick)
                monitor.report(Progress("encoding pictures", done + 1, len(wanted)))
        if self._texts is not None:
            texts = self._known_texts(picks)
            for done, text in enumerate(texts):
                check(monitor)
                self._condition_of(text)
                monitor.report(Progress("encoding captions", done + 1, len(texts)))

    def stream(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches ``start`` .. ``stop - 1`` of the plan."""
        if self._latents is not None:
            for number in range(start, stop):
                shown, prior = self.plan.batch(number)
                yield self.assemble([*shown, *prior], len(shown))
            return
        loader: Any = DataLoader(
            _Pixels(self.plan), batch_size=None, sampler=range(start, stop), num_workers=self.workers
        )
        for number, pixels in zip(range(start, stop), loader, strict=True):
            shown, prior = self.plan.batch(number)
            yield self.assemble([*shown, *prior], len(shown), pixels)

    def assemble(self, picks: Sequence[Pick], shown: int, pixels: torch.Tensor | None = None) -> Batch:
        """The tensors of these picks."""
        if self._latents is not None:
            moments = torch.stack([self._moments_of(pick) for pick in picks])
        else:
            moments = self.family.moments(_read(picks) if pixels is None else pixels)
        sizes = [self.family.size_condition(pick.picture.size, pick.placement) for pick in picks]
        given = {name: torch.stack([size[name] for size in sizes]) for name in sizes[0]}
        texts = [pick.caption for pick in picks]
        if self.live_text:
            given |= self.family.tokens(texts)
        elif self._texts is None:
            given |= self.family.condition(texts)
        else:
            found = [self._condition_of(text) for text in texts]
            given |= {name: stacked([value[name] for value in found]) for name in found[0]}
        return Batch(moments, given, [pick.number for pick in picks], shown)

    @property
    def needs_vae(self) -> bool:
        return self._latents is None

    @property
    def needs_text_encoders(self) -> bool:
        return self._texts is None

    def _moments_of(self, pick: Pick) -> torch.Tensor:
        assert self._latents is not None
        where = pick.placement
        key = key_of("latents", self._vae_key, pick.picture.digest, where, pick.flip)
        found = self._latents.get(key, lambda: {"moments": self.family.moments(_read([pick]))[0]})
        return found["moments"]

    def _condition_of(self, text: str) -> Tensors:
        assert self._texts is not None
        key = key_of("embeddings", self._text_key, text)
        return self._texts.get(key, lambda: {k: v[0] for k, v in self.family.condition([text]).items()})

    def _known_texts(self, picks: Sequence[Pick]) -> list[str]:
        """Captions that will come up; shuffled ones are encoded when they do."""
        vary = self.plan.augmentation
        texts = {pick.caption for pick in picks}
        if not vary.shuffle_tags:
            texts |= set(self.plan.shown.captions)
        if vary.caption_dropout:
            texts.add("")
        if self.plan.prior is not None:
            texts |= set(self.plan.prior.captions)
        return sorted(texts)


def validation_picks(pictures: PictureSet) -> list[Pick]:
    """Every picture once, cropped in the middle, with its own caption."""
    return [
        Pick(picture, place(picture.size, bucket), False, caption, number)
        for number, (picture, caption, bucket) in enumerate(
            zip(pictures.pictures, pictures.captions, pictures.buckets, strict=True)
        )
    ]


def cache_modes(config: TrainImageConfig) -> tuple[str, str]:
    """(latents, text): what ``auto`` means for this configuration."""
    latents, text = config.cache_latents, config.cache_text
    if latents == "auto":
        latents = "none" if config.crop == "random" else "memory"
    if text == "auto":
        text = "none" if config.train_text_encoder else "memory"
    return latents, text


def _cache(mode: str, folder: Path) -> TensorCache | None:
    return None if mode == "none" else TensorCache(folder if mode == "disk" else None)


def _read(picks: Sequence[Pick]) -> torch.Tensor:
    return torch.stack([read_pixels(pick.picture.path, pick.placement, pick.flip) for pick in picks])


class _Pixels(Dataset[torch.Tensor]):
    """Pixels of a plan's batches, by number, for worker processes."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __getitem__(self, number: int) -> torch.Tensor:
        shown, prior = self.plan.batch(number)
        return _read([*shown, *prior])
