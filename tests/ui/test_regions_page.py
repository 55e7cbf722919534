"""Regions drawn with the mouse, in a real browser, with real jobs on the embedded base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from studio.composition import recipe_png
from tests.ui.conftest import Tab
from tests.ui.test_browser import LONG, choose, until_done

pytestmark = [pytest.mark.browser, pytest.mark.flaky(reruns=2)]


def drag(page: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Press at one place of the frame, move, let go at another (fractions)."""
    page.locator("#regions-stage").scroll_into_view_if_needed()
    sheet = page.locator("#regions-stage").bounding_box()
    for number, (x, y) in enumerate([start, ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2), end]):
        page.mouse.move(sheet["x"] + x * sheet["width"], sheet["y"] + y * sheet["height"], steps=3)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


def numbers(page: Any, region: int) -> list[float]:
    """left, top, right, bottom of a region in percent, as the table has them."""
    return [float(page.input_value(f"[data-number='{region}:{edge}']")) for edge in range(4)]


def open_frame(page: Any) -> None:
    """A prompt and two adapters, and the frame to draw on, clear of what sticks to the window's edge."""
    page.set_viewport_size({"width": page.viewport_size["width"], "height": 1400})
    page.fill("#prompt textarea", "two icons")
    choose(page, "robot")
    choose(page, "chalk")
    page.click("#where label:has-text('In regions I draw')")
    page.wait_for_selector("#regions-stage:visible")


def test_two_boxes_two_adapters_a_picture_and_its_recipe_again(tab: Tab, tmp_path: Path) -> None:
    page = tab.open("compose")
    open_frame(page)
    drag(page, (0.05, 0.1), (0.45, 0.9))
    drag(page, (0.55, 0.1), (0.95, 0.9))
    assert page.locator(".as-region").count() == 2
    page.click(".as-region-card >> nth=0 >> [data-adapter=chalk]")
    page.click(".as-region-card >> nth=0 >> [data-adapter=robot]")
    page.click(".as-region-card >> nth=1 >> [data-adapter=chalk]")
    page.click(".as-region-card >> nth=1 >> [data-adapter=robot]")
    page.fill("[aria-label='Prompt of region 1']", "a house")
    page.fill("[aria-label='Strength of region 2']", "0.5")
    drag(page, (0.75, 0.5), (0.75, 0.55))  # moves the second one down
    page.click("text=Places as numbers")
    assert numbers(page, 0) == pytest.approx([5, 10, 45, 90], abs=1)
    assert numbers(page, 1) == pytest.approx([55, 15, 95, 95], abs=1)
    page.fill("[data-number='0:1']", "20")
    page.keyboard.press("Tab")
    page.fill("#steps input", "2")
    page.click("#generate")
    page.wait_for_selector("#compose-cancel:visible")  # what an earlier job left on the page is gone
    until_done(page, "#compose-panel")
    page.wait_for_selector(".as-stage-picture:visible")

    with page.expect_download() as download:
        page.click("text=Download with recipe")
    picture = tmp_path / "picture.png"
    download.value.save_as(picture)
    config = recipe_png.read_recipe(picture)["config"]
    first, second = config["regions"]
    assert config["method"] == "activation"
    assert (first["adapters"], first["prompt"]) == (["chalk"], "a house")
    assert (second["adapters"], second["scale"], second["prompt"]) == (["robot"], 0.5, "rbt robot")
    assert first["box"] == pytest.approx([0.05, 0.2, 0.45, 0.9], abs=0.01)
    assert second["box"] == pytest.approx([0.55, 0.15, 0.95, 0.95], abs=0.01)

    page.click("[aria-label='Remove region 2']")
    page.focus(".as-region")
    page.keyboard.press("ArrowRight")
    page.click("#where label:has-text('Everywhere')")
    page.click("#reuse")
    page.wait_for_function("document.querySelectorAll('.as-region-card').length === 2")
    page.wait_for_selector("#regions-stage:visible")
    assert page.is_checked("#where input[value=drawn]")
    assert page.input_value("[aria-label='Prompt of region 1']") == "a house"
    assert [edge / 100 for edge in numbers(page, 0)] == pytest.approx(first["box"], abs=1e-3)
    assert [edge / 100 for edge in numbers(page, 1)] == pytest.approx(second["box"], abs=1e-3)


@pytest.mark.journey
def test_paint_erase_keyboard_and_methods_side_by_side(tab: Tab) -> None:
    page = tab.open("compose")
    open_frame(page)
    page.click("#side-by-side")
    page.wait_for_function("document.querySelector('#width input, #width textarea').value === '128'")
    assert page.input_value("#height input, #height textarea") == "64"
    for region in (1, 2):  # both hear the sentence, as shown
        field = page.locator(f"[aria-label='Prompt of region {region}']")
        assert (field.input_value(), field.get_attribute("placeholder")) == ("", "two icons")
    page.click("text=Places as numbers")
    assert [numbers(page, 0), numbers(page, 1)] == [[0, 0, 50, 100], [50, 0, 100, 100]]
    page.focus(".as-region >> nth=1")
    page.keyboard.press("Shift+ArrowLeft")
    assert numbers(page, 1) == [50, 0, 99, 100]
    page.keyboard.press("Delete")
    assert page.locator(".as-region-card").count() == 1
    page.click("[data-tool=brush]")
    page.mouse.move(2, 2)
    drag(page, (0.6, 0.5), (0.95, 0.5))
    page.wait_for_selector("text=painted, ")
    painted = float(page.inner_text(".as-numbers td[colspan]").split("painted, ")[1].split(" %")[0])
    assert 9 < painted < 12  # a stroke of 12 % of the longer side, 35 % long, with round ends, on 2 : 1
    page.click("[data-tool=erase]")
    drag(page, (0.6, 0.5), (0.7, 0.5))
    page.wait_for_function(_LESS_PAINT, arg=painted - 0.5)
    page.click("#where label:has-text('Everywhere')")
    page.check("#compare input")
    page.wait_for_selector("#compare-methods label:has-text('LoRA Switch')")  # the methods that act everywhere
    for label in page.locator("#compare-methods label").all():
        if label.inner_text().strip() not in ("Merge", "LoRA Switch"):
            label.locator("input").uncheck()
    page.fill("#steps input", "1")
    page.click("#generate")
    page.wait_for_selector("#download-grid:visible", timeout=LONG)
    until_done(page, "#compose-panel")
    assert page.locator("#compose-gallery img").count() == 2
    assert "Merge" in page.inner_text("#compose-gallery")


_LESS_PAINT = """most => {
  const told = document.querySelector('.as-numbers td[colspan]').textContent;
  return parseFloat(told.split(', ')[1]) < most;
}"""


@pytest.mark.journey
def test_the_frame_fits_a_phone(narrow_tab: Tab) -> None:
    page = narrow_tab.open("compose")
    open_frame(page)
    drag(page, (0.1, 0.1), (0.6, 0.9))
    page.click("text=Places as numbers")
    page.click(".as-region-card summary")
    page.click(".as-rack-row summary >> nth=0")
    page.click("[data-tool=brush]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#regions-stage").bounding_box()["width"] > 250
