"""A load of published events on real servers and workers, and ways to look at what became of them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx

from tests.conftest import Server, environment
from tests.databases import Place
from tests.processes import Output, Process
from tests.working import wait_until

EVENT = {"event_type": "game_started", "data": {"team": "ne"}}
LOOPBACK = {"ALLOWED_NETWORKS": "127.0.0.0/8"}
QUICK = LOOPBACK | {"LEASE": "3s", "DELIVERY_TIMEOUT": "1s", "RETRY_SCHEDULE": "200ms 500ms" + " 1s" * 20}
MOST_EVENTS = 5000  # that one client publishes, if nothing stops it


@dataclass
class Load:
    """Clients that publish, each one event after the other, until they are told to stop or the server is gone."""

    server: Server
    acknowledged: list[str] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def publish(self) -> None:
        with httpx.Client(base_url=self.server.client.base_url, timeout=5) as client:
            for _ in range(MOST_EVENTS):
                if self._stop.is_set():
                    return
                try:
                    answer = client.post("/api/v1/events", json=EVENT)
                except httpx.TransportError:
                    return
                if answer.status_code == 202:
                    self.acknowledged.append(answer.json()["event_id"])
                else:
                    self.refused.append(answer.status_code)
                    time.sleep(0.01)

    def __enter__(self) -> Load:
        self._clients = [threading.Thread(target=self.publish) for _ in range(3)]
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        for client in self._clients:
            client.join(10)


@contextmanager
def killed_at_last(place: Place, **settings: str) -> Iterator[Server]:
    server = Server(place, settings).start()
    try:
        yield server
    finally:
        server.stop(signal.SIGKILL)


@contextmanager
def worker(place: Place, **settings: str) -> Iterator[Process]:
    """`python manage.py worker`, once it delivers."""
    env = environment(DATABASE_URL=place.url, **settings)
    with Output() as output:
        process = Process("manage.py", "worker", env=env, folder=place.folder, stdout=output.writer)
    try:
        output.wait_for("Hookline delivers")
        yield process
        process.terminate()
        assert process.wait(20) in (0, -signal.SIGTERM, -signal.SIGKILL)
    finally:
        process.kill()
        process.wait(10)


def wait_until_none_is_pending(server: Server, seconds: float = 30) -> None:
    def pending() -> list[Any]:
        return list(server.client.get("/api/v1/deliveries", params={"status": "pending"}).json()["data"])

    wait_until(lambda: not pending(), seconds)


def every(server: Server, path: str, **query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = server.client.get(path, params={**query, "limit": 200, "cursor": cursor}).json()
        found += page["data"]
        cursor = page["next_cursor"]
    return found
