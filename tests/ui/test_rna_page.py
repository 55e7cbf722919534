"""The page that classifies RNA: the example at once, a dropped file, plots, a table, errors as sentences."""

from __future__ import annotations

import csv
import gzip
import os
from pathlib import Path
from typing import Any

import pytest

import assets
from tests.ui.conftest import Tab
from tests.ui.test_browser import LONG
from ui.components import rna_plots
from ui.pages import rna

LABELS = ["mRNA", "lncRNA"]
ROW = {"id": "a<b", "length": "300", "label": "lncRNA", "p_lncRNA": "0.75", "p_mRNA": "0.25", "orf_start": "31",
       "orf_end": "90", "orf_strand": "+", "orf_length": "60", "orf_coverage": "0.2000", "orf_complete": "yes",
       "remark": ""}  # fmt: skip


def test_plots_and_table_say_what_they_show():
    drawn = rna_plots.histogram([0] * 10 + [3] + [0] * 9, LABELS, 0.6)
    assert "0.50 to 0.55: 3" in drawn
    assert 'class="first"' in drawn
    assert "threshold 0.6" in drawn
    assert rna_plots.histogram([0] * 20, LABELS, 0.5) == ""
    shown = rna_plots.orf_map([ROW, {**ROW, "id": "none", "label": "", "orf_start": ""}], LABELS)
    assert "a&lt;b: lncRNA, ORF 31 to 90 on strand +, 60 of 300 nt" in shown
    assert shown.count('class="whole"') == 2
    table = rna.table([ROW] * (rna.SHOWN + 1), LABELS)
    assert table.count("<tr>") == rna.SHOWN + 1
    assert "a&lt;b" in table
    assert "The first 50 rows" in table
    unknown = rna.table([dict.fromkeys(ROW, "") | {"id": "b", "length": "300"}], LABELS)
    assert unknown.count("<td>—</td>") == 4


def pictured(page: Any, name: str) -> None:
    """Keep a screenshot where ``ADAPTER_STUDIO_SHOTS`` says."""
    if place := os.environ.get("ADAPTER_STUDIO_SHOTS"):
        page.screenshot(path=f"{place}/{name}.png", full_page=True)


@pytest.mark.journey
@pytest.mark.browser
@pytest.mark.flaky(reruns=2)
@pytest.mark.parametrize("width", ["tab", "narrow_tab"])
def test_the_example_and_a_dropped_file(width: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tab: Tab = request.getfixturevalue(width)
    page = tab.open("rna")
    pictured(page, f"rna-empty-{width}")
    page.click("#rna-start")
    page.wait_for_selector("text=There are no transcripts yet")
    page.click("#rna-example")
    page.wait_for_selector("#rna-download:visible", timeout=LONG)
    assert page.locator("#rna-plots figure").count() == 2
    assert "demo.fa" in page.inner_text("#rna-chosen")
    demo = assets.path("models/tinyrna") / "examples" / "demo.fa"
    count = demo.read_text().count(">")
    assert page.locator(".as-rna-table tbody tr").count() == min(count, rna.SHOWN)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    pictured(page, f"rna-example-{width}")
    with page.expect_download() as begun:
        page.click("#rna-download")
    begun.value.save_as(tmp_path / "scores.tsv")
    with (tmp_path / "scores.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == count
    packed = tmp_path / "mine.fa.gz"
    packed.write_bytes(gzip.compress(demo.read_bytes()[: demo.read_bytes().find(b">", 3000)]))
    page.set_input_files("#rna-drop input[type=file]", str(packed))
    page.wait_for_selector("#rna-chosen:has-text('mine.fa.gz')")
    page.click("#rna-start")
    page.wait_for_selector("#rna-cancel:visible")
    page.wait_for_selector("#rna-download:visible", timeout=LONG)
    assert page.locator(".as-rna-table tbody tr").count() < count
    bad = tmp_path / "bad.fa"
    bad.write_text(">p\nMKVLEQ\n")
    page.set_input_files("#rna-drop input[type=file]", str(bad))
    page.wait_for_selector("#rna-chosen:has-text('bad.fa')")
    page.click("#rna-start")
    page.wait_for_selector("text=is a protein")
