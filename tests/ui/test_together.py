"""Waiting trainings of one base are put together on the page Jobs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.language import tiny
from tests.ui.conftest import ROOT, Tab, environment

LONG = 240_000


@pytest.mark.browser
@pytest.mark.flaky(reruns=2)
def test_train_together(tab: Tab, tmp_path: Path) -> None:
    """Two jobs wait, no worker runs yet; the button puts them together and starts one."""
    base = tiny.llama(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": str(n)}) + "\n" for n in range(6)))
    values = {"base": str(base), "data": str(rows), "steps": 2, "rank": 2, "batch_size": 2, "device": "cpu"}
    program = (
        "import json, sys; from studio import jobs; values = json.loads(sys.argv[1])\n"
        "for name in sys.argv[2:]: jobs.submit('train-language', {**values, 'name': name})"
    )
    names = [f"{word}-{tmp_path.name[-1]}" for word in ("cats", "dogs")]
    subprocess.run([sys.executable, "-c", program, json.dumps(values), *names], env=environment(tab.server.home),
                   cwd=ROOT, check=True)  # fmt: skip
    page = tab.open("jobs")
    page.click(f".as-job-row:has-text('{names[0]}')")
    page.wait_for_selector(f"#job-mates:has-text('{names[1]}')")
    page.click("#job-together")
    page.wait_for_selector("#jobs-panel .as-tag:is(.good, .bad)", timeout=LONG)
    assert page.inner_text("#jobs-panel .as-tag") == "done", page.inner_text("#jobs-panel")
    assert f"Together with\n{names[1]}" in page.inner_text("#jobs-panel").replace("\t", "\n")
    row = page.locator(f".as-job-row:has-text('{names[1]}')")
    row.locator(".as-tag.good").wait_for(timeout=LONG)
