"""The contents of every batch of a run, decided before anything is read.

A :class:`Pick` holds every random decision about one shown picture (which one, crop, mirroring, caption), so reading
it is a pure function that worker processes and caches may call in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from studio.datasets.buckets import Placement, Size, place
from studio.datasets.captions import vary_caption
from studio.datasets.pictures import Picture
from studio.datasets.sampling import batches_per_epoch, epoch_batches
from studio.datasets.seeds import rng


@dataclass(frozen=True)
class Pick:
    """One showing of a picture; ``number`` counts all pictures shown in the run."""

    picture: Picture
    placement: Placement
    flip: bool
    caption: str
    number: int


@dataclass(frozen=True)
class Augmentation:
    """What is varied each time a picture is shown."""

    random_crop: bool = False
    flip: bool = False
    caption_dropout: float = 0.0
    shuffle_tags: bool = False
    keep_tags: int = 1


@dataclass(frozen=True)
class PictureSet:
    """Pictures with their prompts and buckets, in the same order."""

    pictures: tuple[Picture, ...]
    captions: tuple[str, ...]
    buckets: tuple[Size, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    def only(self, numbers: Sequence[int]) -> PictureSet:
        """The pictures with these numbers."""
        return PictureSet(
            tuple(self.pictures[n] for n in numbers),
            tuple(self.captions[n] for n in numbers),
            tuple(self.buckets[n] for n in numbers),
        )


class Plan:
    """The batches of a run, numbered from 0 over all epochs.

    Args:
        shown: the pictures to learn from.
        prior: class pictures for prior preservation; as many as from ``shown`` join each batch, in its bucket.
        batch_size: pictures per batch and process; a global batch has ``batch_size * processes``.
    """

    def __init__(
        self,
        shown: PictureSet,
        prior: PictureSet | None,
        *,
        batch_size: int,
        repeats: int,
        augmentation: Augmentation,
        seed: int,
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        self.shown, self.prior, self.batch_size, self.repeats = shown, prior, batch_size, repeats
        self.augmentation, self.seed, self.processes, self.rank = augmentation, seed, processes, rank
        self._width = batch_size * processes
        self.epoch_length = batches_per_epoch(shown.buckets, self._width, repeats)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def batch(self, number: int) -> tuple[list[Pick], list[Pick]]:
        """This process's part of batch ``number``: shown pictures and (prior preservation) class pictures."""
        epoch, position = divmod(number, self.epoch_length)
        start = self.rank * self.batch_size
        members = self._epoch(epoch)[position][start : start + self.batch_size]
        first = number * self._width + start
        picks = [self._pick(self.shown, member, first + i, None) for i, member in enumerate(members)]
        if self.prior is None:
            return picks, []
        bucket = picks[0].placement.size
        return picks, [self._pick(self.prior, self._prior_member(p.number), p.number, bucket) for p in picks]

    def every_variant(self) -> list[Pick]:
        """Each (picture, size, flip) once: the contents of a latent cache."""
        flips = (False, True) if self.augmentation.flip else (False,)
        found = [
            Pick(picture, place(picture.size, bucket), flip, "", 0)
            for picture, bucket in zip(self.shown.pictures, self.shown.buckets, strict=True)
            for flip in flips
        ]
        for picture in self.prior.pictures if self.prior else ():
            found += [
                Pick(picture, place(picture.size, bucket), flip, "", 0)
                for bucket in sorted(set(self.shown.buckets))
                for flip in flips
            ]
        return found

    def _draw_epoch(self, epoch: int) -> list[list[int]]:
        return epoch_batches(self.shown.buckets, self._width, self.repeats, rng(self.seed, "order", epoch))

    def _prior_member(self, number: int) -> int:
        assert self.prior is not None
        around, position = divmod(number, len(self.prior))
        order = list(range(len(self.prior)))
        rng(self.seed, "prior-order", around).shuffle(order)
        return order[position]

    def _pick(self, source: PictureSet, member: int, number: int, bucket: Size | None) -> Pick:
        vary = self.augmentation
        dice = rng(self.seed, "augment" if source is self.shown else "prior-augment", number)
        x, y = (dice.random(), dice.random()) if vary.random_crop else (0.5, 0.5)
        flip = vary.flip and dice.random() < 0.5
        caption = source.captions[member]
        if source is self.shown:
            caption = vary_caption(
                caption, dice, dropout=vary.caption_dropout, shuffle=vary.shuffle_tags, keep=vary.keep_tags
            )
        picture = source.pictures[member]
        return Pick(picture, place(picture.size, bucket or source.buckets[member], x, y), flip, caption, number)
