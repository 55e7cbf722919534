"""The 3D page in a browser: pictures, a calibrated scene, its files, its adapter; the network is asked only twice."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image

from studio.reconstruction import job as reconstruct
from tests.ui.conftest import Server, Tab
from ui.pages.reconstruct import sample_scene

pytestmark = [pytest.mark.browser, pytest.mark.flaky(reruns=2)]

LONG = 240_000
VIEWS = 3
KINDS = ("glb", "ply", "colmap", "nerfstudio", "npz")


@pytest.fixture(autouse=True)
def no_graphics_card(tab: Tab) -> Iterator[None]:
    """The viewer says that it goes on without one; that is no error."""
    yield
    tab.errors[:] = [error for error in tab.errors if "WebGPU" not in error]


def jobs_of(server: Server) -> set[Path]:
    """Folders of all jobs so far."""
    return {folder for folder in (server.home / "jobs").glob("*") if folder.is_dir()}


def start(page: Any, steps: int) -> None:
    """Press Reconstruct with so many steps of alignment."""
    if not page.is_visible("#reconstruct-steps input"):
        page.click("text=Advanced >> visible=true")
    page.fill("#reconstruct-steps input", str(steps))
    page.keyboard.press("Tab")
    page.click("#reconstruct-start")


def finish(page: Any) -> None:
    """Wait until the job is done; its panel says why if it fails."""
    page.wait_for_selector("#reconstruct-cancel:visible")
    page.wait_for_selector("#reconstruct-panel .as-tag:is(.good, .bad)", timeout=LONG)
    assert page.inner_text("#reconstruct-panel .as-tag") == "done", page.inner_text("#reconstruct-panel")
    page.wait_for_selector("#scene-points:visible")
    page.wait_for_selector("#scene-after canvas", state="attached")  # the viewer draws, see follow()


def number(page: Any) -> int:
    """Points that the page says it shows."""
    return int(re.sub(r"\D", "", page.inner_text("#scene-points p")))


def changed(page: Any, before: int) -> int:
    """The number of points, once it is another."""
    page.wait_for_function(
        "before => document.querySelector('#scene-points p').innerText.replace(/\\D/g, '') !== String(before)",
        arg=before,
    )
    return number(page)


def pick(page: Any, box: str, choice: str) -> None:
    """Choose from a list."""
    page.click(f"{box} input")
    page.click(f"[role=option]:has-text('{choice}')")


def test_no_pictures_and_cancel(tab: Tab) -> None:
    page, earlier = tab.open("reconstruct"), jobs_of(tab.server)
    page.click("#reconstruct-start")
    page.wait_for_selector("text=There are no pictures yet")
    page.click("#reconstruct-sample")
    page.wait_for_selector("#reconstruct-drop :text('room-0')")
    start(page, 10_000)
    page.wait_for_selector("#reconstruct-panel :text('align')", timeout=LONG)
    page.click("#reconstruct-cancel")
    page.wait_for_selector("#reconstruct-panel .as-tag:text-is('cancelled')", timeout=LONG)
    page.wait_for_selector("#reconstruct-cancel", state="hidden")
    assert not page.is_visible("#scene-points")
    (job,) = jobs_of(tab.server) - earlier
    assert not list(job.glob("scene*"))


@pytest.mark.journey
def test_the_first_view_of_the_sample_scene_fills_the_frame(tab: Tab) -> None:
    page = tab.open("reconstruct")
    assert not page.is_visible("#reconstruct-licence")  # the shipped weights ask for nothing
    page.click("#reconstruct-sample")
    page.wait_for_selector("#reconstruct-drop :text('room-0')")
    start(page, 100)
    finish(page)
    page.wait_for_selector("#scene-flight img[src$='flight.gif']")
    page.wait_for_selector("#scene-depth img")
    share = 0.0
    for _ in range(90):  # software draws slowly
        share = filled(page.locator("#scene-after canvas").screenshot())
        if share >= 1 / 3:
            break
        page.wait_for_timeout(1000)
    assert share >= 1 / 3


def filled(screenshot: bytes) -> float:
    """Share of the viewer's pixels that are not its background."""
    picture = np.asarray(Image.open(io.BytesIO(screenshot)).convert("RGB")).astype(int)
    return float((np.abs(picture - (237, 237, 242)).max(-1) > 12).mean())


def test_the_licence_is_asked_for_where_weights_ask_for_it(tab: Tab) -> None:
    page = tab.open("reconstruct")
    pick(page, "#reconstruct-model", "naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt")
    page.wait_for_selector("#reconstruct-licence input")
    page.check("#reconstruct-licence input")
    pick(page, "#reconstruct-model", "dust3r-tiny")
    page.wait_for_selector("#reconstruct-licence", state="hidden")


@pytest.mark.journey
def test_a_calibrated_scene_its_controls_its_files_and_its_adapter(tab: Tab, tmp_path: Path) -> None:
    page, earlier = tab.open("reconstruct"), jobs_of(tab.server)
    page.set_input_files("#reconstruct-drop input[type=file]", under_the_sky(tmp_path / "photos"))
    page.wait_for_selector(f"#reconstruct-drop :text('view-{VIEWS - 1}')")
    page.check("#calibrate input")
    page.click("text=How to calibrate >> visible=true")
    page.fill("#reconstruct-epochs input", "1")
    start(page, 6)
    finish(page)
    page.wait_for_selector("#scene-before canvas", state="attached")
    assert page.locator("#scene-cameras tr").count() == VIEWS + 1
    (job,) = jobs_of(tab.server) - earlier
    kept, asked = job / "scene.npz", (job / "scene.npz").stat().st_mtime_ns

    suited = number(page)
    pick(page, "#scene-mesh", "points")
    first = changed(page, suited)
    page.fill("#scene-percentile input[type=number]", "60")
    page.keyboard.press("Tab")
    page.locator("#scene-percentile input[type=range]").dispatch_event("pointerup")
    fewer = changed(page, first)
    assert fewer < 0.6 * first  # from 80 % to 40 %
    page.check("#scene-clean input")
    cleaned = changed(page, fewer)
    assert cleaned < fewer
    page.uncheck("#scene-clean input")
    assert changed(page, cleaned) == fewer
    pick(page, "#scene-hide", "sky")
    below = changed(page, fewer)
    assert below == reconstruct.export(kept, tmp_path / "x.ply", "ply", percentile=60, hide="sky").points < fewer

    files = {kind: download(page, kind, tmp_path) for kind in KINDS}
    shown = trimesh.load(files["glb"]).geometry.values()
    assert [len(part.vertices) for part in shown if isinstance(part, trimesh.PointCloud)] == [below]
    assert len(shown) == 1 + 2 * VIEWS  # every camera is drawn, with its photo
    assert len(trimesh.load(files["ply"]).vertices) == below
    with zipfile.ZipFile(files["colmap"]) as whole:
        assert {"cameras.txt", "images.txt", "points3D.txt", "images/view-0.png"} <= set(whole.namelist())
        assert len(whole.read("points3D.txt").splitlines()) == below + 1
    with zipfile.ZipFile(files["nerfstudio"]) as whole:
        told = json.loads(whole.read("transforms.json"))
        assert [frame["file_path"] for frame in told["frames"]] == [f"images/view-{n}.png" for n in range(VIEWS)]
        assert len(trimesh.load(io.BytesIO(whole.read("sparse_pc.ply")), file_type="ply").vertices) == below
    with np.load(files["npz"]) as arrays:
        assert arrays["poses"].shape == (VIEWS, 4, 4)
    assert jobs_of(tab.server) == earlier | {job}  # nothing of all this has asked the network again
    assert kept.stat().st_mtime_ns == asked

    tab.open("reconstruct")  # the form and the list of adapters are drawn anew
    page.set_input_files("#reconstruct-drop input[type=file]", sorted(map(str, (tmp_path / "photos").iterdir())))
    page.wait_for_selector(f"#reconstruct-drop :text('view-{VIEWS - 1}')")
    pick(page, "#reconstruct-adapter", job.name)
    start(page, 6)
    finish(page)
    (again,) = jobs_of(tab.server) - earlier - {job}
    with np.load(kept) as before, np.load(again / "scene.npz") as after:
        np.testing.assert_array_equal(before["poses"], after["poses"])  # the same network, the same photos


@pytest.mark.journey
def test_a_calibration_shows_its_loss_and_goes_on_where_it_was_cancelled(tab: Tab) -> None:
    page, earlier = tab.open("reconstruct"), jobs_of(tab.server)
    page.set_input_files("#reconstruct-drop input[type=file]", sample_scene()[:VIEWS])
    page.wait_for_selector(f"#reconstruct-drop :text('room-{VIEWS - 1}')")
    page.check("#calibrate input")
    page.click("text=How to calibrate >> visible=true")
    page.fill("#reconstruct-epochs input", "40")
    start(page, 6)
    page.wait_for_selector("#reconstruct-panel .as-plot", timeout=LONG)
    page.click("#reconstruct-cancel")
    page.wait_for_selector("#reconstruct-panel .as-tag:text-is('cancelled')", timeout=LONG)
    (job,) = jobs_of(tab.server) - earlier
    (stopped,) = (int(place.name.removeprefix("step-")) for place in (job / "checkpoints").iterdir())
    page.click("#reconstruct-resume")
    finish(page)
    page.wait_for_selector("#reconstruct-resume", state="hidden")
    rows = (job / "loss.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(1, len(rows) + 1))
    assert 0 < stopped < len(rows)


def under_the_sky(folder: Path) -> list[str]:
    """Pictures of the shipped scene, blue above."""
    folder.mkdir()
    for n, file in enumerate(sample_scene()[:VIEWS]):
        picture = np.array(Image.open(file).convert("RGB"))
        picture[: len(picture) // 4] = (90, 150, 240)
        Image.fromarray(picture).save(folder / f"view-{n}.png")
    return sorted(map(str, folder.iterdir()))


def download(page: Any, kind: str, folder: Path) -> Path:
    """Prepare a file of a kind and take it; what was prepared before is not offered meanwhile."""
    if kind != "glb":  # chosen at first
        pick(page, "#scene-kind", kind)
    page.wait_for_selector("#scene-download[disabled]")
    page.click("#scene-export")
    page.wait_for_selector("#scene-download:not([disabled])")
    with page.expect_download() as given:
        page.click("#scene-download")
    target = folder / given.value.suggested_filename
    given.value.save_as(target)
    assert target.name.startswith("scene" if kind in ("glb", "ply", "npz") else kind)
    return target
