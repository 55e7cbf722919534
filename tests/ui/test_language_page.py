"""The Language page as a person meets it: a chat with a tiny model, a training from a file, adapters side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import InputError
from tests.language import tiny
from tests.ui.conftest import Tab
from tests.ui.test_browser import LONG, until_done
from ui.components import rows_file
from ui.pages import language


def choose(page: Any, field: str, name: str) -> None:
    """Pick an entry of a list with the keyboard."""
    page.click(f"{field} input")
    page.keyboard.press("Control+A")
    page.keyboard.type(name)
    page.wait_for_selector(f"[role=option]:has-text('{name}')")
    page.keyboard.press("Enter")


def answered(page: Any, variant: int, count: int = 1) -> None:
    """Until a variant has finished so many answers."""
    page.wait_for_function(
        "([variant, count]) => document.querySelectorAll(`#language-variant-${variant} .bot.message`).length >= count",
        arg=[variant, count], timeout=LONG,
    )  # fmt: skip
    page.wait_for_function("document.querySelector('#language-status').innerText.trim() === ''", timeout=LONG)


@pytest.mark.journey
@pytest.mark.browser
@pytest.mark.flaky(reruns=2)
def test_chat_train_from_a_file_and_compare(tab: Tab, tmp_path: Path) -> None:
    place = tab.server.home / "library" / "bases" / "little-llama"
    if not place.is_dir():
        tiny.llama(place)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": str(n)}) + "\n" for n in range(12)) + "oops\n")
    page = tab.open("language")
    page.wait_for_timeout(1000)
    choose(page, "#language-base", "little-llama")
    page.fill("#language-tokens input", "8")
    page.click("#language-send")
    page.wait_for_selector("text=Write a message first.")
    page.fill("#language-message textarea", "hello there")
    page.click("#language-send")
    page.wait_for_selector("#language-variant-0 .user.message:has-text('hello there')")
    answered(page, 0)

    page.click("#language-mode label:has-text('Train from a file')")
    page.click("#language-start")
    page.wait_for_selector("text=There are no rows yet")
    page.set_input_files("#language-drop input[type=file]", str(rows))
    page.wait_for_selector("#language-preview:has-text('1 unreadable (line 13)')")
    name = f"counting-{tmp_path.name[-1]}"
    page.fill("#language-name textarea, #language-name input", name)
    page.fill("#language-steps input", "6")
    page.fill("#language-rank input", "2")
    page.fill("#language-sample-prompts textarea", "3?")
    page.click("#language-start")
    page.wait_for_selector("text=line 13: not JSON", timeout=LONG)
    assert page.locator("#language-panel .as-tag").count() == 0, "no job is made of it"
    rows.write_text("\n".join(rows.read_text().splitlines()[:-1]) + "\n")
    page.click("#language-drop button[aria-label*='Clear'], #language-drop button[aria-label*='Remove']")
    page.wait_for_selector("#language-preview:has-text('rows')", state="detached")
    page.set_input_files("#language-drop input[type=file]", str(rows))
    page.wait_for_selector("#language-preview:has-text('12 rows')")
    page.click("#language-start")
    page.wait_for_selector("#language-panel .as-tag:is(.work, .wait)", timeout=LONG)
    until_done(page, "#language-panel")
    page.wait_for_selector("#language-plot svg")
    page.wait_for_selector("#language-answers td:has-text('3?')")

    page.click("#language-talk")
    page.wait_for_selector(f"#language-adapters:has-text('{name}')")
    page.click("#language-compare label:has-text('Side by side')")
    page.wait_for_selector("#language-variant-1")
    page.fill("#language-message textarea", "7?")
    page.click("#language-send")
    answered(page, 0)
    answered(page, 1)
    page.click("#language-clear")
    page.wait_for_function("document.querySelectorAll('#language-variant-1 .message').length === 0")


def test_what_a_chat_box_gives_back_is_plain_messages() -> None:
    talk = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}],
            "metadata": {},
        },
    ]
    assert language.plain(talk) == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    assert language.plain(None) == []


def test_variants_side_by_side_are_limited() -> None:
    assert [variant.name for variant in language.variants(["a", "b"], "compare")] == ["base", "a", "b"]
    assert [variant.adapters for variant in language.variants(["a", "b"], "together")] == [(("a", 1.0), ("b", 1.0))]
    assert len(language.variants(list("abcdef"), "compare")) == 7
    with pytest.raises(InputError, match="room for 6 adapters"):
        language.variants(list("abcdefg"), "compare")


def test_the_form_is_the_schema() -> None:
    """Every field of the schema has a widget, and what they show at first is the default configuration."""
    names = [name for name in language.NAMES if name != "base"]
    values = [language.schema_form.show(language.KNOWN[name], language.KNOWN[name].default) for name in names]
    config = language.config_of("rows.jsonl", "", values)
    default = type(config).parse({"data": "rows.jsonl"})
    assert config == default


def test_rows_are_shown_as_they_will_be_understood(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n<b>good</b>,yes\nbad,no\n")
    shown = rows_file.describe(file, "classification")
    assert "2 rows; columns text, label" in shown
    assert "<b>good</b>" not in shown  # what a file says never becomes markup
    assert re.search(r"yes</span> &lt;b&gt;good", shown)
    kept = rows_file.keep(file)
    assert kept.read_text() == file.read_text()
    with pytest.raises(InputError, match="needs a text and a label"):
        rows_file.describe(_write(tmp_path / "other.csv", "a,b\n1,2\n"), "classification")


def _write(file: Path, text: str) -> Path:
    file.write_text(text)
    return file
