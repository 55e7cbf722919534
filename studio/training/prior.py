"""Class pictures for prior preservation, drawn by the untouched base model and kept for later runs.

Ruiz et al. 2022, "DreamBooth" (arXiv 2208.12242): pictures of the class, as the base draws them, are shown beside the
pictures of the concept, so that "a cat" keeps meaning any cat.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from adapters.files import whole
from adapters.progress import Monitor, Progress, check
from pipelines.diffusion.drawing import stills
from pipelines.diffusion.families import family_of
from studio.datasets.buckets import Size
from studio.datasets.cache import key_of
from studio.datasets.seeds import generator

BATCH = 4

Usual = tuple[int, float]
"""Steps and guidance of the base, see :mod:`studio.composition.base_settings`."""


def class_folder(root: Path, base_digest: str, prompt: str, size: Size, usual: Usual) -> Path:
    """Where the class pictures of a base, prompt and size are kept."""
    return root / "class" / key_of(base_digest, prompt, size, *usual)


def draw_class_pictures(
    pipe: Any, folder: Path, prompt: str, count: int, size: Size, usual: Usual, monitor: Monitor
) -> list[Path]:
    """Draw the missing pictures; picture i always has seed i. Returns the first ``count``."""
    steps, guidance = usual
    files = [folder / f"{number:05d}.png" for number in range(count)]
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    for start in range(0, len(missing), BATCH):
        check(monitor)
        numbers = missing[start : start + BATCH]
        with torch.no_grad():
            made = pipe(
                prompt=[prompt] * len(numbers),
                num_inference_steps=steps,
                **family_of(pipe).guidance_arguments(guidance),
                **family_of(pipe).picture_arguments(),
                width=size[0],
                height=size[1],
                generator=[generator(0, "class-picture", number) for number in numbers],
            )
        pictures = stills(made)
        for number, picture in zip(numbers, pictures, strict=True):
            with whole(files[number]) as part:
                picture.save(part, format="PNG")
        monitor.report(
            Progress("drawing class pictures", count - len(missing) + start + len(numbers), count, preview=pictures[0])
        )
    return files
