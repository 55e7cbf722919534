"""Kept pictures: found by what made them, starred, deleted, and nothing outside the jobs' folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adapters.errors import InputError
from studio import jobs
from studio.composition import gallery, recipe_png
from studio.composition.schema import ComposeConfig


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path))
    return tmp_path


def made(*seeds: int, **values: Any) -> str:
    """The id of a job that has made a picture of each seed."""
    config = ComposeConfig.parse({"prompt": "a fox", **values})
    job = jobs.get(jobs.submit("compose", config))
    job.folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        recipe = {"job": "compose", "config": {**config.model_dump(mode="json"), "seed": seed}}
        recipe_png.save_png(Image.new("RGB", (8, 8)), job.folder / f"picture-{seed}.png", recipe)
    return job.id


def test_pictures_are_found_by_adapter_method_and_base_the_latest_first() -> None:
    first = made(1, 2, adapters=[{"path": "fox"}], method="switch")
    second = made(3, base="other")
    assert [picture.key for picture in gallery.pictures()] == [
        f"{second}/picture-3.png",
        f"{first}/picture-1.png",
        f"{first}/picture-2.png",
    ]
    assert [picture.seed for picture in gallery.pictures(adapter="fox")] == [1, 2]
    assert [picture.seed for picture in gallery.pictures(method="merge")] == [3]
    assert [picture.seed for picture in gallery.pictures(base="other", limit=1)] == [3]
    assert gallery.choices(gallery.pictures()) == (["fox"], ["merge", "switch"], ["other", "tinymoji"])


def test_a_star_stays_and_goes_with_its_picture() -> None:
    key = f"{made(1, 2)}/picture-2.png"
    assert gallery.star(key, True).starred
    assert [picture.key for picture in gallery.pictures(starred=True)] == [key]
    assert not gallery.star(key, False).starred
    gallery.star(key, True)
    gallery.delete(key)
    assert gallery.pictures(starred=True) == []
    assert [picture.seed for picture in gallery.pictures()] == [1]


def test_only_pictures_with_a_recipe_inside_the_jobs_folder_are_found(home: Path) -> None:
    job_id = made(1)
    Image.new("RGB", (8, 8)).save(jobs.get(job_id).folder / "picture-9.png")
    (home / "secret.png").write_bytes(b"")
    assert [picture.seed for picture in gallery.pictures()] == [1]
    for key in (f"{job_id}/../../secret.png", f"{job_id}/picture-9.png", f"{job_id}/picture-7.png"):
        with pytest.raises(InputError, match="no longer there"):
            gallery.delete(key)
