"""Events that show no progress change no component's status: the browser would look up every one of them again."""

from __future__ import annotations

from ui.app import build


def test_events_without_visible_progress_leave_the_components_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path))
    silent = [event for event in build().fns.values() if event.show_progress == "hidden"]
    assert silent
    assert not [event.name for event in silent if event.show_progress_on != []]
