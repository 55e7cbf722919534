"""Two people at one server, each with a browser of their own: each comes back to their own run."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.ui.conftest import Server, Tab, environment
from tests.ui.test_browser import LONG

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


GOING = """
import json
from studio import jobs
print(json.dumps({job.config.get("prompt"): job.active for job in reversed(jobs.list(100))}))
"""


@pytest.mark.journey
def test_each_cancels_their_own_pictures(tab: Tab, narrow_tab: Tab, server: Server) -> None:
    ann, ben = (begin(one, prompt) for one, prompt in ((tab, "anns lamp"), (narrow_tab, "bens lamp")))
    try:
        ben.click("#compose-cancel")
        ben.wait_for_selector("#compose-panel .as-tag:text-is('cancelled')", timeout=LONG)
        ben.wait_for_selector("#compose-cancel", state="hidden")
        program = subprocess.run([sys.executable, "-c", GOING], env=environment(server.home), check=True,
                                 capture_output=True)  # fmt: skip
        going = json.loads(program.stdout)
        assert going["anns lamp"]
        assert not going["bens lamp"]
        for one in (tab, narrow_tab):
            one.reload()
        ben.wait_for_selector("#compose-panel .as-tag:text-is('cancelled')")
        assert ben.input_value("#prompt textarea") == "bens lamp"
        ann.wait_for_selector("#compose-panel .as-tag:is(.wait, .work)")
        assert ann.input_value("#prompt textarea") == "anns lamp"
    finally:
        ann.click("#compose-cancel")
        ann.wait_for_selector("#compose-panel .as-tag:text-is('cancelled')", timeout=LONG)


def begin(tab: Tab, prompt: str) -> Any:
    """Ask on Compose for pictures that take long."""
    page = tab.open("compose")
    page.fill("#prompt textarea", prompt)
    page.fill("#steps input", "900")
    page.fill("#images input", "64")
    page.click("#generate")
    page.wait_for_selector("#compose-cancel:visible")
    return page
