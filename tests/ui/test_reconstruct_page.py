"""The 3D page in a browser: the shipped scene, from pictures to a file, without asking the network twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ui.conftest import Tab

pytestmark = [pytest.mark.browser, pytest.mark.flaky(reruns=2)]

LONG = 240_000


def test_the_sample_scene_from_pictures_to_a_file(tab: Tab, tmp_path: Path) -> None:
    page = tab.open("reconstruct")
    page.click("#reconstruct-start")
    page.wait_for_selector("text=There are no pictures yet")
    page.click("#reconstruct-sample")
    page.wait_for_selector("#reconstruct-drop :text('room-0')")
    page.click("text=Advanced >> visible=true")
    page.fill("#reconstruct-steps input", "12")
    page.click("#reconstruct-start")
    page.wait_for_selector("#reconstruct-panel .as-tag:is(.good, .bad)", timeout=LONG)
    assert page.inner_text("#reconstruct-panel .as-tag") == "done", page.inner_text("#reconstruct-panel")
    assert page.locator("#scene-cameras tr").count() == 9
    before = page.inner_text("#scene-points")
    page.fill("#scene-percentile input[type=number]", "60")
    page.keyboard.press("Tab")
    page.locator("#scene-percentile input[type=range]").dispatch_event("pointerup")
    page.wait_for_function("text => document.querySelector('#scene-points').innerText !== text", arg=before)
    page.click("#scene-export")
    page.wait_for_selector("#scene-download:not([disabled])")
    with page.expect_download() as download:
        page.click("#scene-download")
    download.value.save_as(tmp_path / "scene.glb")
    assert (tmp_path / "scene.glb").read_bytes()[:4] == b"glTF"
