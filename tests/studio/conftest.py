"""A home folder of its own for every test, and no worker left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from studio.jobs import process, store
from tests.studio import fake_jobs  # registers its kinds

assert fake_jobs


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The studio's home folder, empty."""
    place = tmp_path / "home"
    for name in list(os.environ):
        if name.startswith("ADAPTER_STUDIO_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(place))
    monkeypatch.setenv("ADAPTER_STUDIO_PLUGINS", "tests.studio.fake_jobs")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield place
    if (place / "studio.db").exists():
        _end_workers()


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """No pipeline is loaded before and after the test."""
    from studio.composition import pipeline_cache

    pipeline_cache.release()
    yield
    pipeline_cache.release()


def _end_workers() -> None:
    """End the workers of this home, and those that this process started and that have not come to work yet."""
    found = [child for child in psutil.Process().children() if _is_worker(child)]
    known = {child.pid for child in found}
    found += [psutil.Process(row["pid"]) for row in store.workers() if process.alive(row) and row["pid"] not in known]
    for worker in found:
        worker.terminate()
    _, slow = psutil.wait_procs(found, timeout=5)
    for worker in slow:
        worker.kill()


def _is_worker(candidate: psutil.Process) -> bool:
    try:
        return "studio.jobs.worker" in candidate.cmdline()
    except psutil.Error:
        return False
