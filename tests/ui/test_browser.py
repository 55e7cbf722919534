"""The app as a person meets it: in a real browser, with real jobs on the embedded base."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from studio.composition import recipe_png
from tests.ui.conftest import Server, Tab
from ui import navigation

# A browser on a busy machine may miss a beat; what is broken fails three times.
pytestmark = [pytest.mark.browser, pytest.mark.flaky(reruns=2)]

LONG = 240_000
"""Milliseconds for what a worker must start for: enough on a machine that is busy with other things."""

PAGES = tuple(place.key for place in navigation.PLACES)


def choose(page: Any, name: str) -> None:
    """Pick an adapter with the keyboard."""
    page.click("#adapter-picker input")
    page.keyboard.type(name)
    page.wait_for_selector(f"[role=option]:has-text('{name}')")
    page.keyboard.press("Enter")
    page.wait_for_selector(f".as-rack-row:has-text('{name}')")


def go(page: Any, view: str) -> None:
    """Open a page by the menu, which a narrow window folds."""
    link = page.locator(f"#nav a[data-page={view}]")
    link.wait_for(state="attached")
    if not link.is_visible():
        page.click(".as-nav-open")
    link.click()
    page.wait_for_selector(f"#nav a[data-page={view}][aria-current]", state="attached")


def until_done(page: Any, panel: str) -> None:
    page.wait_for_selector(f"{panel} .as-tag:is(.good, .bad)", timeout=LONG)
    assert page.inner_text(f"{panel} .as-tag") == "done", page.inner_text(panel)


def test_every_page_opens_without_errors_and_is_labelled(tab: Tab) -> None:
    page = tab.open("compose")
    for view in PAGES:
        go(page, view)
        page.wait_for_timeout(300)
        assert page.evaluate(_UNLABELLED) == []


_UNLABELLED = """() => [...document.querySelectorAll('input:not([type=file]):not([type=hidden]), textarea, button')]
  .filter((e) => e.offsetParent && !e.closest('label') && !e.getAttribute('aria-label') && !e.title
                 && !(e.tagName === 'BUTTON' && e.textContent.trim()))
  .map((e) => e.outerHTML.slice(0, 120))"""


def test_nothing_is_wider_than_a_phone(narrow_tab: Tab) -> None:
    page = narrow_tab.open("compose")
    for view in PAGES:
        go(page, view)
        for more in page.locator(".as-more > button:visible").all():
            more.click()
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, view


def test_compose_with_two_adapters_and_reuse_the_recipe(tab: Tab, tmp_path: Path) -> None:
    page = tab.open("compose")
    page.fill("#prompt textarea", "a robot")
    choose(page, "robot")
    choose(page, "chalk")
    page.click(".as-rack-row:has-text('chalk') .as-chip")
    page.wait_for_function("document.querySelector('#prompt textarea').value.endsWith('in chalk style')")
    page.fill(".as-rack-row:has-text('robot') input[type=number]", "0.7")
    page.locator(".as-rack-row:has-text('chalk') .as-span input").first.fill("30")
    page.click("#method label:has-text('Composite')")
    page.fill("#steps input", "3")
    page.fill("#images input", "2")
    page.click("#generate")
    until_done(page, "#compose-panel")
    assert page.locator("#compose-gallery img").count() == 2
    recipe = page.inner_text("#compose-recipe")
    assert "a robot, in chalk style" in recipe
    assert "× 0.7" in recipe
    assert "30% to 100%" in recipe

    with page.expect_download() as download:
        page.click("text=Download with recipe")
    picture = tmp_path / "picture.png"
    download.value.save_as(picture)
    config = recipe_png.read_recipe(picture)["config"]
    assert [(use["name"], use["weight"]) for use in config["adapters"]] == [("robot", 0.7), ("chalk", 1.0)]
    assert (config["steps"], config["images"], config["method"]) == (3, 1, "composite")

    page.fill("#prompt textarea", "something else")
    page.fill("#steps input", "9")
    page.click("[aria-label='Remove chalk']")
    page.click("#reuse")
    expect_form(page, config)

    tab.reload()
    page.wait_for_selector("#generate")
    page.click("text=Settings from a picture file")
    page.set_input_files("#recipe-drop input[type=file]", str(picture))
    expect_form(page, config)


def expect_form(page: Any, config: dict[str, Any]) -> None:
    page.wait_for_function(f"document.querySelector('#prompt textarea').value === {config['prompt']!r}")
    page.wait_for_function(f"document.querySelector('#seed input').value === '{config['seed']}'")
    page.wait_for_function("document.querySelectorAll('.as-rack-row').length === 2")
    assert page.input_value("#steps input") == "3"
    assert page.input_value(".as-rack-row:has-text('robot') input[type=number]") == "0.7"
    assert page.input_value(".as-rack-row:has-text('chalk') .as-span input >> nth=0") == "30"
    assert page.is_checked("#method input[value=composite]")
    assert not page.is_checked("#new-seed input")


@pytest.mark.journey
def test_train_five_steps_see_it_in_jobs_and_try_it(tab: Tab, tmp_path: Path) -> None:
    files = [str(draw(tmp_path / f"photo-{number}.png", number)) for number in range(2)]
    caption = tmp_path / "photo-1.txt"
    caption.write_text("a zxq on a table")
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    page = tab.open("train")
    page.click("#train-start")
    page.wait_for_selector("text=There are no pictures yet")
    page.set_input_files("#train-drop input[type=file]", [*files, str(caption), str(broken)])
    page.wait_for_selector("text='broken.png' cannot be read as a picture: its content")
    assert page.locator(".as-caption").count() == 2
    assert page.input_value(".as-caption:has-text('photo-1') textarea") == "a zxq on a table"
    page.fill(".as-caption:has-text('photo-0') textarea", "a zxq in the sun")
    page.click("#train-length label:has-text('Quick')")
    page.wait_for_function("document.querySelector('#train-steps input').value === '150'")
    page.fill("#train-name textarea, #train-name input", "zxq-thing")
    page.fill("#train-trigger textarea, #train-trigger input", "zxq")
    page.fill("#train-steps input", "5")
    page.fill("#train-rank input", "2")
    page.click("#train-start")
    go(page, "jobs")
    page.click(".as-job-row:has-text('zxq-thing')")
    until_done(page, "#jobs-panel")
    assert "training" in page.inner_text("#job-log")
    page.click("#job-open")
    page.wait_for_selector("#train-loss-plot svg")
    page.wait_for_selector("#train-panel .as-tag.good")
    kept = next(iter(sorted((tab.server.home / "datasets").iterdir())))
    assert sorted(file.read_text().strip() for file in kept.glob("*.txt")) == ["a zxq in the sun", "a zxq on a table"]
    page.click("#train-try-it")
    page.wait_for_selector(".as-rack-row:has-text('zxq-thing')")
    assert page.input_value("#prompt textarea").endswith("zxq")


def draw(path: Path, number: int) -> Path:
    picture = Image.new("RGB", (96, 80), "white")
    ImageDraw.Draw(picture).ellipse([20, 10, 70, 60], fill=(200, 40 * number, 40))
    picture.save(path)
    return path


def test_mistakes_are_sentences_and_work_can_be_cancelled(tab: Tab) -> None:
    page = tab.open("compose")
    page.fill("#prompt textarea", " ")
    page.click("#generate")
    page.wait_for_selector("text=Write a prompt first")
    page.fill("#prompt textarea", "a slow one")
    page.fill("#width input, #width textarea", "wide")
    page.click("#generate")
    page.wait_for_selector("text=Width: 'wide' is not a number.")
    page.fill("#width input, #width textarea", "")
    page.fill("#steps input", "900")
    page.click("#generate")
    page.wait_for_selector("#compose-cancel:visible")
    page.wait_for_selector("#compose-panel .as-tag.work", timeout=LONG)
    page.click("#compose-cancel")
    page.wait_for_selector("#compose-panel .as-tag:text-is('cancelled')", timeout=LONG)


@pytest.mark.journey
def test_library_use_rename_trash_restore(tab: Tab, tmp_path: Path) -> None:
    from tests.ui.conftest import lora

    page = tab.open("library")
    page.wait_for_selector(".as-card-item:has-text('robot')")
    page.click("#library-import > button")
    page.set_input_files("#import-file input[type=file]", str(lora(tmp_path / "lamp.safetensors", "lmp lamp", 7)))
    page.wait_for_selector("#import-file :text('lamp')")
    page.click("#import-button")
    page.wait_for_selector("#library-panel h2:text-is('lamp')")
    assert "lmp lamp" in page.inner_text("#library-panel")
    page.click("text=Rename or remove")
    new_name = page.locator("#new-name textarea, #new-name input")
    page.wait_for_function("name => name.value === 'lamp'", arg=new_name.element_handle())
    page.wait_for_timeout(500)
    new_name.fill("old lamp")
    page.wait_for_timeout(500)
    assert new_name.input_value() == "old lamp"
    page.click("#rename")
    page.wait_for_selector("#library-panel h2:text-is('old lamp')")
    page.click("#to-trash")
    page.wait_for_selector(".as-card-item:has-text('old lamp')", state="detached")
    page.click("#shelf label:has-text('Trash')")
    page.click(".as-card-item:has-text('old lamp')")
    page.click("#restore")
    page.wait_for_selector("#shelf label.selected:has-text('Adapters')")
    page.wait_for_selector("#use-in-compose")
    page.wait_for_timeout(500)
    page.fill("#library-search textarea, #library-search input", "lmp")
    page.wait_for_function("document.querySelectorAll('.as-card-item').length === 1")
    page.click("#use-in-compose")
    page.wait_for_selector(".as-rack-row:has-text('old lamp')")
    page.click("[aria-label='Remove old lamp']")
    choose(page, "old lamp")


@pytest.mark.journey
def test_the_dark_side_is_remembered(tab: Tab) -> None:
    page = tab.open("compose")
    page.click("[data-theme-switch]")
    assert page.evaluate("document.body.classList.contains('dark')")
    tab.open("jobs")
    page.wait_for_function("document.body.classList.contains('dark')")


def test_every_page_has_an_address_and_the_browser_goes_back(tab: Tab) -> None:
    page = tab.open("train")
    assert page.title() == "Train · Adapter Studio"
    go(page, "jobs")
    assert page.url.endswith("/jobs")
    page.go_back()
    page.wait_for_selector("#nav a[data-page=train][aria-current]")
    assert page.url.endswith("/train")
    tab.visit(f"{tab.server.url}3d")
    page.wait_for_selector("#nav a[data-page=reconstruct][aria-current]")


def test_an_unknown_address_says_where_the_pages_are(server: Server) -> None:
    request = urllib.request.Request(f"{server.url}nonsense%3Cb%3E", headers={"Accept": "text/html"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    told = refused.value.read().decode()
    assert refused.value.code == 404
    assert "nonsense&lt;b&gt;" in told
    assert all(f'href="/{place.key}"' in told for place in navigation.PLACES)
    assert server.status("train") == 200


@pytest.mark.journey
def test_pictures_are_kept_starred_compared_and_used_again(tab: Tab) -> None:
    page = tab.open("compose")
    page.fill("#prompt textarea", "a lamp")
    page.fill("#steps input", "2")
    page.fill("#images input", "2")
    page.click("#generate")
    page.wait_for_selector("#compose-cancel:visible")
    until_done(page, "#compose-panel")
    page.wait_for_selector("#compose-earlier .as-kept-one >> nth=1")
    page.fill("#prompt textarea", "something else")
    page.click("#compose-earlier [data-page-link]")
    page.click("#gallery-list .as-kept-one[title^='a lamp'] >> nth=0")
    page.wait_for_selector(".as-large")
    page.click("#gallery-star")
    page.wait_for_selector(".as-kept-one.chosen .star")
    page.click("#gallery-compare")
    page.wait_for_selector("text=Now choose the picture")
    page.click("#gallery-list .as-kept-one:not(.chosen) >> nth=0")
    page.wait_for_selector("#gallery-slider:visible")
    assert page.locator(".as-two .as-recipe").count() == 2
    page.click("#gallery-compare")
    page.check("#of-starred input")
    page.wait_for_function("document.querySelectorAll('#gallery-list .as-kept-one').length === 1")
    page.click("#gallery-reuse")
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a lamp'")
    go(page, "jobs")
    row = page.locator(".as-job-row:has-text('a lamp')").first
    row.locator("img.face").wait_for()
    assert "Merge · seed " in row.inner_text()
    go(page, "gallery")
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("#gallery-delete")
    page.wait_for_selector("#gallery-list :text('No picture matches'), #gallery-list .as-empty")
