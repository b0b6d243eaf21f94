"""The commands around delivery, run as a user runs them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from peewee import Database

from hookline import signing
from tests.conftest import ROOT, SECRET, environment, manage, only_postgres, only_sqlite, running
from tests.databases import Place, execute, free_port
from tests.receiver import Receiver

LOOPBACK = "127.0.0.0/8"


def test_a_worker_of_its_own_delivers_what_the_web_process_accepts(place: Place, receiver: Receiver) -> None:
    with running(place, RUN_WORKER="false") as server:
        server.register(url=f"{receiver.url}/hook")
        env = environment(DATABASE_URL=place.url, ALLOWED_NETWORKS=LOOPBACK)
        command = [sys.executable, str(ROOT / "manage.py"), "worker"]
        worker = subprocess.Popen(command, env=env, cwd=place.folder, stdout=subprocess.PIPE, text=True)
        try:
            accepted = server.client.post("/api/v1/events", json={"event_type": "game_started", "data": {"team": "ne"}})
            assert accepted.status_code == 202
            (got,) = receiver.wait_for(1)
            assert got.event_id == accepted.json()["event_id"]
        finally:
            worker.send_signal(signal.SIGTERM)
            assert "Hookline delivers" in worker.communicate(timeout=15)[0]
            assert worker.returncode == 0


def test_publish_stores_an_event_once_for_its_key(place: Place) -> None:
    first, again = (manage(place, "publish", "goal", '{"n": 1}', "--idempotency-key", "k") for _ in range(2))
    assert re.fullmatch(r"evt_\S+: 0 deliveries\n", first.stdout)
    assert again.stdout == first.stdout.strip() + ", published before\n"
    for data, reason in (("{", "DATA is not JSON"), ("[]", "data must be an object")):
        wrong = manage(place, "publish", "goal", data)
        assert wrong.returncode == 1
        assert reason in wrong.stderr and "Traceback" not in wrong.stderr


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


@only_sqlite
def test_an_import_warns_of_addresses_that_the_guard_refuses(place: Place) -> None:
    file = place.folder / "webhooks.json"
    entry = '{"url": "http://192.168.1.5:8123/hook", "events": ["a"], "secret": "0123456789abcdef"}'
    file.write_text(f'{{"one": {entry}}}')
    warned = manage(place, "import", str(file), "--dry-run")
    assert "one: it will not be delivered to: 192.168.1.5" in warned.stderr
    assert "ALLOWED_NETWORKS" in warned.stderr
    assert manage(place, "import", str(file), ALLOWED_NETWORKS="192.168.0.0/16").stderr == ""


COMMANDS = [
    ("migrate", "status"),
    ("migrate", "down"),
    ("purge",),
    ("export", "x.json"),
    ("publish", "a", "{}"),
    ("worker",),
]


@only_postgres
def test_a_role_that_lacks_rights_is_told_so_in_one_line(place: Place) -> None:
    role = f"stranger_{uuid.uuid4().hex}"
    execute(place.url, f"CREATE ROLE {role} LOGIN PASSWORD 'hush'")
    try:
        head, _, address = place.url.partition("://")
        stranger = Place(f"{head}://{role}:hush@{address.rpartition('@')[2]}", place.folder)
        done = [manage(stranger, *command) for command in COMMANDS]
        done.append(manage(stranger, "copy", "--from", stranger.url, "--to", f"sqlite:///{place.folder}/to.db"))
        command = [sys.executable, str(ROOT / "app.py")]
        env = environment(DATABASE_URL=stranger.url)
        done.append(subprocess.run(command, env=env, cwd=place.folder, capture_output=True, text=True, timeout=60))
        for one in done:
            assert one.returncode == 1
            assert "lacks a right" in one.stderr
            assert one.stderr.count("\n") == 1
    finally:
        execute(place.url, f"DROP ROLE {role}")


@only_sqlite
def test_a_file_that_is_no_database_is_named_in_one_line(empty: Place) -> None:
    empty.file.write_bytes(b"not a database, but long enough to have a header " * 99)
    command = [sys.executable, str(ROOT / "app.py")]
    env = environment(DATABASE_URL=empty.url)
    done = [manage(empty, *command) for command in COMMANDS]
    done.append(subprocess.run(command, env=env, cwd=empty.folder, capture_output=True, text=True, timeout=60))
    for one in done:
        assert one.returncode == 1
        assert f"{empty.file} cannot be opened: file is not a database" in one.stderr
        assert one.stderr.count("\n") == 1


def test_ctrl_c_in_the_middle_of_a_progress_bar_gives_the_cursor_back(place: Place, db: Database) -> None:
    values = ", ".join([db.param] * 4)
    with db.connection_context(), db.atomic():
        rows = [(f"evt_{number}", "a", "{}", "2020-01-01T00:00:00.000000Z") for number in range(30_000)]
        insert = f"INSERT INTO events (event_id, event_type, payload, created_at) VALUES ({values})"
        db.cursor().executemany(insert, rows)
    ours, theirs = os.openpty()
    command = [sys.executable, str(ROOT / "manage.py"), "purge"]
    env = environment(DATABASE_URL=place.url)
    process = subprocess.Popen(command, env=env, cwd=place.folder, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    printed = os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # the end of what a terminal was told
        while more := os.read(ours, 4096):
            printed += more
    os.close(ours)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"Aborted!" in printed
    assert printed.rindex(SHOWN) > printed.rindex(HIDDEN)


HIDDEN, SHOWN = b"\x1b[?25l", b"\x1b[?25h"


# Hostile input: one clear line, never a traceback, and nothing that a terminal would obey

DEEP = "[" * 100_000
UNPRINTABLE = re.compile(r"[^\n\x20-\x7e]")


def refused(done: subprocess.CompletedProcess[str], status: int, sentence: str) -> None:
    assert done.returncode == status, done
    assert done.stderr.splitlines()[-1] == f"Error: {sentence}"
    assert "Traceback" not in done.stderr
    assert not UNPRINTABLE.search(done.stdout + done.stderr)


@only_sqlite
@pytest.mark.parametrize("data", [DEEP, '{"a":' * 20_000 + "1" + "}" * 20_000], ids=["open", "closed"])
def test_publish_refuses_deeply_nested_json_in_one_line(place: Place, data: str) -> None:
    refused(manage(place, "publish", "a", data), 1, "DATA is nested too deep")


def tools(tmp_path: Path, *arguments: str | bytes, **settings: str) -> subprocess.CompletedProcess[str]:
    """A command that needs no database, with any bytes as its arguments."""
    command = [sys.executable, str(ROOT / "manage.py"), *arguments]
    env = environment(**settings)
    return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, input="")


def test_verify_says_of_deeply_nested_json_that_it_does_not_hold(tmp_path: Path) -> None:
    (tmp_path / "body").write_text(DEEP)
    done = tools(tmp_path, "verify", "body", "--header", "X-Webhook-Signature: abc", WEBHOOK_SECRET=SECRET)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == f"it does not hold: {signing.OTHER_SECRET}\n"


@pytest.mark.parametrize("moment", ["nan", "inf", "-inf", "1e999"])
def test_verify_refuses_what_is_no_time(tmp_path: Path, moment: str) -> None:
    (tmp_path / "body").write_bytes(b"{}")
    done = tools(tmp_path, "verify", "body", *signed_headers(b"{}", 1), "--at", moment, WEBHOOK_SECRET=SECRET)
    refused(done, 2, f"Invalid value for '--at': {float(moment)} is no time.")


@pytest.mark.parametrize("command", ["verify", "listen"])
def test_a_secret_that_is_not_utf_8_is_refused(tmp_path: Path, command: str) -> None:
    sentence = "Invalid value for '--secret': it is not UTF-8."
    refused(tools(tmp_path, command, "--secret", b"\xff" * 16), 2, sentence)
    refused(tools(tmp_path, command, WEBHOOK_SECRET="\udcff" * 16), 2, sentence)


@pytest.mark.parametrize("command", ["verify", "listen"])
def test_without_a_secret_and_a_terminal_to_ask_on_it_is_said_how_to_give_it(tmp_path: Path, command: str) -> None:
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


@pytest.mark.parametrize(("option", "least", "most"), [("--port", 0, 65535), ("--status", 200, 599)])
@pytest.mark.parametrize("number", ["99999", "-1", "9" * 50])
def test_listen_refuses_numbers_that_are_no_port_and_no_status(
    tmp_path: Path, option: str, least: int, most: int, number: str
) -> None:
    done = tools(tmp_path, "listen", option, number, WEBHOOK_SECRET=SECRET)
    refused(done, 2, f"Invalid value for '{option}': {number} is not in the range {least}<=x<={most}.")


def test_listen_says_in_one_line_that_its_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = tools(tmp_path, "listen", "--port", str(port), WEBHOOK_SECRET=SECRET)
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


@pytest.mark.parametrize("arguments", [("--help",), ("verify", "body", "--secret", SECRET)])
def test_a_full_disk_behind_stdout_is_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("there is no /dev/full here")
    (tmp_path / "body").write_bytes(b"{}")
    command = [sys.executable, str(ROOT / "manage.py"), *arguments]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, env=environment(), cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (1, "Error: No space left on device\n")


@pytest.mark.parametrize(
    "arguments", [("verify", "x\x1b[2J", "--secret", SECRET), ("x\x1b[2J",), ("verify", "--x\x1b[2J")]
)
def test_what_a_message_repeats_of_the_command_line_is_escaped(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ours, theirs = os.openpty()  # click takes control characters out where there is no terminal
    command = [sys.executable, str(ROOT / "manage.py"), *arguments]
    process = subprocess.Popen(command, env=environment(), cwd=tmp_path, stdout=theirs, stderr=theirs)
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):
        while more := os.read(ours, 4096):
            printed += more
    os.close(ours)
    assert process.wait(60) == 2
    assert b"\\x1b[2J" in printed and b"\x1b" not in printed


def test_a_command_that_reads_a_closed_input_says_what_it_finds(tmp_path: Path) -> None:
    command = ["sh", "-c", 'exec "$0" "$@" <&-', sys.executable, str(ROOT / "manage.py")]
    arguments = ["verify", "--header", "X-Webhook-Signature: abc"]
    env = environment(WEBHOOK_SECRET=SECRET)
    done = subprocess.run([*command, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == f"it does not hold: {signing.OTHER_SECRET}\n"


@only_sqlite
@pytest.mark.parametrize("command", ["export", "import"])
def test_a_pipe_is_neither_replaced_by_an_export_nor_read_by_an_import(place: Place, command: str) -> None:
    """Its backup came to lie in /dev, secrets included."""
    reader, writer = os.pipe()
    os.close(writer)
    name = f"/dev/fd/{reader}"
    program = [sys.executable, str(ROOT / "manage.py"), command, name]
    env = environment(DATABASE_URL=place.url)
    done = subprocess.run(
        program, env=env, cwd=place.folder, capture_output=True, text=True, timeout=60, pass_fds=[reader]
    )
    os.close(reader)
    verb = "written" if command == "export" else "read"
    refused(done, 1, f"{name} cannot be {verb}: it is not a file")


@pytest.mark.parametrize("url", ["postgresql://u:p%ed@localhost/x", "postgresql://u:hush@db..example/x"])
def test_a_postgresql_url_that_nobody_can_read_is_one_line(tmp_path: Path, url: str) -> None:
    done = [manage(Place(url, tmp_path), "migrate", command) for command in ("up", "status")]
    command = [sys.executable, str(ROOT / "app.py")]
    env = environment(DATABASE_URL=url)
    done.append(subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60))
    for one in done:
        assert (one.returncode, one.stdout, one.stderr.count("\n")) == (1, "", 1)
        assert "PostgreSQL" in one.stderr and "hush" not in one.stderr


@only_sqlite
@pytest.mark.parametrize("command", ["export", "import"])
@pytest.mark.parametrize("name", ["device", ""])
def test_what_is_no_file_is_neither_replaced_by_an_export_nor_read_by_an_import(
    place: Place, command: str, name: str
) -> None:
    ours, theirs = os.openpty()
    device = Path(os.ttyname(theirs))
    (place.folder / "device").symlink_to(device)
    before = set(os.listdir(place.folder))
    done = manage(place, command, name)
    assert done.returncode in (1, 2)
    assert done.stderr.splitlines()[-1].startswith("Error: ") and "Traceback" not in done.stderr
    assert device.is_char_device()
    assert {left for left in os.listdir(place.folder) if not left.startswith("webhooks.db")} <= before
    os.close(ours)
    os.close(theirs)


@only_sqlite
def test_an_export_to_a_link_writes_the_file_that_it_points_to(place: Place) -> None:
    (place.folder / "real.json").write_text("old")
    (place.folder / "link.json").symlink_to("real.json")
    assert manage(place, "export", "link.json").returncode == 0
    assert (place.folder / "link.json").is_symlink()
    assert (place.folder / "real.json").read_text() == "{}"
