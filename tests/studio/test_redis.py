"""The queue on a real Redis server, where one is installed."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from adapters.errors import InputError
from studio import jobs
from studio.jobs import queue
from tests.studio.waiting import ended

pytest.importorskip("redis", reason="the extra 'redis' is not installed")


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[str]:
    """The address of a server of its own."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = subprocess.Popen([program, "--port", str(port), "--save", "", "--dir", str(tmp_path)],
                               stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        address = f"redis://127.0.0.1:{port}/0"
        monkeypatch.setenv("ADAPTER_STUDIO_QUEUE_URL", address)
        yield address
    finally:
        started.terminate()
        started.wait()


def test_jobs_travel_over_redis(server):
    ids = [jobs.submit("count", {"to": 2}) for _ in range(2)]
    assert queue.waiting("cpu") == ids
    jobs.ensure_worker()
    assert [job.status for job in ended(*ids)] == ["done", "done"]


def test_no_server_is_one_sentence(monkeypatch):
    monkeypatch.setenv("ADAPTER_STUDIO_QUEUE_URL", "redis://127.0.0.1:1/0")
    with pytest.raises(InputError, match=r"No Redis server answers at redis://127\.0\.0\.1:1/0"):
        jobs.submit("count", {})
