"""Processes killed under load: what was acknowledged arrives, and without a crash nothing is sent twice."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx

from tests.conftest import ROOT, Server, environment, make_migrated, running
from tests.receiver import Answer, Received, Receiver

ROUNDS = 10
QUICK = {
    "ALLOWED_NETWORKS": "127.0.0.0/8",
    "LEASE": "3s",
    "DELIVERY_TIMEOUT": "1s",
    "RETRY_SCHEDULE": "200ms 500ms 1s 1s 1s",
}


def publish_until(server: Server, stop: threading.Event, acknowledged: list[str]) -> None:
    """Publish from one client, one event after the other, until told to stop or the server is gone."""
    with httpx.Client(base_url=server.client.base_url, timeout=5) as client:
        while not stop.is_set():
            try:
                answer = client.post("/api/v1/events", json={"event_type": "game_started", "data": {"team": "ne"}})
            except httpx.TransportError:
                return
            if answer.status_code == 202:
                acknowledged.append(answer.json()["event_id"])


@contextmanager
def load(server: Server, acknowledged: list[str]) -> Iterator[None]:
    stop = threading.Event()
    clients = [threading.Thread(target=publish_until, args=(server, stop, acknowledged)) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        stop.set()
        for client in clients:
            client.join(10)


def wait_until_none_is_pending(server: Server, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not server.client.get("/api/v1/deliveries", params={"status": "pending"}).json()["data"]:
            return
        time.sleep(0.05)
    raise AssertionError("deliveries are still pending")


def every(server: Server, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = server.client.get(path, params={"limit": 200, "cursor": cursor}).json()
        found += page["data"]
        cursor = page["next_cursor"]
    return found


@contextmanager
def worker(database: Path) -> Iterator[subprocess.Popen[bytes]]:
    env = environment(DATABASE_URL=f"sqlite:///{database}", **QUICK)
    process = subprocess.Popen([sys.executable, str(ROOT / "manage.py"), "worker"], env=env, cwd=database.parent)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(20)


def test_every_acknowledged_event_arrives_whenever_the_server_is_killed(tmp_path: Path, receiver: Receiver) -> None:
    database = tmp_path / "webhooks.db"
    make_migrated(database)
    acknowledged: list[str] = []
    for round_number in range(ROUNDS):
        server = Server(database, QUICK).start()
        if not round_number:
            server.register(url=f"{receiver.url}/hook")
        with load(server, acknowledged):
            time.sleep(random.uniform(0.05, 0.4))  # the moment of the kill is what varies
            server.stop(signal.SIGKILL)
    with running(database, **QUICK) as server:
        wait_until_none_is_pending(server)
        made = every(server, "/api/v1/deliveries")
        (webhook,) = server.client.get("/api/v1/webhooks").json()["data"]
    arrived = {one.event_id for one in receiver.received}
    assert len(acknowledged) > ROUNDS
    assert set(acknowledged) <= arrived
    assert {one["status"] for one in made} == {"succeeded"}
    assert webhook["total_calls"] == sum(one["attempts"] for one in made)  # the counters too


def test_a_worker_killed_holding_a_lease_is_replaced_when_it_has_run_out(tmp_path: Path, receiver: Receiver) -> None:
    database = tmp_path / "webhooks.db"
    asked, release = threading.Event(), threading.Event()

    def first_hangs(_: Received) -> Answer:
        asked.set()
        release.wait(20)
        return 200, {}, b""

    receiver.answers["/hook"] = first_hangs
    with running(database, RUN_WORKER="false") as server:
        server.register(url=f"{receiver.url}/hook")
        with worker(database) as first:
            event = {"event_type": "game_started", "data": {"team": "ne"}}
            published = server.client.post("/api/v1/events", json=event)
            assert asked.wait(15)
            first.kill()
            first.wait(10)
        release.set()
        (waiting,) = server.client.get("/api/v1/deliveries").json()["data"]
        assert waiting["waiting_for"].startswith("nothing")  # as far as anyone can know
        with worker(database):
            wait_until_none_is_pending(server)
        (delivery,) = server.client.get("/api/v1/deliveries").json()["data"]
    assert (delivery["status"], delivery["event_id"]) == ("succeeded", published.json()["event_id"])
    assert len(receiver.received) == 2


def test_two_workers_on_one_file_make_each_delivery_once(tmp_path: Path, receiver: Receiver) -> None:
    database = tmp_path / "webhooks.db"
    with running(database, RUN_WORKER="false") as server:
        for n in range(3):
            server.register(url=f"{receiver.url}/{n}")
        with worker(database), worker(database):
            for _ in range(100):
                server.client.post("/api/v1/events", json={"event_type": "game_started", "data": {"team": "ne"}})
            wait_until_none_is_pending(server)
    made = [(one.path, one.event_id) for one in receiver.received]
    assert len(made) == len(set(made)) == 300


def test_a_server_told_to_stop_under_load_loses_nothing(tmp_path: Path, receiver: Receiver) -> None:
    database = tmp_path / "webhooks.db"
    acknowledged: list[str] = []
    with running(database, **QUICK) as server:
        server.register(url=f"{receiver.url}/hook")
        with load(server, acknowledged):
            receiver.wait_for(5)
            server.stop(signal.SIGTERM)
        assert server.process.returncode in (0, -signal.SIGTERM)
    with running(database, **{**QUICK, "LEASE": "60s"}) as server:
        wait_until_none_is_pending(server, 20)  # less than a lease: what was under way was released
    sent = [one.event_id for one in receiver.received]
    assert set(acknowledged) <= set(sent)
