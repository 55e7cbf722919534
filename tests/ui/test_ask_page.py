"""The page that asks about pictures: an example that runs at once, a dropped picture, an adapter beside the base; and a
training from dropped questions with their pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import assets
from adapters.errors import InputError
from tests.ui.conftest import Server, Tab
from tests.ui.test_browser import LONG
from ui.components import rows_file, schema_form
from ui.pages import ask


def noisy(server: Server) -> str:
    """An adapter of the embedded model that changes what it says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    place = server.home / "library" / "adapters" / "muddled"
    if not place.is_dir():
        base = AutoModelForImageTextToText.from_pretrained(assets.path("models/tinysight"), dtype=torch.float32)
        inside = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and "language_model" in n]
        torch.manual_seed(0)
        get_peft_model(base, LoraConfig(r=4, target_modules=inside)).save_pretrained(place)
        file = place / "adapter_model.safetensors"
        save_file({name: torch.randn_like(t) * 0.2 for name, t in load_file(file).items()}, file)
    return place.name


def finished(page: Any, cards: int) -> list[str]:
    """The answers, once all are written."""
    page.wait_for_function(
        "n => document.querySelectorAll('#ask-answers article').length === n && "
        "document.querySelector('#ask-status').innerText.trim() === ''",
        arg=cards, timeout=LONG,
    )  # fmt: skip
    return [text.strip() for text in page.locator("#ask-answers article p").all_inner_texts()]


def pictured(page: Any, name: str) -> None:
    """Keep a screenshot where ``ADAPTER_STUDIO_SHOTS`` says."""
    if place := os.environ.get("ADAPTER_STUDIO_SHOTS"):
        page.screenshot(path=f"{place}/{name}.png", full_page=True)


@pytest.mark.journey
@pytest.mark.browser
@pytest.mark.flaky(reruns=2)
@pytest.mark.parametrize("width", ["tab", "narrow_tab"])
def test_examples_own_pictures_and_adapters(width: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tab: Tab = request.getfixturevalue(width)
    name = noisy(tab.server)
    page = tab.open("ask")
    page.wait_for_timeout(1000)
    pictured(page, f"ask-{width}-start")
    page.click("#ask-send")
    page.wait_for_selector("text=There is no picture yet")
    page.click("#ask-examples button >> nth=0")
    (first,) = finished(page, 1)
    assert first not in ("", "…")
    assert page.input_value("#ask-question textarea") == ask.examples()[0].question
    Image.new("RGB", (90, 60), "white").save(tmp_path / "blank.png")
    page.set_input_files("#ask-drop input[type=file]", str(tmp_path / "blank.png"))
    page.wait_for_selector("#ask-picture figcaption:has-text('blank.png · 90 × 60')")
    page.fill("#ask-question textarea", "What colour is the background?")
    page.click("#ask-adapters input")
    page.keyboard.type(name)
    page.wait_for_selector(f"[role=option]:has-text('{name}')")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    page.click("#ask-send")
    plain, changed = finished(page, 2)
    assert plain != changed
    assert page.locator("#ask-answers article h4").all_inner_texts() == ["base", name]
    pictured(page, f"ask-{width}-compared")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), "nothing is wider than the page"
    page.fill("#ask-tokens input", "100000")
    page.click("#ask-send")
    page.wait_for_selector("#ask-status:has-text('this model can read')", timeout=LONG)


def test_room_for_answers() -> None:
    assert [variant.name for variant in ask.variants([], "compare")] == ["base"]
    assert [variant.name for variant in ask.variants(["a", "b"], "together")] == ["a + b"]
    with pytest.raises(InputError, match="room for 3 adapters"):
        ask.variants(["a", "b", "c", "d"], "compare")


def test_examples_come_with_the_model() -> None:
    found = ask.examples()
    assert len(found) == 3
    assert all(one.picture.is_file() and one.question.endswith("?") for one in found)


COLOURS = ("red", "blue")


def coloured(folder: Path) -> list[str]:
    """A file of questions and the pictures that it names in a folder of their own."""
    (folder / "shots").mkdir(parents=True)
    for colour in COLOURS:
        Image.new("RGB", (40, 30), colour).save(folder / "shots" / f"{colour}.png")
    rows = [{"image": f"shots/{colour}.png", "question": "What hue?", "answer": f"<{colour}>"} for colour in COLOURS]
    file = folder / "hues.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(file), *(str(folder / "shots" / f"{colour}.png") for colour in COLOURS)]


def test_dropped_questions_find_their_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path / "home"))
    files = coloured(tmp_path / "given")
    kept = rows_file.keep_with_pictures(files)
    assert (kept.parent / "shots" / "red.png").is_file()  # where the rows look for it
    told = rows_file.describe_pictured(kept)
    assert "2 rows; columns image, question, answer" in told
    assert "red.png" in told
    assert "&lt;red&gt;" in told
    outside = tmp_path / "given" / "outside.jsonl"
    outside.write_text(json.dumps({"image": "../../red.png", "question": "?", "answer": "red"}))
    rows_file.keep_with_pictures([str(outside), files[1]])
    assert not (tmp_path / "home" / "red.png").exists()
    with pytest.raises(InputError, match=r"there is no picture 'shots/red\.png'"):
        rows_file.describe_pictured(rows_file.keep_with_pictures(files[:1]))
    with pytest.raises(InputError, match=r"one file of rows .* there are 0"):
        rows_file.keep_with_pictures(files[1:])
    values = [schema_form.show(ask.KNOWN[name], ask.KNOWN[name].default) for name in ask.NAMES]
    config = ask.config_of(str(kept), "", *values)
    assert (config.base, config.data) == ("tinysight", str(kept))
    with pytest.raises(InputError, match="no rows yet"):
        ask.config_of("", "", *values)


@pytest.mark.journey
@pytest.mark.browser
@pytest.mark.flaky(reruns=2)
def test_training_from_questions_and_asking_with_the_adapter(tab: Tab, tmp_path: Path) -> None:
    page = tab.open("ask")
    page.set_default_timeout(LONG)
    page.click("#ask-mode label:has-text('Train')")
    page.wait_for_selector("#sight-start", state="visible")
    page.click("#sight-start")
    page.wait_for_selector("text=There are no rows yet")
    page.set_input_files("#sight-drop input[type=file]", coloured(tmp_path / "given"))
    page.wait_for_selector("#sight-preview :text('2 rows')")
    page.fill("#sight-name textarea, #sight-name input", "hues")
    page.fill("#sight-steps input", "2")
    pictured(page, "ask-train-form")
    page.click("#sight-start")
    page.wait_for_selector("#sight-talk", state="visible")
    pictured(page, "ask-train-done")
    assert page.locator("#sight-answers td").count() > 0
    page.click("#sight-talk")
    page.wait_for_selector("#ask-send", state="visible")
    assert "hues" in page.inner_text("#ask-adapters")
    tab.leave()
    page = tab.open("jobs")
    page.click(".as-job-row:has-text('hues')")
    page.click("#job-open")
    page.wait_for_selector("#sight-panel :text('hues')", state="visible")
