"""The page that writes down speech: cards with errors and times, choices, jobs from the form, errors as sentences."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studio import jobs
from studio.jobs import Job
from studio.library import whisper_tiny
from tests.ui.conftest import Tab
from tests.ui.test_browser import LONG
from ui import dropped
from ui.pages import speech

ONE = {"variant": "a<b", "text": "one & two", "segments": [{"start": 0, "end": 1.25, "text": "one"},
                                                           {"start": 1.25, "end": 2, "text": "& two"}],
       "score": {"wer": 0.5, "cer": 0.25, "loops": 1.0}, "files": {}}  # fmt: skip


def finished(folder: Path, **result: Any) -> Job:
    return Job("1", speech.KIND, "done", {}, 0.0, folder, result=result)


def test_cards_show_text_errors_and_times_as_text(tmp_path):
    sound = {"seconds": 2.0, "remarks": ["its 2 channels became one"]}
    shown = speech.results(finished(tmp_path, transcripts=[ONE, {**ONE, "text": "", "score": None}], sound=sound))
    assert "a&lt;b" in shown
    assert "one &amp; two" in shown
    assert "50.0%" in shown
    assert "It repeats itself" in shown
    assert "1.2 - 2.0 s" in shown
    assert "nothing was heard" in shown
    assert "2 channels became one" in shown


def test_the_example_is_there_and_kept_sounds_are_named_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path))
    place = speech.example()
    assert place is not None
    kept = dropped.keep(place, "sound")
    assert kept == dropped.keep(place, "sound")
    assert kept.read_bytes() == place.read_bytes()
    assert any(value == whisper_tiny.NAME for _, value in speech.base_choices())
    assert speech.adapter_choices() == []


def test_a_job_that_runs_or_failed_shows_no_transcripts(tmp_path, monkeypatch):
    job = finished(tmp_path, transcripts=[], sound={"seconds": 1.0, "remarks": []})
    for status, active in (("running", True), ("failed", False)):
        now = replace(job, status=status, result=None, error="No sound.")
        monkeypatch.setattr(jobs, "get", lambda job_id, now=now: now)
        found = speech.follow("1", ())
        assert found[5] == ""
        assert found[3]["visible"] is active
        assert found[4]["visible"] is not active


def pictured(page: Any, name: str) -> None:
    """Keep a screenshot where ``ADAPTER_STUDIO_SHOTS`` says."""
    if place := os.environ.get("ADAPTER_STUDIO_SHOTS"):
        page.screenshot(path=f"{place}/{name}.png", full_page=True)


@pytest.mark.journey
@pytest.mark.browser
@pytest.mark.flaky(reruns=2)
@pytest.mark.parametrize("width", ["tab", "narrow_tab"])
def test_the_example_is_written_down(width: str, request: pytest.FixtureRequest) -> None:
    """With the real model, which is fetched on first use: a network is needed."""
    tab: Tab = request.getfixturevalue(width)
    page = tab.open("speech")
    pictured(page, f"speech-empty-{width}")
    page.click("#speech-start")
    page.wait_for_selector("text=There is no sound yet")
    page.click("#speech-example")
    page.wait_for_selector("#speech-said article", timeout=LONG)
    assert "red ball" in page.inner_text("#speech-said")
    assert "Words wrong" in page.inner_text("#speech-said")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    pictured(page, f"speech-example-{width}")
