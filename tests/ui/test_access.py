"""Who gets in: names, origins, passwords, the paths of a proxy."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlencode, urlsplit

import pytest
from PIL import Image

from adapters.errors import InputError
from tests.ui.conftest import Server, Tab, environment, free_port, serve, tab_of
from ui import access, address

PASSWORD = "open sesame"
FORM = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\npicture\r\n--x--\r\n'
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}


def ask(server: Server, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower case) and body of a request with headers of one's own (``Sec_Fetch`` = ``Sec-Fetch``)."""
    place = urlsplit(server.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content


def upload(server: Server, path: str = "/gradio_api/upload", **headers: str) -> int:
    return ask(server, "POST", path, FORM, Content_Type=MULTIPART["Content-Type"], **headers)[0]


def sign_in(server: Server, password: str) -> tuple[int, str]:
    """Status of a sign-in and the cookie that came with it."""
    form = urlencode({"username": "anyone", "password": password}).encode()
    status, headers, _ = ask(server, "POST", "/login", form, Content_Type="application/x-www-form-urlencoded")
    return status, headers.get("set-cookie", "").split(";")[0]


# ------------------------------------------------------------------------------------------------ names and origins


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:{port}", "127.0.0.1:{port}", "[::1]:{port}", "localhost."])
def test_names_of_this_computer_are_answered(server: Server, host: str) -> None:
    port = urlsplit(server.url).port
    assert ask(server, "GET", "/config", Host=host.format(port=port))[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7860", "192.0.2.7", "", "a@localhost"]
)
def test_foreign_names_are_refused(server: Server, host: str) -> None:
    status, _, body = ask(server, "GET", "/config", Host=host)
    assert status in (400, 403)  # 400: a header that is none at all
    assert b"components" not in body


def test_the_refusal_says_what_to_do(server: Server) -> None:
    body = ask(server, "GET", "/", Host="studio.example:80")[2].decode()
    assert "--allow-host studio.example" in body


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1", "https://127.0.0.1:{port}.evil.example"]
)  # fmt: skip
def test_pages_of_others_may_not_upload(server: Server, origin: str) -> None:
    port = urlsplit(server.url).port
    assert upload(server, Origin=origin.format(port=port)) == 403
    assert ask(server, "GET", "/config", Origin=origin.format(port=port))[0] == 403


def test_the_apps_own_page_may_upload(server: Server) -> None:
    assert upload(server, Origin=server.url.rstrip("/")) == 200
    assert upload(server) == 200  # not a browser


@pytest.mark.parametrize(
    ("host", "further", "asked", "answered"),
    [
        ("127.0.0.1", (), "studio.example", False),
        ("127.0.0.1", ("studio.example",), "studio.example:8443", True),
        ("127.0.0.1", ("studio.example",), "a.studio.example", False),
        ("127.0.0.1", ("*.example",), "a.b.example", True),
        ("127.0.0.1", ("*.example",), "example", False),
        ("0.0.0.0", (), "192.0.2.7:7860", True),
        ("::", (), "[2001:db8::7]:7860", True),
        ("0.0.0.0", (), "evil.example", False),
        ("0.0.0.0", (), socket.gethostname(), True),
        ("[::1]", (), "[::1]:7860", True),
        ("::1", (), "192.0.2.7", False),
        ("gpu.lan", (), "gpu.lan:7860", True),
    ],
)
def test_which_names_are_ours(host: str, further: tuple[str, ...], asked: str, answered: bool) -> None:
    assert address.names(host, further).answer(asked) is answered


def test_a_proxy_that_keeps_its_own_name_to_itself() -> None:
    behind = address.names("127.0.0.1", (), "https://studio.example/ai")
    assert behind.may_send("https://studio.example", "127.0.0.1:7860")
    assert not behind.may_send("https://other.example", "127.0.0.1:7860")


@pytest.mark.parametrize("given", ["*", "*.*", "", "https://a.example", "a b/c", "*.a/b"])
def test_odd_names_are_refused_at_the_start(given: str) -> None:
    with pytest.raises(InputError, match="--allow-host"):
        address.names("127.0.0.1", [given])


# ------------------------------------------------------------------------------------------------ passwords


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from serve(tmp_path_factory.mktemp("guarded"), password=PASSWORD)


def test_everything_behind_the_page_needs_the_password(guarded: Server) -> None:
    body, kind = json.dumps({"session_hash": "a", "fn_index": 0, "event_id": "b"}).encode(), "application/json"
    paths = ["cancel", "reset", "queue/join", "upload", "stream/a", "stream/a/close", "component_server", "run/a"]
    asked = {path: ask(guarded, "POST", f"/gradio_api/{path}", body, Content_Type=kind)[0] for path in paths}
    assert set(asked.values()) == {401}, asked
    paths = ["heartbeat/a", "info", "queue/data", "file=/a"]
    got = {path: ask(guarded, "GET", f"/gradio_api/{path}")[0] for path in paths}
    assert set(got.values()) == {401}, got
    cookie = sign_in(guarded, PASSWORD)[1]
    for path in ("cancel", "reset"):
        assert ask(guarded, "POST", f"/gradio_api/{path}", body, Content_Type=kind, Cookie=cookie)[0] == 200, path


def test_wrong_passwords_do_not_stop_the_others(guarded: Server) -> None:
    cookie = sign_in(guarded, PASSWORD)[1]
    with ThreadPoolExecutor(40) as pool:
        guesses = [pool.submit(sign_in, guarded, f"guess {number}") for number in range(40)]
        time.sleep(0.2)
        started = time.monotonic()
        assert ask(guarded, "GET", "/config", Cookie=cookie)[0] == 200
        waited = time.monotonic() - started
        statuses = sorted(guess.result()[0] for guess in guesses)
    assert waited < 2
    assert statuses.count(400) <= 5 + 12  # at once, and while the rest is held back
    assert statuses.count(429) == 40 - statuses.count(400)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_pace_of_attempts() -> None:
    clock = Clock()
    attempts = access.Attempts(patience=3, clock=clock)
    assert [attempts.wait("a") for _ in range(9)] == [0, 0, 0, 0, 0, 1, 2, 3, None]
    assert attempts.wait("b") == 0  # others have their own
    clock.now += 1
    assert [attempts.wait("a"), attempts.wait("a")] == [3, None]
    clock.now += 1000
    assert [attempts.wait("a") for _ in range(6)] == [0, 0, 0, 0, 0, 1]


def test_right_passwords_do_not_count() -> None:
    attempts = access.Attempts(clock=Clock())
    for _ in range(100):
        assert attempts.wait("a") == 0
        attempts.give_back("a")


def test_many_addresses_do_not_help_a_guesser() -> None:
    attempts = access.Attempts(patience=1, clock=Clock())
    allowed = [number for number in range(5000) if attempts.wait(f"address {number}") is not None]
    assert len(allowed) == 50 + 10


def test_the_table_of_addresses_stays_small() -> None:
    clock = Clock()
    pace = access.Pace(1, 5, clock)
    for number in range(5000):
        clock.now += 0.5
        pace.count(f"address {number}")
    assert len(pace.due) <= 1001


def test_a_household_of_ipv6_is_one_client() -> None:
    one, same, other = ({"client": (f"2001:db8:0:{net}::{host}", 1)} for net, host in ((1, 1), (1, 2), (2, 1)))
    assert access._client(one) == access._client(same) != access._client(other)


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("name", "disposition"),
    [("page.html", "attachment"), ("page.xhtml", "attachment"), ("drawing.svg", "attachment"),
     ("feed.xml", "attachment"), ("program.js", "attachment"), ("picture.png", "inline"), ("log.txt", "inline"),
     ("recipe.json", "inline")],
)  # fmt: skip
@pytest.mark.parametrize("part", ["", "bytes=0-3"])
def test_files_that_could_run_are_saved(server: Server, name: str, disposition: str, part: str) -> None:
    file = server.home / "jobs" / "odd" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("<script>alert(1)</script>")
    status, headers, _ = ask(server, "GET", f"/gradio_api/file={file}", **({"Range": part} if part else {}))
    assert status in (200, 206)
    assert headers["content-disposition"].split(";")[0] == disposition
    assert headers["x-content-type-options"] == "nosniff"


# ------------------------------------------------------------------------------------------------ IPv6 and proxies


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_the_loopback_of_ipv6(tmp_path: Path, host: str) -> None:
    port, log = free_port(), tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "studio", "ui", "--host", host, "--port", str(port)], env=environment(tmp_path),
            stdout=stream, stderr=stream,
        )  # fmt: skip
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(f"http://[::1]:{port}/", timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(log.read_text())
        assert f"http://[::1]:{port} " in log.read_text()
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("given", ["studio", "//evil.example", "ftp://a", "/a?b=c", "https://"])
def test_odd_root_paths_are_refused(given: str) -> None:
    with pytest.raises(InputError, match="--root-path"):
        address.check_root_path(given)


class Proxy(BaseHTTPRequestHandler):
    """A reverse proxy that serves the app below /studio and, like most, gives it its own address as Host."""

    protocol_version = "HTTP/1.1"
    target = 0
    strips = True
    lost: ClassVar[list[str]] = []
    """Addresses that left the part of the site which is ours."""

    def forward(self) -> None:
        if not self.path.startswith("/studio"):
            if self.path != "/favicon.ico":  # which browsers ask for by themselves
                self.lost.append(self.path)
            self.send_response(204)
            self.end_headers()
            return
        path = self.path.removeprefix("/studio") or "/" if self.strips else self.path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        inner = http.client.HTTPConnection("127.0.0.1", self.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        inner.request(self.command, path, body, headers)
        answer = inner.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            while piece := answer.read1(65536):
                self.wfile.write(piece)
                self.wfile.flush()
        except OSError:
            pass
        self.close_connection = True
        inner.close()

    do_GET = do_POST = do_HEAD = forward

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(params=["stripped", "whole", "address"])
def behind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """The app below /studio of a proxy, as the browser sees it."""
    own: type[Proxy] = type("Own", (Proxy,), {"strips": request.param != "whole", "lost": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), own) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        outer = f"http://localhost:{proxy.server_port}/studio"
        root = outer if request.param == "address" else "/studio"
        hosts = [] if request.param == "address" else ["localhost"]
        for inner in serve(tmp_path, root_path=root, allow_hosts=hosts):
            own.target = urlsplit(inner.url).port or 0
            yield Server(f"{outer}/", inner.home)
        proxy.shutdown()
    assert own.lost == []


def test_pictures_and_uploads_below_a_path(behind: Server) -> None:
    file = behind.home / "jobs" / "one" / "picture.png"
    file.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8), "teal").save(file)
    with urllib.request.urlopen(f"{behind.url}config", timeout=60) as answer:
        assert json.load(answer)["root"].endswith("/studio")
    assert ask(behind, "GET", f"/studio/gradio_api/file={file}")[2] == file.read_bytes()
    origin = behind.url.removesuffix("/studio/")
    assert upload(behind, "/studio/gradio_api/upload", Origin=origin) == 200
    assert upload(behind, "/studio/gradio_api/upload", Origin="http://evil.example") == 403


def test_the_page_works_below_a_path(behind: Server, browser: Any, tmp_path: Path) -> None:
    picture = tmp_path / "dropped.png"
    Image.new("RGB", (64, 64), "teal").save(picture)
    for tab in tab_of(browser, behind, 1280):
        dropped(tab, picture)


def dropped(tab: Tab, picture: Path) -> None:
    """Drop a picture on Train and see its thumbnail."""
    page = tab.open("train")
    page.set_input_files("#train-drop input[type=file]", str(picture))
    page.wait_for_function(f"() => [...document.querySelectorAll('img')].some({_THUMBNAIL})")


_THUMBNAIL = "picture => picture.src.includes('thumbnails') && picture.naturalWidth"


def test_the_middleware_passes_other_kinds_on() -> None:
    seen = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        seen.append(scope["type"])

    guard = access.Access(app, address.names("127.0.0.1"))
    with pytest.raises(StopIteration):  # done without waiting for anything
        guard({"type": "lifespan"}, None, None).send(None)  # type: ignore[arg-type]
    assert seen == ["lifespan"]
