"""The pictures of the app in docs/images, taken from a real run:  python -m tests.ui.screenshots

Uses the shipped base and adapters (small made-up ones where none are shipped) in a home folder that is thrown away.
"""

from __future__ import annotations

import io
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from studio import library
from tests.ui.conftest import CHROMIUM, ROOT, SWITCHES, lora, serve

IMAGES = ROOT / "docs" / "images"
SIZES = {1280: 980, 390: 844}
PATIENCE = 300_000
LARGEST = 280_000


def main(prompt: str = "") -> None:
    """Take them all; ``prompt`` replaces the one made from the adapters' trigger words."""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        shipped = [record for record in library.adapters() if record.read_only and not record.problem]
        chosen = [shipped[0], shipped[-1]] if len(shipped) > 1 else []
        if not chosen:
            for number, name in enumerate(("robot", "chalk")):
                lora(home / "library" / "adapters" / f"{name}.safetensors", name, number)
        names = [record.name for record in chosen] or ["robot", "chalk"]
        words = [next(iter(record.triggers), "") for record in chosen]
        with contextmanager(serve)(home) as server, chromium() as browser:
            page = sheet(browser, 1280)
            page.goto(server.url)
            page.wait_for_selector("#generate")
            compose(page, names, prompt or ", ".join(filter(None, words)) or "a red apple")
            shoot(page, "compose", top=True)
            train(page, sorted(home.glob("jobs/*/picture-*.png")), "apple")
            shoot(page, "train", top=True)
            look(page, "Jobs", ".as-job-row:has-text('apple')", "#jobs-panel h2")
            shoot(page, "jobs")
            look(page, "Library", f".as-card-item:has-text('{names[0]}')", "#library-panel h2")
            shoot(page, "library")
            phone(browser, server.url, names)


@contextmanager
def chromium() -> Any:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES, headless=True)
        yield browser
        browser.close()


def sheet(browser: Any, width: int) -> Any:
    page = browser.new_context(viewport={"width": width, "height": SIZES[width]}).new_page()
    page.set_default_timeout(PATIENCE)
    return page


def choose(page: Any, name: str) -> None:
    page.click("#adapter-picker input")
    page.keyboard.type(name)
    page.click(f"[role=option]:has-text('{name}')")
    page.wait_for_selector(f".as-rack-row:has-text('{name}')")


def compose(page: Any, names: list[str], prompt: str) -> None:
    page.wait_for_selector("#generate")
    page.wait_for_timeout(2000)
    page.fill("#prompt textarea", prompt)
    for name in names:
        choose(page, name)
    page.locator(".as-rack-row .as-span input").nth(2).fill("20")
    page.click("#method label:has-text('Composite')")
    page.fill("#images input", "4")
    page.fill("#steps input", "16")
    page.fill("#seed input", "5")
    page.uncheck("#new-seed input")
    page.click("#generate")
    page.wait_for_selector("#compose-panel .as-tag.good")
    page.wait_for_timeout(3000)


def train(page: Any, pictures: list[Path], name: str) -> None:
    go(page, "Train")
    page.set_input_files("#train-drop input[type=file]", [str(picture) for picture in pictures])
    page.wait_for_selector(".as-caption >> nth=2")
    page.fill("#train-name textarea, #train-name input", name)
    page.fill("#train-trigger textarea, #train-trigger input", "zxq")
    page.fill("#train-samples textarea", "a flat icon of zxq")
    page.fill("#train-steps input", "24")
    page.fill("#train-sample-every input", "6")
    page.click("#train-start")
    page.wait_for_selector("#train-samples-drawn img >> nth=1")
    page.wait_for_timeout(3000)


def look(page: Any, view: str, item: str, detail: str) -> None:
    go(page, view)
    page.click(item)
    page.wait_for_selector(detail)
    page.wait_for_timeout(3000)


def go(page: Any, view: str) -> None:
    page.click(f"#pages button[role=tab]:text-is('{view}')")
    page.wait_for_timeout(1500)


def phone(browser: Any, url: str, names: list[str]) -> None:
    """The same pages, 390 pixels wide."""
    page = sheet(browser, 390)
    page.goto(url)
    page.wait_for_selector("#compose-gallery img")
    page.wait_for_timeout(2000)
    for name in names:
        choose(page, name)
    page.evaluate("document.querySelector('#rack').scrollIntoView({block: 'center'})")
    shoot(page, "compose")
    go(page, "Train")
    page.evaluate("document.querySelector('#train-result').scrollIntoView()")
    shoot(page, "train")
    for view in ("Library", "Jobs"):
        go(page, view)
        shoot(page, view.lower(), top=True)


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
    main(*sys.argv[1:2])
