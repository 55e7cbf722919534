"""The safety audit on the Library page: what it shows, and an audit from upload to verdict in a browser."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from studio.jobs import Job
from tests.audit import toy
from tests.ui.conftest import Tab
from ui.components import auditing


def test_a_result_without_a_table_and_with_one(tmp_path):
    check = {"title": "Refusals <lost>", "status": "fail", "value": 60.0, "low": 50.0, "high": 70.0}
    values = {
        "verdict": "fail",
        "checks": [check],
        "warnings": ["a & b"],
        "remarks": [],
        "files": {"html": "/x/audit.html"},
    }
    job = Job("1", "audit", "done", {}, 0.0, tmp_path, result=values)
    shown = auditing.result(job)
    assert "Refusals &lt;lost&gt;" in shown
    assert "a &amp; b" in shown
    assert "+60.0 (+50.0 to +70.0)" in shown
    assert "<table" not in auditing.result(replace(job, result={**values, "checks": []}))


@pytest.mark.journey
@pytest.mark.browser
@pytest.mark.flaky(reruns=2)
def test_an_audit_from_upload_to_verdict(tab: Tab, tmp_path) -> None:
    world = toy.build(tmp_path / "world")
    shutil.copytree(world.regressed, tab.server.home / "library" / "adapters" / "leaky", dirs_exist_ok=True)
    page = tab.open("library")
    page.set_default_timeout(240_000)
    page.click(".as-card-item:has-text('leaky')")
    page.wait_for_selector("#audit", state="visible")
    page.locator("#audit button").first.click()
    page.wait_for_selector("#audit-base", state="visible")
    page.click("#audit-start")
    page.wait_for_selector("text=Choose the base")
    page.fill("#audit-base input", str(world.base))
    page.keyboard.press("Tab")
    page.set_input_files("#audit-harmful input[type=file]", [str(world.secret)])
    page.wait_for_selector("#audit-harmful :text('secret')")
    page.click("#audit-start")
    page.wait_for_selector(".as-audit .as-tag.bad")
    assert "Refusals lost" in page.inner_text(".as-audit")
    page.screenshot(path=str(tmp_path / "audit.png"), full_page=True)
    page.click(".as-card-item:has-text('robot')")
    page.wait_for_selector("#audit", state="hidden")
    page.wait_for_selector(".as-card-item:has-text('leaky'):has-text('audit failed')")
