"""Memory of the web app while pages are opened and closed, beside a bare Gradio app of the same version.

    python -m benchmarks.app_memory [--openings 500] [--write]

An opening does what a browser does: it loads the page and its configuration, opens the heartbeat connection and runs
every load event to its end; then it closes the connection. RSS of the server is read after a pause.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import gradio
import httpx
import psutil

RESULT = Path(__file__).parent / "results" / "app_memory.md"
STUDIO = "from ui.app import launch; launch(port={port})"
BARE = """
import gradio as gr
with gr.Blocks() as app:
    kept, box = gr.State(""), gr.Textbox()
    app.load(lambda: "hello", None, box)
app.launch(server_port={port}, quiet=True, ssr_mode=False)
"""
EVERY = 25


def open_page(url: str) -> None:
    """Open one page and close it again."""
    page = uuid.uuid4().hex[:10]
    with httpx.Client(base_url=url, timeout=60) as client:
        client.get("/", headers={"Accept": "text/html"}).raise_for_status()
        config = client.get("/config").raise_for_status().json()
        values = {part["id"]: part["props"].get("value") for part in config["components"]}
        loads = [event for event in config["dependencies"] if any(name == "load" for _, name in event["targets"])]
        with client.stream("GET", f"/gradio_api/heartbeat/{page}") as heartbeat:
            next(heartbeat.iter_bytes())
            for event in loads:
                given = [values.get(part) or "" for part in event["inputs"]]
                body = {"data": given, "fn_index": event["id"], "session_hash": page}
                client.post("/gradio_api/queue/join", json=body).raise_for_status()
            with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": page}) as messages:
                done = 0
                for line in messages.iter_lines():
                    done += '"msg":"process_completed"' in line.replace('": "', '":"')
                    if done == len(loads):
                        break


def measure(program: str, openings: int, say: Callable[[str], None]) -> list[tuple[int, float]]:
    """(openings so far, RSS in MiB) of a server that runs ``program``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tempfile.mkdtemp()
    environment = {**os.environ, "ADAPTER_STUDIO_HOME": home, "GRADIO_ANALYTICS_ENABLED": "False"}
    process = subprocess.Popen([sys.executable, "-c", program.format(port=port)], env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                httpx.get(url, timeout=2)
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        watched, found = psutil.Process(process.pid), []
        for number in range(openings + 1):
            if number:
                open_page(url)
            if number % EVERY == 0:
                time.sleep(1)
                found.append((number, watched.memory_info().rss / 2**20))
                say(f"{number}: {found[-1][1]:.0f} MiB")
        return found
    finally:
        process.terminate()
        process.wait(20)


def table(series: dict[str, list[tuple[int, float]]]) -> str:
    """Markdown: one row per sample."""
    names = list(series)
    rows = [f"| openings | {' | '.join(names)} |", f"|---:|{'---:|' * len(names)}"]
    for place, (number, _) in enumerate(series[names[0]]):
        rows.append(f"| {number} | {' | '.join(f'{series[name][place][1]:.0f}' for name in names)} |")
    return "\n".join(rows)


def growth(found: list[tuple[int, float]]) -> float:
    """Change from 50 openings to the last, in percent."""
    start = next(memory for number, memory in found if number >= 50)
    return 100 * (found[-1][1] / start - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--openings", type=int, default=500)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    series = {
        name: measure(program, chosen.openings, lambda text, name=name: print(name, text, flush=True))
        for name, program in (("Adapter Studio", STUDIO), ("bare Gradio", BARE))
    }
    shown = table(series)
    last = ", ".join(f"{name} {growth(found):+.1f} %" for name, found in series.items())
    print(f"{shown}\n\nFrom 50 openings to the last: {last}")
    if chosen.write:
        RESULT.write_text(
            f"# Memory of the app\n\nRSS of the server in MiB after pages were opened and closed one after the other "
            f"(`python -m benchmarks.app_memory --openings {chosen.openings} --write`), "
            f"Gradio {gradio.__version__}.\n\n"
            f"{shown}\n\nFrom 50 openings to the last: {last}.\n",
            encoding="utf-8",
        )
        RESULT.with_suffix(".json").write_text(json.dumps(series, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
