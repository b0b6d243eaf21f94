"""`verify` and `listen`: whether a signature holds and why not, and what strangers may send."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hookline import signing
from tests.commands.running import DEEP, refused, run
from tests.conftest import ROOT, SECRET, environment, manage, only_sqlite, running
from tests.databases import Place, free_port

LOOPBACK = "127.0.0.0/8"


def signed_headers(body: bytes, at: int) -> list[str]:
    headers = signing.headers(
        [SECRET], webhook_id="w", event_id="evt_1", event_type="goal", event_time="t", timestamp=at, body=body
    )
    return [part for name, value in headers.items() for part in ("--header", f"{name}: {value}")]


@pytest.mark.parametrize(
    ("body", "secret", "age", "answer"),
    [
        (b'{"n":1}', SECRET, 0, "it holds\n"),
        (b'{"n": 1}', SECRET, 0, "it does not hold: the body was parsed and written again"),
        (b'{"n":2}', SECRET, 0, "it does not hold: it was signed with another secret, or the body"),
        (b'{"n":1}', "another-secret-16", 0, "it does not hold: it was signed with another secret"),
        (b'{"n":1}', SECRET, 900, "it does not hold: the signature holds, but it was made 900 s ago"),
    ],
)
def test_verify_names_why_a_signature_does_not_hold(
    tmp_path: Path, body: bytes, secret: str, age: int, answer: str
) -> None:
    file = tmp_path / "body"
    file.write_bytes(body)
    arguments = ["verify", str(file), *signed_headers(b'{"n":1}', 1_700_000_000), "--at", str(1_700_000_000 + age)]
    done = manage(Place(f"sqlite:///{tmp_path}/none.db", tmp_path), *arguments, WEBHOOK_SECRET=secret)
    assert done.stdout.startswith(answer)
    assert done.returncode == int(answer != "it holds\n")
    assert secret not in done.stdout + done.stderr


def test_verify_says_of_deeply_nested_json_that_it_does_not_hold(tmp_path: Path) -> None:
    (tmp_path / "body").write_text(DEEP)
    done = run(tmp_path, "verify", "body", "--header", "X-Webhook-Signature: abc", WEBHOOK_SECRET=SECRET)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == f"it does not hold: {signing.OTHER_SECRET}\n"


@pytest.mark.parametrize("moment", ["nan", "inf", "-inf", "1e999"])
def test_verify_refuses_a_time_that_is_not_finite(tmp_path: Path, moment: str) -> None:
    (tmp_path / "body").write_bytes(b"{}")
    done = run(tmp_path, "verify", "body", *signed_headers(b"{}", 1), "--at", moment, WEBHOOK_SECRET=SECRET)
    refused(done, 2, f"Invalid value for '--at': {float(moment)} is no time.")


def test_verify_reads_a_closed_input_as_an_empty_body(tmp_path: Path) -> None:
    command = ["sh", "-c", 'exec "$0" "$@" <&-', sys.executable, str(ROOT / "manage.py")]
    arguments = ["verify", "--header", "X-Webhook-Signature: abc"]
    env = environment(WEBHOOK_SECRET=SECRET)
    done = subprocess.run([*command, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == f"it does not hold: {signing.OTHER_SECRET}\n"


@pytest.mark.parametrize("command", ["verify", "listen"])
def test_a_secret_that_is_not_utf_8_is_refused(tmp_path: Path, command: str) -> None:
    sentence = "Invalid value for '--secret': it is not UTF-8."
    refused(run(tmp_path, command, "--secret", b"\xff" * 16), 2, sentence)
    refused(run(tmp_path, command, WEBHOOK_SECRET="\udcff" * 16), 2, sentence)


@pytest.mark.parametrize("command", ["verify", "listen"])
def test_without_a_terminal_to_ask_on_it_is_said_how_to_give_a_secret(tmp_path: Path, command: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "manage.py"), command],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        input="",
        start_new_session=True,  # away from the terminal of whoever runs the tests
    )
    refused(done, 2, "give the webhook's secret by WEBHOOK_SECRET or --secret")


@only_sqlite
def test_listen_prints_each_delivery_and_whether_its_signature_holds(place: Place) -> None:
    port = free_port()
    env = environment(WEBHOOK_SECRET=SECRET) | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "manage.py"), "listen", "--port", str(port)]
    listener = subprocess.Popen(command, env=env, cwd=place.folder, stdout=subprocess.PIPE, text=True)
    assert listener.stdout is not None
    try:
        assert "listening" in listener.stdout.readline()
        with running(place, ALLOWED_NETWORKS=LOOPBACK) as server:
            server.register(url=f"http://127.0.0.1:{port}/hook")
            server.client.post("/api/v1/events", json={"event_type": "game_started", "data": {"team": "ne"}})
            assert listener.stdout.readline().startswith('game_started: {"team":"ne","event_type"')
            assert listener.stdout.readline() == "  signature: holds\n"
    finally:
        os.kill(listener.pid, signal.SIGINT)
        listener.wait(15)
        listener.stdout.close()


@pytest.mark.parametrize(("option", "least", "most"), [("--port", 0, 65535), ("--status", 200, 599)])
@pytest.mark.parametrize("number", ["99999", "-1", "9" * 50])
def test_listen_refuses_numbers_that_are_no_port_or_no_status(
    tmp_path: Path, option: str, least: int, most: int, number: str
) -> None:
    done = run(tmp_path, "listen", option, number, WEBHOOK_SECRET=SECRET)
    refused(done, 2, f"Invalid value for '{option}': {number} is not in the range {least}<=x<={most}.")


def test_listen_says_in_one_line_that_its_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(tmp_path, "listen", "--port", str(port), WEBHOOK_SECRET=SECRET)
    refused(done, 1, f"port {port} cannot be used: Address already in use")
    assert done.stdout == ""


@contextlib.contextmanager
def listening(folder: Path) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    command = [sys.executable, str(ROOT / "manage.py"), "listen", "--port", "0"]
    env = environment(WEBHOOK_SECRET=SECRET)
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=env, cwd=folder, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        yield int(first.rpartition(":")[2].partition(";")[0]), process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


def send(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request)
        return connection.recv(1024)


def test_what_strangers_send_to_listen_cannot_command_the_terminal(tmp_path: Path) -> None:
    with listening(tmp_path) as (port, process):
        body = "\x1b[2J\r\nsignature: holds\u202e\x00 ☃".encode() + b"\xff"
        head = f"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n".encode()
        assert send(port, head + b"X-Webhook-Event: go\xffal\xe2\x80\xae\r\n\r\n" + body).startswith(b"HTTP/1.1 200")
        for garbage in (b"GARBAGE \x1b[2J\r\n\r\n", b"POST /\x1b[2J HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + b"x" * 99):
            send(port, garbage)
        zipped = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"
        assert send(port, zipped).startswith(b"HTTP/1.")
        process.send_signal(signal.SIGINT)
        printed, complained = process.communicate(timeout=30)
    assert (process.returncode, complained) == (0, "")
    lines = printed.splitlines()
    assert lines[0] == "go\\udcffal\\u202e: \\x1b[2J\\r\\nsignature: holds\\u202e\\x00 ☃\ufffd"
    assert lines[1].startswith("  signature: does not hold: there is neither")
    assert all(line.startswith("a request could not be read: ") for line in lines[2:])
    assert len(lines) > 3
    assert all(line.isprintable() for line in lines)


def test_listen_ends_when_nobody_reads_what_it_prints(tmp_path: Path) -> None:
    with listening(tmp_path) as (port, process):
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        with contextlib.suppress(ConnectionError):
            send(port, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        assert process.wait(30) == 1
        assert process.stderr.read() == ""
        process.stdout = None
