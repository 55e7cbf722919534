"""Intruder dimensions on the Library page: what is drawn, and the page in a browser."""

from __future__ import annotations

import re

import pytest

from adapters.errors import InputError
from studio import inspection
from tests.ui.conftest import Tab, lora
from ui.components import spectrum


def report(*cosines: float) -> dict:
    layer = {"name": "unet.<mid>.to_q", "cosines": list(cosines), "relative_change": 0.25}
    return {"k": len(cosines), "of": len(cosines), "layers": [layer]}


def test_the_limit_decides_what_is_an_intruder():
    drawn = spectrum.panel(report(0.9, 0.45, 0.1), 0.5)
    assert "<b>2 intruders</b>" in drawn
    assert drawn.count("<td class=new") == 2
    assert spectrum.panel(report(0.9, 0.45, 0.1), 0.2).count("<td class=new") == 1
    assert "at most 25%" in drawn
    assert "<mid>" not in drawn  # names of layers come from files


def test_the_report_comes_from_a_process_of_its_own(tmp_path):
    adapter = lora(tmp_path / "robot.safetensors", "rbt", 0)
    found = inspection.intruders_apart(str(adapter), "tinymoji", 6)
    assert found["total"] == sum(layer["intruders"] for layer in found["layers"]) > 0
    assert found["of"] == 6 * len(found["layers"])
    with pytest.raises(InputError, match="k must be from 1"):
        inspection.intruders_apart(str(adapter), "tinymoji", 100_000)


@pytest.mark.browser
@pytest.mark.flaky(reruns=2)
def test_looking_into_an_adapter(tab: Tab) -> None:
    page = tab.open("library")
    page.set_default_timeout(180_000)
    page.click(".as-card-item:has-text('robot')")
    page.wait_for_selector("#spectrum", state="visible")
    page.locator("#spectrum button").first.click()
    base = page.locator("#spectrum-base input").first
    base.wait_for()
    base.click()
    page.locator("[role=option]:visible:has-text('tinymoji')").first.click()
    page.click("#spectrum-ask")
    page.wait_for_selector(".as-spectrum")
    before = int(re.match(r"\d+", page.inner_text(".as-spectrum > p >> nth=0")).group())
    page.locator("#spectrum-eps input[type=number]").fill("1")
    page.keyboard.press("Tab")
    page.wait_for_function(f"parseInt(document.querySelector('.as-spectrum > p').innerText) > {before}")
    page.click(".as-card-item:has-text('chalk')")
    page.wait_for_selector(".as-spectrum", state="detached")  # it was about another adapter
