"""A composition's input pictures: reads them, fits them to the canvas and stores them in the configuration.

A job keeps copies in its folder, a recipe holds them as they were used, so that both repeat without the files.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import files
from adapters.errors import InputError
from pipelines import pictures
from pipelines.diffusion.families import FAMILIES
from studio.composition import canvas_size
from studio.composition.picture_schema import PICTURES

if TYPE_CHECKING:
    from PIL import Image

    from studio.composition.schema import ComposeConfig

TITLES = {"image": "start picture", "mask": "mask", "control_image": "control picture"}


def fitted(config: ComposeConfig) -> tuple[ComposeConfig, list[str]]:
    """``config`` with its pictures as ``data:`` URIs of the canvas's size, and what was done to them.

    The canvas follows the start picture, else the control picture. Each picture is scaled to cover it and cropped
    around its middle.

    Raises:
        InputError: a picture cannot be read, a mask is empty, or the family has no pipeline for this.
    """
    if not config.task:
        return config, []
    check_family(config)
    said: list[str] = []
    given = {name: _opened(name, getattr(config, name), said) for name in PICTURES if getattr(config, name)}
    first = given.get("image") or given["control_image"]
    size = canvas_size.following(first.size, config.base, config.width, config.height)
    if "mask" in given and given["mask"].size != first.size:
        said.append(f"The mask of {_by(given['mask'].size)} was scaled to the start picture's {_by(first.size)}.")
        given["mask"] = given["mask"].resize(first.size)
    made = {name: _covering(picture, size, TITLES[name], said) for name, picture in given.items()}
    if "mask" in made and made["mask"].getextrema()[1] == 0:
        raise InputError("The mask is empty: nothing in it is white, so nothing would be redrawn.")
    inside = {name: pictures.as_uri(picture) for name, picture in made.items()}
    return config.model_copy(update={**inside, "width": size[0], "height": size[1]}), said


def check_family(config: ComposeConfig) -> None:
    """Refuse what the base's family, if known, has no pipeline for; raises :class:`InputError`."""
    name = config.family if config.family != "auto" else canvas_size.family(config.base)
    if name not in FAMILIES or config.task in FAMILIES[name].other_pipelines:
        return
    asked = {
        "image": "a start picture",
        "inpaint": "a mask",
        "controlnet": "a ControlNet",
        "controlnet image": "a ControlNet with a start picture",
        "controlnet inpaint": "a ControlNet with a mask",
    }
    can = [words for task, words in asked.items() if task in FAMILIES[name].other_pipelines]
    raise InputError(
        f"{FAMILIES[name].title} cannot draw with {asked[config.task]}: it can with {', '.join(can) or 'none of them'}."
    )


def decided(pipe: Any, config: ComposeConfig) -> dict[str, Any]:
    """The default strength of diffusers' pipeline."""
    own = pipe.own_arguments.get("strength")  # a base that edits pictures has none
    return {"strength": own} if config.image and config.strength is None and own is not None else {}


def arguments(pipe: Any, config: ComposeConfig) -> dict[str, Any]:
    """Task arguments of a fitted composition for a :class:`pipelines.diffusion.MultiLoRAPipeline`."""
    takes = pipe.own_arguments
    control = "control_image" if "control_image" in takes else "image"
    told: dict[str, Any] = {}
    if config.controlnet:
        told = {control: opened(config, "control_image"), "controlnet_conditioning_scale": config.control_scale}
    if config.image:
        told |= {"image": opened(config, "image"), "strength": config.strength}
    if config.mask:
        told |= {"mask_image": opened(config, "mask")}
    return told


def opened(config: ComposeConfig, name: str) -> Image.Image:
    """The picture of a field: "L" for the mask, else "RGB"."""
    read = pictures.read_mask if name == "mask" else pictures.read
    return read(getattr(config, name)).image


def kept(config: ComposeConfig, drawn: Image.Image) -> Image.Image:
    """``drawn`` with the start picture itself where the mask is black (the autoencoder changes it a little)."""
    from PIL import Image

    if not config.mask:
        return drawn
    return Image.composite(drawn, opened(config, "image"), opened(config, "mask"))


def copied(config: ComposeConfig, folder: Path) -> dict[str, str]:
    """Copies of the existing pictures in ``folder``, by field; the job reports missing ones."""
    changes = {}
    for name in PICTURES:
        source = getattr(config, name)
        if pictures.is_uri(source):
            target = folder / f"{name}.png"
            with files.whole(target, sync=False) as part:
                part.write_bytes(pictures.content_of(source))
        elif source and Path(source).expanduser().is_file():
            target = folder / f"{name}{Path(source).suffix.lower()}"
            shutil.copyfile(Path(source).expanduser(), target)
        else:
            continue
        changes[name] = str(target)
    return changes


def _opened(name: str, source: str, said: list[str]) -> Image.Image:
    try:
        reading = (pictures.read_mask if name == "mask" else pictures.read)(source)
    except pictures.PictureError as error:
        file = "" if pictures.is_uri(source) else f" '{source}'"
        raise InputError(f"The {TITLES[name]}{file} cannot be read as a picture: {error.reason}.") from None
    said += [f"The {TITLES[name]}: {remark}." for remark in reading.remarks]
    return reading.image


def _covering(picture: Image.Image, size: tuple[int, int], title: str, said: list[str]) -> Image.Image:
    """The middle of the picture, scaled to cover ``size``."""
    from PIL import Image, ImageOps

    if picture.size == size:
        return picture
    scale = max(wanted / side for wanted, side in zip(size, picture.size, strict=True))
    scaled = (round(picture.width * scale), round(picture.height * scale))
    done = [f"scaled to {_by(scaled)}"] if scaled != picture.size else []
    done += [f"cut to {_by(size)} around its middle"] if scaled != size else []
    said.append(f"The {title} of {_by(picture.size)} was {' and '.join(done)}.")
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
