"""What most tests share: a migrated database file, and the real server as a process of its own."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from peewee import Database

import models
from hookline import WebhookManager, schema
from hookline.storage import open_database
from settings import Settings
from tests.receiver import Receiver

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
SECRET = "a-secret-of-enough-characters"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@functools.cache
def migrated_file() -> bytes:
    """An empty database with our schema: made once, and copied for each test."""
    with tempfile.TemporaryDirectory() as folder:
        database = open_database(f"sqlite:///{folder}/webhooks.db")
        schema.up(database)
        database.close_all()  # type: ignore[attr-defined]
        return Path(folder, "webhooks.db").read_bytes()


def make_migrated(path: Path) -> None:
    path.write_bytes(migrated_file())


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    """A migrated database in a file of its own, bound to the models."""
    make_migrated(tmp_path / "webhooks.db")
    database = open_database(f"sqlite:///{tmp_path}/webhooks.db")
    models.db.initialize(database)
    yield database
    database.close_all()  # type: ignore[attr-defined]


@pytest.fixture
def manager(db: Database) -> WebhookManager:
    return WebhookManager(db=db)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    started = Receiver().start()
    yield started
    started.stop()


def environment(**settings: str) -> dict[str, str]:
    """The environment of a child process: ours, without any setting of the developer's shell."""
    ours = {field.name.upper() for field in fields(Settings)} | {"WEB_CONCURRENCY", "WEBHOOK_SECRET"}
    return {name: value for name, value in os.environ.items() if name not in ours} | settings


def manage(database: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `python manage.py ARGUMENTS` on a database file."""
    command = [sys.executable, str(ROOT / "manage.py"), *arguments]
    env = environment(DATABASE_URL=f"sqlite:///{database}", **settings)
    return subprocess.run(command, env=env, cwd=database.parent, capture_output=True, text=True, timeout=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A running `python app.py`, and a client of it."""

    database: Path
    settings: dict[str, str] = field(default_factory=dict)

    def start(self) -> Server:
        port = free_port()
        env = environment(DATABASE_URL=f"sqlite:///{self.database}", PORT=str(port), **self.settings)
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py")],
            env=env,
            cwd=self.database.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.client.get("/ready").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.02)  # nothing listens yet; there is no signal to wait on from outside
        self.process.kill()
        raise AssertionError(f"the server did not get ready: {self.process.communicate()[0]}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> str:
        """End it; returns what it printed."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.communicate(timeout=20)[0]

    def register(self, **changes: Any) -> httpx.Response:
        return self.client.post("/api/v1/webhooks/register", json=registration(**changes))


def registration(**changes: Any) -> dict[str, Any]:
    body = {"url": "http://example.com/hook", "events": ["game_started"], "secret": SECRET, "team": "ne"}
    return body | changes


@contextmanager
def running(database: Path, **settings: str) -> Iterator[Server]:
    if not database.exists():
        make_migrated(database)
    server = Server(database, settings).start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path / "webhooks.db") as started:
        yield started


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers with settings of the test's own: `serve(API_KEYS="...")`."""
    started: list[Server] = []

    def start(**settings: str) -> Server:
        database = tmp_path / "webhooks.db"
        if not database.exists():
            make_migrated(database)
        started.append(Server(database, settings).start())
        return started[-1]

    yield start
    for one in started:
        one.stop()


def recorded(name: str) -> Any:
    return json.loads((DATA / name).read_text())
