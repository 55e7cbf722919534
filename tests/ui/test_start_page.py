"""The start picture in a real browser, on a phone's width: dropped, painted on, kept over a reload, drawn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from studio.composition import recipe_png, start_picture
from studio.composition.schema import ComposeConfig
from tests.ui.conftest import Tab
from tests.ui.test_browser import until_done

pytestmark = [pytest.mark.browser, pytest.mark.flaky(reruns=2)]


@pytest.mark.journey
def test_what_is_painted_is_redrawn(narrow_tab: Tab, tmp_path: Path) -> None:
    Image.radial_gradient("L").convert("RGB").resize((64, 64)).save(tmp_path / "photo.png")
    page = narrow_tab.open("compose")
    page.fill("#prompt textarea", "a lamp post")
    page.fill("#steps input", "3")
    page.click("#start button >> nth=0")
    page.set_input_files("#start-drop input[type=file]", tmp_path / "photo.png")
    page.wait_for_selector("#start-stage:visible")
    page.click("#start-picture [data-tool=brush]")
    page.locator("#start-stage").evaluate("node => node.scrollIntoView({block: 'center'})")
    sheet = page.locator("#start-stage").bounding_box()
    across, down = sheet["x"] + sheet["width"] * np.array([0.2, 0.8]), sheet["y"] + sheet["height"] * 0.25
    page.mouse.move(across[0], down)
    page.mouse.down()
    page.mouse.move(across[1], down, steps=4)
    page.mouse.up()
    page.wait_for_selector("#start-picture :text('Only what is painted')")
    page.wait_for_timeout(500)  # the browser keeps what was painted a moment later
    narrow_tab.open("compose")
    page.wait_for_selector("#start-picture :text('Only what is painted')")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("#generate")
    page.wait_for_selector("#compose-cancel:visible")
    until_done(page, "#compose-panel")
    made = max((narrow_tab.server.home / "jobs").glob("*/picture-*.png"), key=lambda path: path.stat().st_mtime)
    config = ComposeConfig.parse(recipe_png.read_recipe(made)["config"])
    mask = np.asarray(start_picture.opened(config, "mask"))
    assert mask[16, 32] == 255
    assert mask[40:].max() == 0
    with Image.open(made) as picture, Image.open(tmp_path / "photo.png") as photo:
        same = (np.asarray(picture.convert("RGB")) == np.asarray(photo)).all(-1)
    assert same[mask == 0].all()
    assert not same[mask == 255].all()
    page.click("#use-as-start")
    page.wait_for_selector(f"#start-picture :text('{made.name}')")
    page.wait_for_selector("#start-picture :text('All of it')")
