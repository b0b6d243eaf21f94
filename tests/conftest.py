"""What most tests share: a migrated database file, and the real server as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import httpx2 as httpx
import pytest
from peewee import Database
from starlette.testclient import TestClient

import models
from app import create_app
from hookline import WebhookManager
from hookline.store.open import open_database
from settings import Settings
from tests import databases
from tests.databases import Place, Postgres
from tests.processes import Output, Process
from tests.receiver import Receiver
from tests.working import wait_until

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
FAULTS = ROOT / "tests" / "faults"
STARTED = pytest.StashKey[Postgres | None]()
SECRET = "a-secret-of-enough-characters"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def pytest_configure(config: pytest.Config) -> None:
    begun_by_xdist = hasattr(config, "workerinput")  # and shares the server of the process that began it
    if not begun_by_xdist and "not postgres" not in config.option.markexpr:
        config.stash[STARTED] = databases.start_shared()


def pytest_unconfigure(config: pytest.Config) -> None:
    if STARTED in config.stash:
        databases.stop_shared(config.stash[STARTED])


@pytest.hookimpl(tryfirst=True)  # -m selects by what it adds
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs PostgreSQL, by its parameters, and the tests of faults, by their folder."""
    for item in items:
        if hasattr(item, "callspec") and "postgres" in item.callspec.params.values():
            item.add_marker("postgres")
        if FAULTS in item.path.parents:
            item.add_marker("faults")


@pytest.fixture(params=databases.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """What uses this runs on each kind of database."""
    if reason := databases.why_not(request.param):
        pytest.skip(reason)
    return str(request.param)


only_sqlite = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
only_postgres = pytest.mark.parametrize("backend", ["postgres"], indirect=True)


@pytest.fixture
def empty(backend: str, tmp_path: Path) -> Iterator[Place]:
    """A new database without any table."""
    with databases.empty(backend, tmp_path) as place:
        yield place


@pytest.fixture
def place(backend: str, tmp_path: Path) -> Iterator[Place]:
    """A new database with our schema."""
    with databases.migrated(backend, tmp_path) as found:
        yield found


@pytest.fixture
def db(place: Place) -> Iterator[Database]:
    """A migrated database, bound to the models."""
    database = open_database(place.url)
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


def manage(place: Place, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `python manage.py ARGUMENTS` on a database."""
    env = environment(DATABASE_URL=place.url, **settings)
    with TemporaryFile("w+") as stdout, TemporaryFile("w+") as stderr:
        files = {"stdout": stdout.fileno(), "stderr": stderr.fileno()}
        status = Process("manage.py", *arguments, env=env, folder=place.folder, **files).wait(60)
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(arguments, status, stdout.read(), stderr.read())


@dataclass
class Server:
    """A running `python app.py`, and a client of it."""

    place: Place
    settings: dict[str, str] = field(default_factory=dict)

    def start(self) -> Server:
        env = environment(DATABASE_URL=self.place.url, PORT="0", **self.settings)
        with Output() as self.output:
            pipes = {"stdout": self.output.writer, "stderr": self.output.writer}
            self.process = Process("app.py", env=env, folder=self.place.folder, **pipes)
        try:
            url = self.output.wait_for("Hookline serves on ")
            self.client = httpx.Client(base_url=url, timeout=60, verify=False)  # without https no certificates
            path = "/health" if self.settings.get("RUN_WORKER") == "false" else "/ready"  # once a worker beats
            wait_until(lambda: self.client.get(path).status_code == 200)
        except BaseException:
            self.process.kill()
            raise
        return self

    def stop(self, how: signal.Signals = signal.SIGTERM) -> str:
        """End it; returns what it printed."""
        self.client.close()
        self.process.send_signal(how)
        self.process.wait(20)
        return self.output.rest()

    def register(self, **changes: Any) -> httpx.Response:
        return self.client.post("/api/v1/webhooks/register", json=registration(**changes))


def registration(**changes: Any) -> dict[str, Any]:
    body = {"url": "http://example.com/hook", "events": ["game_started"], "secret": SECRET, "team": "ne"}
    return body | changes


@contextmanager
def running(place: Place, **settings: str) -> Iterator[Server]:
    server = Server(place, settings).start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def server(place: Place) -> Iterator[Server]:
    with running(place) as started:
        yield started


@pytest.fixture
def serve(place: Place) -> Iterator[Callable[..., Server]]:
    """Start servers with settings of the test's own: `serve(API_KEYS="...")`."""
    started: list[Server] = []

    def start(**settings: str) -> Server:
        started.append(Server(place, settings).start())
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """The application in this process, on an SQLite file. It delivers nothing."""
    with databases.migrated("sqlite", tmp_path) as place:
        app = create_app(Settings(place.url, run_worker=False, allow_anonymous=True))
        with TestClient(app, raise_server_exceptions=False) as started:
            yield started


def recorded(name: str) -> Any:
    return json.loads((DATA / name).read_text())
