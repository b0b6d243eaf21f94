"""The commands around delivery, run as a user runs them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import uuid
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
