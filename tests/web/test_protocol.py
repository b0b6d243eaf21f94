"""Answers made below the routes, to raw bytes sent to the real server; and the sockets that it listens on."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys

import httpx2 as httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Message

from tests.conftest import ROOT, Server, environment, only_sqlite
from tests.databases import Place, free_port
from web import api, errors, middleware, operations

JSON = b"Content-Type: application/json\r\n"
LAST = b"Host: localhost\r\nConnection: close\r\n\r\n"
UPGRADE = b"Host: localhost\r\nConnection: Upgrade\r\nUpgrade: %b\r\n"
PATHS = "/api/v1/webhooks"


def connected(server: Server) -> socket.socket:
    return socket.create_connection((server.client.base_url.host, server.client.base_url.port or 80), timeout=20)


def exchanged(server: Server, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send these bytes, read until the server closes: the last answer's status, headers and body."""
    with connected(server) as sock:
        sock.sendall(request)
        received = b"".join(iter(lambda: sock.recv(65536), b""))
    received = received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


BROKEN = [
    (400, b"nonsense\r\n\r\n"),
    (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),  # a TLS client
    (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    (400, b"BREW /health HTTP/1.1\r\n" + LAST),
    (400, b"CONNECT example.com:443 HTTP/1.1\r\n" + LAST),
    (400, b"GET ?x HTTP/1.1\r\n" + LAST),
    (400, b"GET http://localhost HTTP/1.1\r\n" + LAST),
    (400, b"GET http://localhost:99999/health HTTP/1.1\r\n" + LAST),
    (400, b"GET /api/v1/webhooks/\xff\xfe HTTP/1.1\r\n" + LAST),
    (400, b"GET /api/v1/webhooks?team=\xff HTTP/1.1\r\n" + LAST),
    (400, b"POST /api/v1/webhooks HTTP/1.1\r\nContent-Length: x\r\n" + LAST),
    (400, b"POST /api/v1/webhooks HTTP/1.1\r\nContent-Length: -1\r\n" + LAST),
    (400, b"POST /api/v1/webhooks HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n" + LAST),
    (400, b"POST /api/v1/webhooks HTTP/1.1\r\n" + JSON + b"Transfer-Encoding: chunked\r\n" + LAST + b"zz\r\n{}"),
    (403, b"GET /api/v1/webhooks HTTP/1.1\r\nConnection: close\r\n\r\n"),
    (403, b"GET /api/v1/webhooks HTTP/1.1\r\nHost: \xff\xfe\r\nConnection: close\r\n\r\n"),
    (404, b"OPTIONS * HTTP/1.1\r\n" + LAST),
    (404, b"GET / HTTP/1.1\r\n" + LAST),
    (404, b"GET //evil.example/ HTTP/1.1\r\n" + LAST),
    (404, b"GET /api/v1/webhooks/%ff%fe%zz%0d%0a HTTP/1.1\r\n" + LAST),
    (404, b"GET /api/v1/webhooks/%00 HTTP/1.1\r\n" + LAST),
    (405, b"PROPFIND /health HTTP/1.1\r\n" + LAST),
    (405, b"CONNECT /health HTTP/1.1\r\n" + LAST),
    (405, b"TRACE /api/v1/webhooks HTTP/1.1\r\n" + LAST),
    (413, b"POST /api/v1/webhooks HTTP/1.1\r\n" + JSON + b"Content-Length: 999999999999999999\r\n" + LAST),
    (415, b"POST /api/v1/webhooks HTTP/1.1\r\nContent-Type: \xff\r\nContent-Length: 2\r\n" + LAST + b"{}"),
    (
        422,
        b"POST /api/v1/webhooks HTTP/1.1\r\n" + JSON + b"Expect: 100-continue\r\nContent-Length: 2\r\n" + LAST + b"{}",
    ),
    (200, b"GET http://localhost/health HTTP/1.1\r\n" + LAST),
    (200, b"GET /health HTTP/1.1\r\nX-Anything: \xff\xfe\r\n" + LAST),
    (200, b"GET /health HTTP/1.0\r\n\r\n"),
]


@only_sqlite
def test_every_answer_is_json_however_broken_the_request(server: Server) -> None:
    for expected, request in BROKEN:
        status, headers, body = exchanged(server, request)
        assert status == expected, request
        assert headers["content-type"] == "application/json", request
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store"), request
        assert status == 200 or set(json.loads(body)) == {"detail"}, request
    assert "Traceback" not in server.stop()


@only_sqlite
def test_no_answer_is_kept_or_sniffed(server: Server) -> None:
    webhook_id = server.register().json()["webhook_id"]
    cases = [("GET", "/health"), ("GET", "/ready"), ("GET", f"{PATHS}/list"), ("HEAD", "/nowhere"), ("PUT", PATHS)]
    for method, path in [*cases, ("POST", PATHS), ("DELETE", f"{PATHS}/{webhook_id}")]:
        headers = server.client.request(method, path).headers
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store"), path
        assert headers["content-type"] == "application/json"


@only_sqlite
def test_a_trailing_slash_is_a_404_and_no_empty_redirect(server: Server) -> None:
    for method in ("GET", "HEAD", "POST", "DELETE"):
        for path in (f"{PATHS}/", "/health/", "/api/v1/deliveries/1/cancel/", "//"):
            answer = server.client.request(method, path)
            assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json")
            assert method == "HEAD" or answer.json() == {"detail": "Not Found"}


@only_sqlite
def test_a_405_names_every_method_of_its_path(server: Server) -> None:
    paths = [route.path_format for route in [*api.routes, *operations.routes] if isinstance(route, Route)]
    assert len(paths) == len(set(paths))
    for path, allowed in [
        (PATHS, {"GET", "HEAD", "POST"}),
        (f"{PATHS}/x", {"GET", "HEAD", "PATCH", "DELETE"}),
        (f"{PATHS}/register", {"POST"}),
        ("/api/v1/events", {"GET", "HEAD", "POST"}),
        ("/ready", {"GET", "HEAD"}),
    ]:
        for method in ("PUT", "OPTIONS"):
            answer = server.client.request(method, path)
            assert (answer.status_code, answer.json()) == (405, {"detail": "Method Not Allowed"})
            assert set(answer.headers["allow"].split(", ")) == allowed


@only_sqlite
def test_an_upload_that_is_cut_leaves_no_traceback(server: Server) -> None:
    head = b"POST /api/v1/events HTTP/1.1\r\nHost: localhost\r\n" + JSON
    for cut in (b"Content-Length: 2000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", b"Content-Le"):
        for path in (b"/api/v1/events", b"/api/v1/webhooks/register"):
            with connected(server) as sock:
                sock.sendall(head.replace(b"/api/v1/events", path) + cut)
    assert server.client.get("/ready").status_code == 200
    printed = server.stop()
    assert "Traceback" not in printed
    assert "ERROR" not in printed


async def test_half_an_upload_when_the_service_stops_is_a_503() -> None:
    """uvicorn cancels what still runs after its time for shutting down; this is that, without the wait."""

    async def read(request: Request) -> Response:
        return Response(await request.body())

    app = Starlette(
        routes=[Route("/", read, methods=["POST"])],
        middleware=[Middleware(middleware.BodyLimit, max_body=9)],
        exception_handlers=errors.exception_handlers,
    )
    waits, sent = asyncio.Event(), list[Message]()

    async def receive() -> Message:
        waits.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
    request = asyncio.create_task(app(scope, receive, send))
    await waits.wait()
    request.cancel()
    await request
    assert sent[0]["status"] == 503
    assert "nothing was stored" in json.loads(sent[1]["body"])["detail"]


def test_what_nobody_expected_is_a_500_in_json() -> None:
    async def broken(request: Request) -> Response:
        raise RuntimeError("a secret of ours")

    app = Starlette(routes=[Route("/", broken)], exception_handlers=errors.exception_handlers)
    answer = TestClient(app, raise_server_exceptions=False).get("/")
    assert (answer.status_code, answer.json()) == (500, {"detail": "Internal server error"})
    assert (answer.headers["x-content-type-options"], answer.headers["cache-control"]) == ("nosniff", "no-store")


@only_sqlite
def test_trailers_behind_a_body_are_no_headers(server: Server) -> None:
    """They came to count as headers: a Host, an Origin or a key of idempotency that no proxy had seen."""
    body = b'{"event_type": "a", "data": {}}'
    head = b"POST /api/v1/events HTTP/1.1\r\n" + JSON + b"Transfer-Encoding: chunked\r\n" + LAST
    trailers = b"Host: evil.example\r\nwebhook-signature: v1,x\r\nIdempotency-Key: k\r\n\r\n"
    for _ in range(2):
        status, _, answer = exchanged(server, head + b"%x\r\n%b\r\n0\r\n" % (len(body), body) + trailers)
        assert (status, json.loads(answer)["duplicate"]) == (202, False)


@only_sqlite
def test_what_was_stored_is_not_answered_400_for_what_came_behind_it(server: Server) -> None:
    body = b'{"event_type": "a", "data": {}}'
    head = b"POST /api/v1/events HTTP/1.1\r\nHost: localhost\r\n" + JSON
    for behind in (b"nonsense\r\n\r\n", b"GET ?x HTTP/1.1\r\n" + LAST):
        status, headers, _ = exchanged(server, head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body) + behind)
        assert (status, headers["connection"]) == (202, "close")
    assert len(server.client.get("/api/v1/events").json()["data"]) == 2


@only_sqlite
def test_a_websocket_handshake_is_refused_in_json(server: Server) -> None:
    for path in (b"/health", b"/api/v1/events", b"/ws"):
        handshake = b"GET " + path + b" HTTP/1.1\r\n" + UPGRADE % b"websocket"
        key = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        status, headers, body = exchanged(server, handshake + key)
        assert (status, headers["content-type"]) == (400, "application/json")
        assert "Upgrade" in json.loads(body)["detail"]
    assert "Traceback" not in server.stop()


@only_sqlite
def test_a_client_that_asks_for_http_2_loses_no_body_unsaid(server: Server) -> None:
    """The parser drops what follows an upgrade: the body of a POST was missing, and the answer a 422."""
    get = b"GET /health HTTP/1.1\r\nConnection: close\r\n" + UPGRADE % b"h2c"
    assert exchanged(server, get + b"\r\n")[0] == 200
    post = b"POST /api/v1/events HTTP/1.1\r\n" + UPGRADE % b"h2c" + JSON
    for body in (b"Content-Length: 2\r\n\r\n{}", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"):
        status, _, answer = exchanged(server, post + body)
        assert (status, "Upgrade" in json.loads(answer)["detail"]) == (400, True)
    assert "pip install" not in server.stop()


@only_sqlite
def test_serves_on_is_printed_once_the_port_is_bound(place: Place) -> None:
    env = environment(DATABASE_URL=place.url, PORT="0")
    command = [sys.executable, str(ROOT / "app.py")]
    process = subprocess.Popen(
        command, env=env, cwd=place.folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout
        url = process.stdout.readline().removeprefix("Hookline serves on ").strip()
        assert url.startswith("http://127.0.0.1:") and not url.endswith(":0")
        assert httpx.get(f"{url}/ready").status_code == 200
    finally:
        process.terminate()
        process.communicate(timeout=20)


@only_sqlite
def test_the_service_serves_though_nobody_reads_its_output(place: Place) -> None:
    port = free_port()
    reader, writer = os.pipe()
    os.close(reader)
    env = environment(DATABASE_URL=place.url, PORT=str(port))
    command = [sys.executable, str(ROOT / "app.py")]
    process = subprocess.Popen(command, env=env, cwd=place.folder, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    try:
        assert process.stderr
        assert any("Application startup complete" in line for line in process.stderr)
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    finally:
        process.terminate()
        assert "Traceback" not in process.communicate(timeout=20)[1]


@only_sqlite
def test_a_port_in_use_is_one_line_and_not_said_to_be_served(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused = started(place, PORT=str(port))
    assert refused == (1, "", f"Hookline cannot start: port {port} on 127.0.0.1 is in use\n")


@only_sqlite
def test_a_host_that_is_not_ours_is_one_line_that_names_it(place: Place) -> None:
    for host in ("203.0.113.9", "nowhere.invalid", "db..example", "a" * 64):
        status, printed, said = started(place, HOST=host)
        assert (status, printed, said.count("\n")) == (1, "", 1)
        assert said.startswith("Hookline cannot start: ") and host in said


def started(place: Place, **settings: str) -> tuple[int, str, str]:
    """Status, output and errors of a service that ends by itself."""
    env = environment(DATABASE_URL=place.url, **settings)
    command = [sys.executable, str(ROOT / "app.py")]
    done = subprocess.run(command, env=env, cwd=place.folder, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr
