"""A real server with a home folder of its own, and a real browser."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

import assets

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Server:
    """The app, running."""

    url: str
    home: Path

    def status(self, path: str) -> int:
        """HTTP status of a plain request."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=20) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


def lora(path: Path, trigger: str, seed: int, rank: int = 4) -> Path:
    """A small adapter that fits the embedded base, in diffusers' format."""
    base = assets.path("models/tinymoji")
    weights = next(iter(sorted((base / "unet").glob("*.safetensors"))))
    random = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    with safe_open(weights, framework="numpy") as file:
        for key in file.keys():  # noqa: SIM118
            if key.endswith((".attn2.to_q.weight", ".attn2.to_v.weight")):
                rows, columns = file.get_slice(key).get_shape()
                name = "unet." + key.removesuffix(".weight")
                tensors[f"{name}.lora_A.weight"] = random.normal(0, 0.1, (rank, columns)).astype("float32")
                tensors[f"{name}.lora_B.weight"] = random.normal(0, 0.1, (rows, rank)).astype("float32")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"adapter-studio": json.dumps({"config": {"trigger": trigger, "rank": rank}})})
    return path


def environment(home: Path) -> dict[str, str]:
    """What the server and its workers see."""
    return {**os.environ, "ADAPTER_STUDIO_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1"}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(home: Path, **options: Any) -> Iterator[Server]:
    """Run the app in a process of its own until the fixture ends."""
    port = free_port()
    program = f"from ui.app import launch; launch(port={port}, **{options!r})"
    with open(home / "server.log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-c", program], env=environment(home), cwd=home, stdout=log,
                                   stderr=log)  # fmt: skip
        server = Server(f"http://127.0.0.1:{port}/", home)
        try:
            wait_for(server, process, home / "server.log")
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)
            end_workers(home)


def wait_for(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the app answers; fails with its output when it ends instead."""
    for _ in range(1200):
        if process.poll() is not None:
            pytest.fail(log.read_text())
        try:
            urllib.request.urlopen(server.url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail("the app did not start within two minutes")


def end_workers(home: Path) -> None:
    """End the worker processes that the jobs of this home have started."""
    program = "from studio.jobs import process, worker; [process.kill(row) for row in worker.running()]"
    subprocess.run([sys.executable, "-c", program], env=environment(home), check=False)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    for number, (name, word) in enumerate([("robot", "rbt robot"), ("chalk", "in chalk style")]):
        lora(home / "library" / "adapters" / f"{name}.safetensors", word, number)
        Image.new("RGB", (64, 64), (90 + 90 * number, 120, 160)).save(home / "library" / "adapters" / f"{name}.png")
    yield from serve(home)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip("chromium is not installed (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES, headless=True)
        yield running
        running.close()


@dataclass
class Tab:
    """A browser tab that remembers what went wrong in it."""

    page: Any
    server: Server
    errors: list[str]

    def open(self, view: str = "compose") -> Any:
        """Show a page of the app and wait until it is ready."""
        self.visit(f"{self.server.url}{view}")
        self.page.wait_for_selector("#generate", state="attached")
        self.page.wait_for_selector(f"#nav a[data-page={view}][aria-current]", state="attached")
        return self.page

    def visit(self, address: str) -> None:
        """Load an address, as typed by hand."""
        self.leave()
        self.page.goto(address)

    def reload(self) -> None:
        """Load the same address again."""
        self.visit(self.page.url)

    def leave(self) -> None:
        """Go to an empty page; that requests under way are cut off by that is no error of the app."""
        seen = len(self.errors)
        self.page.goto("about:blank")
        del self.errors[seen:]


def tab_of(browser: Any, server: Server, width: int) -> Iterator[Tab]:
    context = browser.new_context(viewport={"width": width, "height": 860})
    page = context.new_page()
    page.set_default_timeout(60_000)
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield Tab(page, server, errors)
    context.close()
    assert not errors, f"errors in the browser's console: {errors}"


@pytest.fixture
def tab(browser: Any, server: Server) -> Iterator[Tab]:
    yield from tab_of(browser, server, 1280)


@pytest.fixture
def narrow_tab(browser: Any, server: Server) -> Iterator[Tab]:
    yield from tab_of(browser, server, 390)
