"""Routers of a mixture on the pages: which expert takes which tokens, and what they did while it was trained."""

from __future__ import annotations

import re

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from adapters.layers.experts.presets import preset
from studio import library
from studio.inspection import experts
from studio.processes import apart
from tests.language import tiny
from tests.language.conftest import write_rows
from tests.ui.conftest import Tab
from ui.components import expert_loads, router_plot

ROUTER = {"module": "model.layers.0.<mlp>", "load": [0.75, 0.25], "groups": {"law": [1.0, 0.0], "code": [0.5, 0.5]},
          "busiest": 1.5, "unused": 0, "entropy": 0.4, "apart": 0.5, "words": [["court", "<i>"], []]}  # fmt: skip


def test_cells_are_as_dark_as_their_load():
    drawn = expert_loads.panel({"routers": [ROUTER], "groups": {"law": 7, "code": 9}, "experts": ["1", "2"]})
    assert re.findall(r'<td style="--c:([\d.]+)"', drawn) == ["1.00", "0.00", "0.50", "0.50"]
    assert "expert 1: 100% of law" in drawn
    assert "<b>1.5 times</b> an even share" in drawn
    assert "<b>50%</b> of the tokens" in drawn
    assert "nothing of its own" in drawn
    assert "<mlp>" not in drawn  # names of layers and tokens come from files
    assert "<i>" not in drawn.replace('<i style="', "")
    layers = [ROUTER, {**ROUTER, "load": [1.0, 0.0, 0.0], "groups": {"law": [1.0, 0.0, 0.0]}}]
    drawn = expert_loads.panel({"routers": layers, "groups": {"law": 7}, "experts": ["1", "2", "3"]})
    assert drawn.count("colspan=1></td>") == 1


def test_routers_over_a_training():
    assert router_plot.router_plot([(1, {"learning_rate": 0.1})]) == ""
    logged = [(step, {"router_busiest": 2.0, "router_entropy": 1 / step}) for step in (1, 2, 3)]
    drawn = router_plot.router_plot(logged)
    assert drawn.count("<figure") == 2
    assert "Busiest expert: 2.00" in drawn
    gates = router_plot.router_plot([(step, {"gate_law": 0.25, "gate_<b>": 0.75}) for step in (1, 2)])
    assert gates.count('<path class="line') == 2
    assert "law 0.25" in gates
    assert "<b>" not in gates


def mixture(folder):
    """A mixture in the library, its base, and rows of two kinds."""
    base = tiny.llama(folder / "base")
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), preset("mixlora", r=2, num_experts=4))
    model.save_pretrained(folder / "several")
    library.import_adapter(folder / "several", "several")
    rows = [{"text": f"{kind} {number} words", "kind": kind} for kind in ("law", "code") for number in range(3)]
    return base, write_rows(folder / "rows.jsonl", rows)


def test_the_report_comes_from_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path / "home"))
    base, rows = mixture(tmp_path)
    found = apart(experts.experts, "several", [str(rows)], str(base), "kind").to_dict()
    assert list(found["groups"]) == ["law", "code"]
    assert "Expert 4" in expert_loads.panel(found)


@pytest.mark.journey
@pytest.mark.browser
def test_a_mixture_shows_its_experts_and_not_its_directions(tab: Tab, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tab.server.home))
    base, rows = mixture(tmp_path)
    page = tab.open("library")
    page.set_default_timeout(180_000)
    page.click(".as-card-item:has-text('several')")
    page.wait_for_selector("#expert-loads", state="visible")
    assert page.is_hidden("#spectrum")
    page.locator("#expert-loads button").first.click()
    page.locator("#loads-base input").first.fill(str(base))
    page.keyboard.press("Enter")
    page.locator("#loads-by input, #loads-by textarea").first.fill("kind")
    page.set_input_files("#loads-data input[type=file]", [str(rows)])
    page.wait_for_selector("#loads-data :text('rows')")
    page.click("#loads-ask")
    page.wait_for_selector(".as-loads")
    assert page.locator(".as-loads tbody tr").count() == 2
    assert "law" in page.inner_text(".as-loads thead")
    page.click(".as-card-item:has-text('robot')")
    page.wait_for_selector("#expert-loads", state="hidden")
