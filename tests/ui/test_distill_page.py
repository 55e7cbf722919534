"""Distilling in a real browser: the form, a run of two steps, and its adapter on the Compose page."""

from __future__ import annotations

import pytest

from tests.ui.conftest import Tab
from tests.ui.test_browser import LONG

pytestmark = [pytest.mark.browser, pytest.mark.flaky(reruns=2)]


@pytest.mark.journey
def test_the_form_fits_a_phone(narrow_tab: Tab) -> None:
    page = narrow_tab.open("train")
    page.click("#train-way label:has-text('Distil')")
    page.wait_for_selector("#distill-start")
    for more in page.locator(".as-more > button:visible").all():
        more.click()
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
def test_distil_two_steps_and_compose_with_it(tab: Tab) -> None:
    page = tab.open("train")
    page.click("#train-way label:has-text('Distil')")
    page.fill("#distill-name textarea, #distill-name input", "swift")
    page.fill("#distill-prompts textarea", "a flat icon of a dog")
    for name, value in (("steps", "2"), ("rank", "2"), ("batch_size", "1"), ("trajectory_count", "1")):
        page.fill(f"#distill-{name} input", value)
    page.click("#distill-start")
    page.wait_for_selector("#distill-panel .as-tag:is(.good, .bad)", timeout=3 * LONG)  # records paths, too
    assert page.inner_text("#distill-panel .as-tag") == "done", page.inner_text("#distill-panel")
    page.click("#distill-try-it")
    page.wait_for_selector(".as-rack-row:has-text('swift') .as-rack-built-in:has-text('guidance 4 built in')")
    page.wait_for_function("document.querySelector('#guidance-scale input').disabled")
    assert page.input_value("#guidance-scale input") == ""
