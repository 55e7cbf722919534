"""The pictures of the app in docs/images, taken from a real run:  python -m tests.ui.screenshots

Uses the shipped base and adapters (small made-up ones where none are shipped) in a home folder that is thrown away.
Other pages are left out: some show where files lie on the machine, and pictures weigh on every clone.
"""

from __future__ import annotations

import io
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from studio import library
from tests.ui.conftest import CHROMIUM, ROOT, SWITCHES, lora, serve

IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT = 1280, 980
PAIR = ("alien", "cactus")
DRAWS_3D = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")
PATIENCE = 300_000
LARGEST = 280_000


def main() -> None:
    """Take them all."""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        shipped = {record.name for record in library.adapters() if record.read_only and not record.problem}
        if not shipped.issuperset(PAIR):
            for number, name in enumerate(PAIR):
                lora(home / "library" / "adapters" / f"{name}.safetensors", name, number)
        with contextmanager(serve)(home) as server, chromium() as browser:
            page = sheet(browser)
            page.goto(server.url)
            page.wait_for_selector("#generate")
            page.set_viewport_size({"width": WIDTH, "height": 1640})  # regions are drawn below the adapters
            compose(page)
            shoot(page, "compose", top=True)
            page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
            reconstruct(page)
            shoot(page, "reconstruct", top=True)


@contextmanager
def chromium() -> Any:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        switches = [switch for switch in SWITCHES if switch != "--disable-gpu"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*switches, *DRAWS_3D], headless=True)
        yield browser
        browser.close()


def sheet(browser: Any) -> Any:
    page = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}).new_page()
    page.set_default_timeout(PATIENCE)
    return page


def choose(page: Any, name: str) -> None:
    page.click("#adapter-picker input")
    page.keyboard.type(name)
    page.click(f"[role=option]:has-text('{name}')")
    page.wait_for_selector(f".as-rack-row:has-text('{name}')")


def compose(page: Any) -> None:
    """Two adapters, each in its half of a wide picture."""
    page.wait_for_selector("#generate")
    page.wait_for_timeout(2000)
    page.fill("#prompt textarea", f"a cartoon icon of an {PAIR[0]} left of a {PAIR[1]}")
    for name in PAIR:
        choose(page, name)
    page.fill("#width input", "128")
    page.click("#where label:has-text('In regions I draw')")
    page.wait_for_selector("#regions-stage:visible")
    page.click("#side-by-side")
    for number in (1, 2):  # left empty, a region hears the whole prompt
        page.fill(f"[aria-label='Prompt of region {number}']", "")
    page.fill("#images input", "4")
    page.fill("#steps input", "20")
    page.fill("#seed input", "5")
    page.uncheck("#new-seed input")
    page.click("#generate")
    page.wait_for_selector("#compose-panel .as-tag.good")
    page.wait_for_selector(".as-stage-picture:visible")
    page.wait_for_timeout(3000)


def reconstruct(page: Any) -> None:
    """The sample scene, long enough for its viewer to draw it."""
    go(page, "reconstruct")
    page.click("#reconstruct-sample")
    page.wait_for_selector("#reconstruct-drop :text('room-0')")
    page.click("#reconstruct-start")
    page.wait_for_selector("#reconstruct-panel .as-tag.good")
    page.wait_for_selector("#scene-after canvas", state="attached")
    page.wait_for_timeout(15_000)


def go(page: Any, view: str) -> None:
    page.click(f"#nav a[data-page={view}]")
    page.wait_for_timeout(1500)


def shoot(page: Any, name: str, top: bool = False) -> None:
    """Save what the page shows as docs/images/ui-NAME-WIDTH.png, in 256 colours if it would be large."""
    if top:
        page.evaluate("window.scrollTo(0, 0)")
    page.mouse.move(2, 2)
    page.wait_for_timeout(700)
    width = page.viewport_size["width"]
    place = IMAGES / f"ui-{name}-{width}.png"
    IMAGES.mkdir(parents=True, exist_ok=True)
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        full = picture.convert("RGB")
    full.save(place, optimize=True)
    if place.stat().st_size > LARGEST:
        full.quantize(256, dither=Image.Dither.NONE).save(place, optimize=True)


if __name__ == "__main__":
    main()
