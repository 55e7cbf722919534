"""Two people at one server, each with a browser of their own: each comes back to their own run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.ui.conftest import Server, Tab, environment

pytestmark = [pytest.mark.browser, pytest.mark.flaky(reruns=2)]

STOPPED = """
from pathlib import Path
from PIL import Image
from studio import jobs, settings
place = settings.folder("datasets", "two-people")
Image.new("RGB", (64, 64)).save(place / "a.png")
for name in ("anns", "bens"):
    jobs.cancel(jobs.submit("train-image", {"data": str(place), "trigger": "zxq", "name": name}))
"""


def test_each_sees_their_own_run_and_nobody_is_offered_another_ones(tab: Tab, narrow_tab: Tab, server: Server) -> None:
    subprocess.run([sys.executable, "-c", STOPPED], env=environment(server.home), check=True)
    ann = tab.open("jobs")
    ann.click(".as-job-row:has-text('anns')")
    ann.wait_for_selector("#jobs-detail h2:has-text('anns')")
    assert ann.locator(".as-changed tr:has-text('trigger') td").first.inner_text() == "zxq"
    ann.click("#job-open")
    ann.wait_for_selector("#train-panel .as-tag:has-text('cancelled')")
    ann.wait_for_selector("#train-resume:visible")
    ann = tab.open("train")  # a newer run of somebody else is not shown instead
    ann.wait_for_selector("#train-panel .as-tag:has-text('cancelled')")
    ann.wait_for_selector("#train-resume:visible")
    ben = narrow_tab.open("train")
    ben.wait_for_selector("#train-panel:has-text('Your training appears here')")
    ben.wait_for_timeout(1000)
    assert not ben.locator("#train-resume").is_visible()
    assert not ben.locator("#train-panel .as-tag").count()
