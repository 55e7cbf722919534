"""What the app hands out, to whom, and what it refuses."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.errors import InputError
from tests.ui.conftest import ROOT, Server, environment, free_port, serve
from ui import app

SMALL, LARGE = 10_000, 60_000


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from serve(tmp_path_factory.mktemp("guarded"), password="open sesame", max_upload="50kb")


def sign_in(server: Server, password: str) -> tuple[int, str]:
    """Status of a sign-in, and the cookie that came with it."""
    form = urllib.parse.urlencode({"username": "anyone", "password": password}).encode()
    try:
        with urllib.request.urlopen(server.url + "login", data=form, timeout=30) as answer:
            cookies = answer.headers.get_all("Set-Cookie") or []
            return answer.status, "; ".join(cookie.split(";")[0] for cookie in cookies)
    except urllib.error.HTTPError as error:
        return error.code, ""


def upload(server: Server, cookie: str, size: int) -> int:
    """Status of an upload of ``size`` bytes."""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    request = urllib.request.Request(
        server.url + "gradio_api/upload", data=head + bytes(size) + b"\r\n--x--\r\n",
        headers={"Content-Type": "multipart/form-data; boundary=x", "Cookie": cookie},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_only_the_studios_own_folders_are_served(server: Server) -> None:
    (server.home / "settings.yaml").write_text("{}\n")
    job = server.home / "jobs" / "a-job"
    job.mkdir(parents=True)
    (job / "picture-1.png").write_bytes(b"picture")
    (job / "escape.txt").symlink_to("/etc/passwd")
    (server.home / "jobs-secret.txt").write_text("secret")
    assert server.status(f"gradio_api/file={job / 'picture-1.png'}") == 200
    refused = ["/etc/passwd", f"{job}/../../settings.yaml", server.home / "settings.yaml", server.home / "studio.db",
               server.home / "jobs-secret.txt", ROOT / "pyproject.toml", job / "escape.txt",
               f"{job}/%2e%2e/%2e%2e/settings.yaml"]  # fmt: skip
    assert {str(path): server.status(f"gradio_api/file={path}") for path in refused} == {
        str(path): 403 for path in refused
    }


def test_without_the_password_nothing_opens(guarded: Server) -> None:
    assert guarded.status("config") == 401
    assert guarded.status("gradio_api/file=/etc/passwd") in (401, 403)
    assert sign_in(guarded, "wrong")[0] == 400


def test_uploads_are_limited(guarded: Server) -> None:
    status, cookie = sign_in(guarded, "open sesame")
    assert status == 200
    assert upload(guarded, "", SMALL) == 401
    assert upload(guarded, cookie, SMALL) == 200
    assert upload(guarded, cookie, LARGE) == 413


def test_no_handler_can_be_called_by_name(server: Server) -> None:
    with urllib.request.urlopen(server.url + "gradio_api/info", timeout=20) as answer:
        described = json.load(answer)
    assert described["named_endpoints"] == {}


def test_a_taken_port_is_one_sentence() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"Port {port} is taken"):
            app.check_address("127.0.0.1", port)


def test_a_strange_address_is_one_sentence() -> None:
    with pytest.raises(InputError, match="not an address of this computer"):
        app.check_address("203.0.113.7", free_port())


@pytest.mark.parametrize("open_to", [{"host": "0.0.0.0"}, {"share": True}])
def test_others_need_a_password(open_to: dict[str, object]) -> None:
    with pytest.raises(InputError, match="password"):
        app.launch(port=free_port(), **open_to)  # type: ignore[arg-type]


def test_the_web_process_loads_no_torch(tmp_path: Path) -> None:
    program = (
        "import importlib, sys, ui.app; ui.app.build(); from studio.jobs import kinds; "
        "[importlib.import_module(kind.ready.partition(':')[0]) for kind in kinds._KINDS.values() if kind.ready]; "
        "heavy = ('torch', 'diffusers', 'transformers', 'peft', 'pipelines.diffusion.pipeline'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(tmp_path), capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert done.stdout.strip() == "[]"
