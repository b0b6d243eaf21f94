"""Endpoints that misbehave in every way, beside a healthy one: recorded in words, and nobody else waits for them."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Server
from tests.receiver import Receiver

Serve = Callable[..., Server]
Behaviour = Callable[[socket.socket], None]
SETTINGS = {"ALLOWED_NETWORKS": "127.0.0.0/8", "DELIVERY_TIMEOUT": "1s", "RETRY_SCHEDULE": "200ms"}


def hang(connection: socket.socket) -> None:
    connection.recv(65536)
    time.sleep(3)


def reset(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def drip(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(30):
        connection.sendall(b"x")
        time.sleep(0.1)


def garbage(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"\x00\xff what is HTTP?\r\n\r\n")


def flood(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 500 Oops\r\nContent-Length: 50000000\r\n\r\n")
    for _ in range(500):
        connection.sendall(b"x" * 100_000)


def close(connection: socket.socket) -> None:
    connection.recv(65536)


def redirect(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/\r\nContent-Length: 0\r\n\r\n")


@contextmanager
def listening(behave: Behaviour) -> Iterator[int]:
    """A server on loopback that treats each connection like that, and then closes it; gives its port."""
    server = socket.create_server(("127.0.0.1", 0))

    def treat(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # the other side had enough
            behave(connection)

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=treat, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield server.getsockname()[1]
    finally:
        server.close()


def outcome(server: Server, receiver: Receiver, url: str) -> dict[str, Any]:
    """Deliver one event to the healthy receiver and to this URL; returns the latter's delivery once it has ended."""
    server.register(url=f"{receiver.url}/healthy", team=None)
    bad = server.register(url=url, team=None).json()["webhook_id"]
    server.client.post("/api/v1/events", json={"event_type": "game_started", "data": {}})
    receiver.wait_for(1, "/healthy")
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        (delivery,) = server.client.get("/api/v1/deliveries", params={"webhook_id": bad}).json()["data"]
        if delivery["status"] != "pending":
            return dict(server.client.get(f"/api/v1/deliveries/{delivery['delivery_id']}").json())
        time.sleep(0.05)
    raise AssertionError("the delivery is still pending")


def resident(server: Server) -> int:
    """kB."""
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("there is no /proc to read the memory of the server from")
    return int(status.read_text().partition("VmRSS:")[2].split()[0])


@pytest.mark.parametrize(
    ("behave", "named"),
    [
        (hang, "timed out after 1 s"),
        (reset, "reset the connection"),
        (drip, "timed out after 1 s"),
        (garbage, "not HTTP"),
        (flood, "answered 500"),
        (close, "closed the connection without an answer"),
        (redirect, "answered 302: redirects are not followed"),
    ],
)
def test_an_endpoint_that_misbehaves_fails_in_words_and_alone(
    serve: Serve, receiver: Receiver, behave: Behaviour, named: str
) -> None:
    server = serve(**SETTINGS)
    before = resident(server)
    with listening(behave) as port:
        delivery = outcome(server, receiver, f"http://127.0.0.1:{port}/")
    assert (delivery["status"], delivery["attempts"]) == ("failed", 2)
    assert all(named in attempt["error"] for attempt in delivery["attempt_log"]), delivery["attempt_log"]
    assert all(len(attempt["response"] or "") <= 1024 for attempt in delivery["attempt_log"])
    assert server.client.get("/ready").status_code == 200
    assert resident(server) - before < 30_000


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("http://127.0.0.1:9/", "connection refused"),
        ("http://10.1.2.3/", "10.1.2.3 is not a public address"),
    ],
)
def test_an_endpoint_that_is_not_there_fails_in_words(serve: Serve, receiver: Receiver, url: str, named: str) -> None:
    delivery = outcome(serve(**{**SETTINGS, "DELIVERY_TIMEOUT": "5s"}), receiver, url)
    assert (delivery["status"], delivery["attempts"]) == ("failed", 2)
    assert named in delivery["reason"]


def test_a_certificate_that_nobody_vouches_for_is_refused(serve: Serve, receiver: Receiver, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command to make a certificate with")
    certificate = tmp_path / "own.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", certificate, "-out", f"{certificate}.crt"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{certificate}.crt", certificate)

    def greet(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            secured.recv(65536)

    with listening(greet) as port:
        delivery = outcome(serve(**SETTINGS), receiver, f"https://127.0.0.1:{port}/")
    assert delivery["status"] == "failed"
    assert delivery["reason"].startswith("TLS failed: ")
