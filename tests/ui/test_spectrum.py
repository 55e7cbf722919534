"""Intruder dimensions on the Library page: what is drawn, and the page in a browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from adapters.errors import InputError
from studio.inspection import intruders
from studio.processes import apart
from tests.ui.conftest import Tab, lora
from ui.components import forgetting_plot, softening, spectrum


def report(*cosines: float) -> dict:
    layer = {"name": "unet.<mid>.to_q", "cosines": list(cosines), "relative_change": 0.25, "norm": 2.0,
             "values": [1.0] * len(cosines), "overlaps": [0.5] * len(cosines)}  # fmt: skip
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
    found = apart(intruders.plain_report, str(adapter), "tinymoji", 6)
    assert found["total"] == sum(layer["intruders"] for layer in found["layers"]) > 0
    assert found["of"] == 6 * len(found["layers"])
    with pytest.raises(InputError, match="k must be from 1"):
        apart(intruders.plain_report, str(adapter), "tinymoji", 100_000)


def test_the_slider_says_what_is_left_of_the_update():
    assert softening.size_of(None, 0.5, 0.75) == ""
    assert "<b>100%</b>" in softening.size_of(report(0.9, 0.1), 0.5, 1.0)
    assert "<b>97%</b>" in softening.size_of(report(0.9, 0.1), 0.5, 0.5)  # |dW|^2: 4 - 2 * 0.5 * 0.5 + 0.5^2 = 3.75
    assert "times 0.94" in softening.size_of(report(0.9, 0.1), 1.0, 0.5)  # both are intruders now


def row(variant: str, strength: float, old: float, **new: float) -> dict:
    return {"variant": variant, "strength": strength, "norm": 1.0, "losses": {"old": old, **new}}


def test_the_curve_has_softened_and_shrunk_beside_each_other():
    rows = [row("base", 0.0, 1.0), row("adapter", 1.0, 3.0), row("intruders scaled", 0.5, 2.0),
            row("whole update shrunk", 0.8, 2.5)]  # fmt: skip
    assert [at for at, _, _ in forgetting_plot.pairs(rows)] == [1.0, 0.5]
    drawn = forgetting_plot.forgetting_plot(rows, 0.75)
    assert drawn.count("<figure") == 1
    assert drawn.count('<circle class="soft"') == drawn.count('<circle class="shrunk"') == 2
    assert "lambda 0.5: 2" in drawn
    both = [{**one, "losses": {**one["losses"], "new": 1.5}} for one in rows]
    assert forgetting_plot.forgetting_plot(both, 0.75).count("<figure") == 3
    assert forgetting_plot.forgetting_plot([], 0.75) == ""


def test_what_was_dropped_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path))
    (tmp_path / "uploads").mkdir()
    text, picture = tmp_path / "uploads" / "old.txt", tmp_path / "uploads" / "a.png"
    text.write_text("a red apple")
    Image.new("RGB", (8, 8)).save(picture)
    assert softening.kept([], "fox-old") == ""
    assert Path(softening.kept([str(text)], "fox-old")).read_text() == "a red apple"
    folder = Path(softening.kept([str(picture)], "fox-old"))
    assert [file.suffix for file in folder.iterdir()] == [".png"]
    with pytest.raises(InputError, match="one text"):
        softening.kept([str(text), str(text)], "fox-old")


@pytest.mark.journey
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


def chosen_adapter(page, name: str) -> None:
    """Choose an adapter and the base it was trained on."""
    page.click(f".as-card-item:has-text('{name}')")
    page.wait_for_selector("#spectrum", state="visible")
    if not page.is_visible("#spectrum-base"):
        page.locator("#spectrum button").first.click()
    base = page.locator("#spectrum-base input").first
    base.wait_for()
    base.click()
    page.locator("[role=option]:visible:has-text('tinymoji')").first.click()


@pytest.mark.journey
@pytest.mark.browser
@pytest.mark.flaky(reruns=2)
def test_forgetting_is_measured_and_softened_copies_are_kept(tab: Tab, tmp_path) -> None:
    page = tab.open("library")
    page.set_default_timeout(240_000)
    chosen_adapter(page, "robot")
    page.click("#soften-measure")
    page.wait_for_selector("text=Drop something the base knew before")
    picture = tmp_path / "apple.png"
    Image.new("RGB", (64, 64), (200, 40, 40)).save(picture)
    page.set_input_files("#soften-old input[type=file]", [str(picture)])
    page.wait_for_selector("#soften-old :text('apple')")
    page.click("#soften-measure")
    page.wait_for_selector("#soften-cancel", state="visible")
    page.wait_for_selector("#soften-plot .as-plot circle.soft >> nth=4")
    assert page.is_hidden("#soften-cancel")

    page.click("#soften-keep")
    page.wait_for_selector("#soften-panel :text('robot softened 0.75')")
    tab.leave()
    page = tab.open("library")
    page.wait_for_selector(".as-card-item:has-text('robot shrunk')")

    tab.leave()
    page = tab.open("jobs")
    page.click(".as-job-row:has-text('Forgetting')")
    page.wait_for_selector("#job-open", state="visible")
    page.click("#job-open")
    page.wait_for_selector("#soften-plot .as-plot", state="visible")


@pytest.mark.journey
@pytest.mark.browser
@pytest.mark.flaky(reruns=2)
def test_a_measurement_is_cancelled(tab: Tab, tmp_path) -> None:
    page = tab.open("library")
    page.set_default_timeout(240_000)
    chosen_adapter(page, "chalk")
    pictures = [tmp_path / f"{number}.png" for number in range(8)]
    for number, place in enumerate(pictures):
        Image.new("RGB", (64, 64), (200, 20 * number, 40)).save(place)
    page.set_input_files("#soften-old input[type=file]", [str(place) for place in pictures])
    page.wait_for_selector("#soften-old :text('7.')")
    page.click("#soften-measure")
    page.click("#soften-cancel")
    page.wait_for_selector("#soften-panel .as-tag:text-is('cancelled')")
    assert not page.inner_html("#soften-plot").count("<figure")
