"""The start picture on the Compose page: from a dropped file or a recipe to the job, what is read, what survives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adapters.errors import InputError
from studio.composition import start_picture
from studio.composition.schema import ComposeConfig
from ui import pictures
from ui.components import start
from ui.pages import compose, compose_regions


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path))
    return tmp_path


def dropped(name: str = "photo.png", size: tuple[int, int] = (96, 64)) -> dict[str, Any]:
    folder = pictures.uploads() / "a"
    folder.mkdir(parents=True, exist_ok=True)
    Image.radial_gradient("L").convert("RGB").resize(size).save(folder / name)
    return {**pictures.started(folder / name)[0], "mask": ""}


def values(**changes: Any) -> list[Any]:
    config = ComposeConfig.parse({"prompt": "a fox", **changes}).model_dump(mode="json")
    return [compose.schema_form.show(compose.KNOWN[name], config[name]) for name in compose.NAMES]


def test_a_dropped_picture_becomes_the_start() -> None:
    item = dropped()
    config = compose.config_of(values(), [], begin=(item, 0.4))
    assert (Path(config.image).name, config.strength, config.mask) == ("photo.png", 0.4, "")
    assert compose_regions.frame_of("tinymoji", None, None, item) == (96, 64)
    assert compose_regions.wide(2, "tinymoji", "", "", item) is None
    assert compose.config_of(values(), [], begin=(None, 0.4)).strength is None


def test_only_uploads_are_read(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    item = dropped()
    for changes in ({"id": "../secret.png"}, {"id": str(tmp_path / "secret.png")}, {"mask": "/etc/hostname"}):
        with pytest.raises(InputError, match=r"upload it again|paint it again"):
            compose.config_of(values(), [], begin=({**item, **changes}, 0.4))
    with pytest.raises(InputError, match="was not uploaded here"):
        pictures.started(tmp_path / "secret.png")


def test_a_recipe_gives_the_same_start_again() -> None:
    mask = Image.new("L", (96, 64))
    mask.paste(255, (10, 10, 50, 50))
    used, _ = start_picture.fitted(
        ComposeConfig.parse({"prompt": "a fox", "image": str(pictures.uploaded(dropped()["id"])), "strength": 0.3,
                             "mask": start_picture.pictures.as_uri(mask)})
    )  # fmt: skip
    item = start.of_recipe(used.model_dump(mode="json"))
    again = compose.config_of(values(width=96, height=64), [], begin=(item, 0.3))
    assert start_picture.fitted(again) == (used, [])


def test_a_reload_keeps_what_is_still_here() -> None:
    item = dropped()
    assert start.kept(item) == item
    pictures.uploaded(item["id"]).unlink()
    assert start.kept(item) is None
    assert start.kept("nonsense") is None
