"""Compress on the Language page: the form of every method, the picture, and a base made as a person makes it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from adapters.compression.l4q import Grid
from adapters.compression.normal_float import every_configuration
from pipelines.language.compressed import Matrix
from studio.compression import advice, command, layers
from studio.jobs import kinds
from tests.language import tiny
from tests.ui.conftest import Tab
from tests.ui.test_browser import LONG, until_done
from tests.ui.test_language_page import choose
from ui.components import compressing, layer_bars, method_help


def test_the_bits_of_a_layer_are_those_of_its_matrices() -> None:
    for how in every_configuration(thorough=True):
        assert layers.bits_of(str(how)) == how.bits_per_weight
    assert layers.bits_of(str(Grid(4, 64))) == 5
    a, b = Matrix("nf4-8-fp32-64-256", (64, 64)), Matrix("int3-32", (64, 128))
    found = layers.bits_by_layer({"model.layers.1.q": a, "model.layers.1.up": b, "model.layers.10.q": a, "x": b})
    assert list(found) == ["other", "1", "10"]
    assert found["1"] == pytest.approx((4.126953125 + 2 * 5) / 3)


def test_the_picture_says_every_value() -> None:
    svg = layer_bars.bars({str(n): 2 + n / 10 for n in range(30)}, "Bits <per> weight", "{:.2f}")
    root = ET.fromstring(svg)
    bars = root.findall(".//rect")
    assert len(bars) == 30
    assert bars[3].findtext("title") == "layer 3: 2.30"
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert heights == sorted(heights)
    assert layer_bars.of(layers.of_base("/nowhere")) == ""


def test_the_form_reads_the_chosen_method_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path))
    base = tiny.llama(tmp_path / "base")
    import gradio as gr

    with gr.Blocks():
        settings = compressing.draw_settings()
    assert set(settings.forms) == set(kinds.compressions())
    for name, kind in kinds.compressions().items():
        left = set(kind.model().model_fields) - set(settings.forms[name])
        fixed = set(command.fixed(kind))
        assert left == {"base", *fixed, *(n for n, (decides, _) in method_help.OPTIONS.items() if decides in fixed)}
    values: list[Any] = [widget.value for widget in settings.widgets]
    place = settings.widgets.index(settings.forms["lq"]["bits"])
    values[place] = 3.5
    config = compressing.config_of(settings.forms, "lq", str(base), values)
    assert (config.kind, config.bits, config.rank, config.base) == ("compress-lq", 3.5, 64, str(base))


def test_the_advice_follows_size_memory_and_rows() -> None:
    assert "does not fit" in advice.sentence("big", 20 * 10**9, 16 * 10**9, rows=True)
    assert "Fit of 11 GB" in advice.sentence("big", 20 * 10**9, 16 * 10**9, rows=True)
    assert "LoRAM trains your adapter" in advice.sentence("middle", 10 * 10**9, 16 * 10**9, rows=True)
    assert "without, LQ-LoRA" in advice.sentence("middle", 10 * 10**9, 16 * 10**9, rows=False)
    assert "LoRAPrune" in advice.sentence("small", 10**9, 16 * 10**9, rows=True)
    assert "needs no rows" in advice.sentence("small", 10**9, 16 * 10**9, rows=False)
    assert advice.of("nobody's", rows=True) == ""


@pytest.mark.journey
@pytest.mark.browser
@pytest.mark.flaky(reruns=2)
def test_a_smaller_base_from_the_page_to_the_chat(tab: Tab) -> None:
    place = tab.server.home / "library" / "bases" / "small-llama"
    if not place.is_dir():
        tiny.llama(place)
    page = tab.open("language")
    page.wait_for_timeout(1000)
    choose(page, "#language-base", "small-llama")
    page.click("#language-mode label:has-text('Compress')")
    page.click("#compress-method label:has-text('LQ-LoRA')")
    page.fill("#compress-lq-bits input", "3")
    page.fill("#compress-lq-rank input", "40")
    page.click("#compress-start")
    page.wait_for_selector("text=Rank 40 is larger than the smaller side", timeout=LONG)
    page.fill("#compress-lq-rank input", "4")
    page.click("#compress-estimate")
    page.wait_for_selector("#compress-estimated:has-text('bits')", timeout=LONG)
    assert not page.query_selector("#compress-picture svg")
    page.click("#compress-start")
    page.wait_for_selector("#compress-panel .as-tag:is(.work, .wait)", timeout=LONG)
    until_done(page, "#compress-panel")
    page.wait_for_selector("#compress-picture svg rect")
    page.wait_for_selector("#compress-panel:has-text('In your library')")
    page.click("#compress-use")
    page.wait_for_function("document.querySelector('#language-base input').value.includes('bits')", timeout=LONG)


@pytest.mark.journey
@pytest.mark.browser
@pytest.mark.flaky(reruns=2)
def test_pruning_from_a_dropped_file_shows_what_stays_before_and_after(tab: Tab, tmp_path: Path) -> None:
    place = tab.server.home / "library" / "bases" / "small-llama"
    if not place.is_dir():
        tiny.llama(place)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": "red blue"}) + "\n" for n in range(12)))
    page = tab.open("language")
    page.wait_for_timeout(1000)
    choose(page, "#language-base", "small-llama")
    page.click("#language-mode label:has-text('Compress')")
    page.click("#compress-method label:has-text('LoRAPrune')")
    page.set_input_files("#compress-drop input[type=file]", str(rows))
    page.wait_for_selector("#compress-preview:has-text('12 rows')", timeout=LONG)
    page.wait_for_selector("#compress-told:has-text('LoRAPrune also makes it faster')", timeout=LONG)
    page.fill("#compress-loraprune-steps input", "4")
    page.fill("#compress-loraprune-name textarea, #compress-loraprune-name input", "pruned-llama")
    page.click("#compress-estimate")
    page.wait_for_selector("#compress-estimated:has-text('million parameters')", timeout=LONG)
    page.wait_for_selector("#compress-estimated svg rect.bar")
    page.click("#compress-start")
    until_done(page, "#compress-panel")
    page.wait_for_selector("#compress-panel:has-text(\"In your library as 'pruned-llama'\")")
    page.wait_for_selector("#compress-picture svg rect.bar")
    page.click("#compress-use")
    chosen = "document.querySelector('#language-base input').value"
    page.wait_for_function(f"{chosen}.includes('pruned-llama')", timeout=LONG)
