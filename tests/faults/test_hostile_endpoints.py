"""Endpoints that misbehave in every way, beside a healthy one: recorded in words, and nobody else waits for them."""

from __future__ import annotations

import contextlib
import itertools
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

from tests import databases
from tests.conftest import Server, running
from tests.receiver import Receiver
from tests.working import wait_until

Behaviour = Callable[[socket.socket], None]
SETTINGS = {"ALLOWED_NETWORKS": "127.0.0.0/8", "DELIVERY_TIMEOUT": "1s", "RETRY_SCHEDULE": "200ms"}
MOST_GROWTH = 30_000  # kB
numbers = itertools.count()


@pytest.fixture(scope="module", params=databases.BACKENDS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all, so that what an endpoint did to it would show in the tests after it."""
    if reason := databases.why_not(request.param):
        pytest.skip(reason)
    with (
        databases.migrated(request.param, tmp_path_factory.mktemp("hostile")) as place,
        running(place, **SETTINGS) as started,
    ):
        yield started


def hang(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.recv(65536)  # until the sender goes


def reset(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def drip(connection: socket.socket) -> None:
    connection.recv(65536)
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 500:  # the head takes half a second
        connection.sendall(bytes([byte]))
        time.sleep(0.01)


def garbage(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"\x00\xff what is HTTP?\r\n\r\n")


def flood(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 500 Oops\r\nContent-Length: 50000000\r\n\r\n")
    send_50_mb(connection)


def flood_of_unknown_length(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 500 Oops\r\n\r\n")
    send_50_mb(connection)


def flood_of_one_header(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
    send_50_mb(connection)


def flood_of_headers(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1_000_000)


def flood_of_interim_answers(connection: socket.socket) -> None:
    connection.recv(65536)
    for _ in range(1000):
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000)


def switch(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n")


def send_50_mb(connection: socket.socket) -> None:
    for _ in range(500):
        connection.sendall(b"x" * 100_000)


def close(connection: socket.socket) -> None:
    connection.recv(65536)


def cut_off(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nThat is")


def redirect(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/\r\nContent-Length: 0\r\n\r\n")


@contextmanager
def listening(behave: Behaviour) -> Iterator[int]:
    """A server on loopback that treats each connection like that, and then closes it; gives its port."""
    server = socket.create_server(("127.0.0.1", 0))

    def treat(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # the other side had enough
            connection.settimeout(10)
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
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        server.close()


def check_failure(server: Server, receiver: Receiver, url: str, named: str) -> dict[str, Any]:
    """Deliver one event to the healthy receiver and to this URL: the former gets it, the latter fails twice in words.

    Returns the latter's delivery.
    """
    event_type = f"hostile_{next(numbers)}"
    assert server.register(url=f"{receiver.url}/healthy", events=[event_type], team=None).status_code == 201
    bad = server.register(url=url, events=[event_type], team=None).json()["webhook_id"]
    before = memory(server, "VmRSS")
    answer = server.client.post("/api/v1/events", json={"event_type": event_type, "data": {}})
    assert (answer.status_code, answer.json()["deliveries"]) == (202, 2)
    (healthy,) = receiver.wait_for(1, "/healthy", timeout=5)
    assert healthy.event_id == answer.json()["event_id"]
    delivery = ended(server, bad)
    assert (delivery["status"], delivery["attempts"]) == ("failed", 2)
    assert [attempt["number"] for attempt in delivery["attempt_log"]] == [1, 2]
    assert all(named in attempt["error"] for attempt in delivery["attempt_log"]), delivery["attempt_log"]
    assert all(len(attempt["response"] or "") <= 1024 for attempt in delivery["attempt_log"])
    assert named in delivery["reason"]
    assert len(receiver.at("/healthy")) == 1
    assert server.process.poll() is None
    assert server.client.get("/ready").status_code == 200
    assert memory(server, "VmHWM") - before < MOST_GROWTH  # at its highest
    return delivery


def ended(server: Server, webhook_id: str) -> dict[str, Any]:
    """The one delivery to this webhook, with its log, once it is not pending any more."""

    def not_pending() -> dict[str, Any] | None:
        (listed,) = server.client.get("/api/v1/deliveries", params={"webhook_id": webhook_id}).json()["data"]
        return listed if listed["status"] != "pending" else None

    listed = wait_until(not_pending, 15)
    return dict(server.client.get(f"/api/v1/deliveries/{listed['delivery_id']}").json())


def memory(server: Server, field: str) -> int:
    """kB; nothing where there is no /proc to read it from."""
    status = Path(f"/proc/{server.process.pid}/status")
    return int(status.read_text().partition(f"{field}:")[2].split()[0]) if status.exists() else 0


@pytest.mark.parametrize(
    ("behave", "named"),
    [
        (hang, "timed out after 1 s"),
        (reset, "reset the connection"),
        (drip, "timed out after 1 s"),
        (garbage, "not HTTP"),
        (flood, "answered 500"),
        (flood_of_unknown_length, "answered 500"),
        (flood_of_headers, "more than 200 headers"),
        (flood_of_one_header, "longer than 64 KiB"),
        (flood_of_interim_answers, "more than 8 interim answers"),
        (switch, "answered 101"),
        (close, "closed the connection without an answer"),
        (cut_off, "cut off"),
        (redirect, "answered 302: redirects are not followed"),
    ],
)
def test_an_endpoint_that_misbehaves_fails_in_words_and_alone(
    server: Server, receiver: Receiver, behave: Behaviour, named: str
) -> None:
    with listening(behave) as port:
        check_failure(server, receiver, f"http://127.0.0.1:{port}/", named)


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("http://10.1.2.3/", "10.1.2.3 is not a public address"),
        ("http://nothing.invalid/", "DNS lookup failed"),
    ],
)
def test_an_endpoint_that_is_not_there_fails_in_words(server: Server, receiver: Receiver, url: str, named: str) -> None:
    check_failure(server, receiver, url, named)


def test_an_endpoint_that_refuses_connections_fails_in_words(server: Server, receiver: Receiver) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # and does not listen
        check_failure(server, receiver, f"http://127.0.0.1:{deaf.getsockname()[1]}/", "connection refused")


@pytest.mark.parametrize("status", [301, 307])
def test_a_redirect_is_not_followed_even_to_where_we_may_deliver(
    server: Server, receiver: Receiver, status: int
) -> None:
    receiver.answers["/elsewhere"] = lambda _: (status, {"Location": f"{receiver.url}/inside"}, b"")
    check_failure(server, receiver, f"{receiver.url}/elsewhere", f"answered {status}: redirects are not followed")
    assert len(receiver.at("/elsewhere")) == 2
    assert receiver.at("/inside") == []


def test_a_certificate_that_nobody_vouches_for_is_refused(server: Server, receiver: Receiver, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command to make a certificate with")
    key, certificate = tmp_path / "own.key", tmp_path / "own.crt"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]  # all is right with it but who signed it
    subprocess.run([*command, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    heard: list[bytes] = []

    def greet(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            heard.append(secured.recv(65536))

    with listening(greet) as port:
        delivery = check_failure(server, receiver, f"https://127.0.0.1:{port}/", "TLS failed: ")
    assert "self-signed certificate" in delivery["reason"].replace("self signed", "self-signed")
    assert not any(heard)  # nothing was sent to it
