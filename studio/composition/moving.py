"""Videos of a composition: an MP4 file beside the picture that carries the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError
from studio.composition import recipe_png

if TYPE_CHECKING:
    from studio.composition.schema import ComposeConfig


def check(pipe: Any, config: ComposeConfig) -> None:
    """Refuse frames of a picture, a number of frames that the model cannot make, or a missing encoder.

    Raises:
        InputError: as said.
    """
    from pipelines import videos
    from pipelines.diffusion.checks import check_frames

    if pipe.family.video:
        videos.check_encoder()
    check_frames(pipe.family, config.frames)
    if pipe.family.video is None and config.fps is not None:
        raise InputError(f"{pipe.family.title} makes pictures: leave fps out, or choose a base that makes videos.")


def rate(pipe: Any, config: ComposeConfig) -> float:
    """Frames per second; 0 for pictures."""
    return float(config.fps or pipe.family.video.rate) if pipe.family.video else 0.0


def arguments(pipe: Any, config: ComposeConfig) -> dict[str, Any]:
    """What a pipeline that is told the frame rate takes."""
    name = pipe.family.video.argument if pipe.family.video else ""
    return {name: rate(pipe, config)} if name else {}


def save(
    out: Any, number: int, picture: Path, rate: float, recipe: dict[str, Any]
) -> tuple[Path, Path | None, tuple[str, ...]]:
    """Write a picture of a result with its recipe, or a video and its middle frame; returns both files, and remarks.

    Args:
        out: the :class:`pipelines.diffusion.call.Output`.
        number: which of its pictures or videos.
        picture: file of the picture.
        rate: frames per second; 0 = it is a picture.
    """
    from pipelines import videos

    made = out.images[number]
    if not rate:
        return recipe_png.save_png(made, picture, recipe), None, ()
    path, sound = _beside(picture), out.sound[number] if out.sound else None
    heard = videos.write(made, path, rate, sound)
    recipe_png.save_png(made[len(made) // 2], picture, recipe)
    lost = "The model made sound too, which this video lacks: pip install 'adapter-studio[video]' keeps it."
    return picture, path, () if heard or sound is None else (lost,)


def video_of(picture: Path) -> Path | None:
    """The video whose picture this is; None for an ordinary picture."""
    path = _beside(picture)
    return path if path.is_file() else None


def _beside(picture: Path) -> Path:
    """``video-<seed>.mp4`` beside ``picture-<seed>.png``."""
    return picture.with_name(f"{picture.stem.replace('picture', 'video', 1)}.mp4")
