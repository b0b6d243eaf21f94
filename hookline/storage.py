"""Storage: opening a database, and the two ways an asynchronous caller may use it.

    await storage.read(fn, *args)     a short look-up, on a pooled connection checked out for just this call
    await storage.scan(fn, *args)     the same for work that may be long: in a worker thread
    await storage.write(fn, *args)    inside a transaction; returns once the commit is durable

`fn` is an ordinary function that uses the database. No connection is ever held across an `await`.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import anyio.to_thread
from peewee import Database, InterfaceError, OperationalError
from playhouse.pool import PooledSqliteDatabase

from hookline.errors import Invalid, Unavailable

T = TypeVar("T")

GROUP_LIMIT = 500  # writes in one commit
BUSY_TIMEOUT = 30  # seconds that a writer waits for another process, an import of a million webhooks included

PRAGMAS = {
    "journal_mode": "wal",
    "synchronous": "full",
    "foreign_keys": 1,
    "cache_size": -16_000,  # KiB
    "journal_size_limit": 64 * 1024 * 1024,
}


def open_database(url: str, **pragmas: Any) -> Database:
    """The database at `sqlite:///relative.db` or `sqlite:////absolute.db`, not yet connected.

    Raises Invalid for any other URL or a folder that cannot be made.
    """
    if not url.startswith("sqlite:///") or url == "sqlite:///":
        raise Invalid("DATABASE_URL must be like sqlite:///data/webhooks.db")
    path = Path(url.removeprefix("sqlite:///"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise Invalid(f"the folder of the database, {path.parent}, cannot be made: {exc.strerror}") from exc
    db: Database = PooledSqliteDatabase(
        str(path),
        pragmas={**PRAGMAS, **pragmas},
        timeout=BUSY_TIMEOUT,  # the pool's own: how long to wait for a free connection
        check_same_thread=False,
        lock_type="IMMEDIATE",
        autoconnect=False,
        max_connections=64,
    )
    db.timeout = BUSY_TIMEOUT  # type: ignore[attr-defined]  # SQLite's: the pool keeps the argument above to itself
    return db


_thread = threading.local()  # `in_unit`: is this the writer, running a job?


@contextmanager
def connected(db: Database) -> Iterator[None]:
    """This thread's connection, opened for the block unless the caller already holds one."""
    if not db.is_closed():
        yield
        return
    with unavailable_when_it_fails():
        db.connect()
    try:
        yield
    finally:
        db.close()


@contextmanager
def transaction(db: Database) -> Iterator[None]:
    """One unit of work: committed at the end of the block, or, inside a caller's transaction, a savepoint of it.

    Inside `Storage.write` the unit is open already.
    """
    if getattr(_thread, "in_unit", False):
        yield
        return
    with connected(db), db.atomic():
        yield


class unavailable_when_it_fails:  # a class, because it is on every path
    """Turns the database's own failures in the block into Unavailable."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, OperationalError | InterfaceError):
            raise Unavailable(sentence_for(exc)) from exc


def sentence_for(exc: BaseException) -> str:
    """Why the database could not do it, without SQL or paths."""
    return {
        "SQLITE_FULL": "the disk is full; nothing was stored",
        "SQLITE_BUSY": "the database is busy; nothing was stored, try again",
        "SQLITE_READONLY": "the database is read-only; nothing was stored",
    }.get(error_name(exc), "the database is unavailable; nothing was stored, try again")


def error_name(exc: BaseException) -> str:
    """SQLite's primary name of an error, such as SQLITE_FULL, found along the chain of causes; '' if there is none."""
    seen: BaseException | None = exc
    name = ""
    while seen is not None:
        found = getattr(seen, "sqlite_errorname", None) or getattr(getattr(seen, "orig", None), "sqlite_errorname", "")
        if found and found != "SQLITE_ERROR":
            name = "_".join(found.split("_")[:2])
        seen = seen.__cause__ or seen.__context__
    return name


class Job(NamedTuple):
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    future: asyncio.Future[Any]


class GroupFailed(Exception):
    """The transaction of a whole group is lost: none of its writes may be acknowledged."""


class Storage:
    """The connection hook of one database. `start` and `stop` belong to the running event loop."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._writer: threading.Thread | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._writer = threading.Thread(target=self._write_groups, name="hookline-writer", daemon=True)
        self._writer.start()

    async def stop(self) -> None:
        """Finish every write that was accepted, then close."""
        writer, self._writer = self._writer, None  # from here on writes are refused, not queued behind the end
        if writer is not None:
            self._jobs.put(None)
            await anyio.to_thread.run_sync(writer.join)
        self.db.close_all()  # type: ignore[attr-defined]

    async def read(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(*args)` at once, on the event loop: a point look-up in WAL mode is cheaper than a thread hop.

        Raises Unavailable if the database cannot be read.
        """
        return self._read(fn, *args)

    async def scan(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(*args)` in a worker thread, for what may take long. Raises Unavailable."""
        return await anyio.to_thread.run_sync(self._read, fn, *args)

    async def write(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(*args)` in the next group of writes; returns when the group's commit is durable.

        `fn` touches nothing but the database: it is run again where a neighbour in its group fails. Raises what `fn`
        raised (then it alone is rolled back), or Unavailable if the group could not be committed (then nothing of it
        is stored).
        """
        if self._writer is None:
            raise Unavailable("the service is stopping; nothing was stored")
        future: asyncio.Future[T] = self._loop.create_future()
        self._jobs.put(Job(fn, args, future))
        return await future

    def _read(self, fn: Callable[..., T], *args: Any) -> T:
        with connected(self.db), unavailable_when_it_fails():
            return fn(*args)

    def _write_groups(self) -> None:
        _thread.in_unit = True
        while (group := self._next_group()) is not None:
            answers = self._commit(group)
            self._loop.call_soon_threadsafe(deliver, group, answers)

    def _next_group(self) -> list[Job] | None:
        """All that is waiting, at least one; None once stopped."""
        job = self._jobs.get()
        if job is None:
            return None
        group = [job]
        while len(group) < GROUP_LIMIT and not self._jobs.empty():
            job = self._jobs.get()
            if job is None:
                self._jobs.put(None)
                break
            group.append(job)
        return group

    def _commit(self, group: list[Job]) -> list[Any]:
        """An answer for each write of the group: its result, or the exception it must raise.

        Most groups have no failing write, so a group is first run without savepoints, which cost as much as the
        writes. If one fails, all is rolled back, and the group is run again with a savepoint around each.
        """
        try:
            with connected(self.db), self.db.atomic():
                return [job.fn(*job.args) for job in group]
        except Exception as exc:
            if error_name(exc) == "SQLITE_BUSY":  # waited long enough once
                return [Unavailable(sentence_for(exc))] * len(group)
            return self._commit_each(group)

    def _commit_each(self, group: list[Job]) -> list[Any]:
        try:
            with connected(self.db), self.db.atomic():
                return [self._attempt(job) for job in group]
        except Exception as exc:
            failure = exc if isinstance(exc, Unavailable) else Unavailable(sentence_for(exc))
            return [failure] * len(group)

    def _attempt(self, job: Job) -> Any:
        try:
            with self.db.atomic():
                return job.fn(*job.args)
        except Exception as exc:
            # A full disk or an I/O error may have ended the whole transaction, the neighbours' writes with it.
            if not self._still_in_transaction() or error_name(exc) not in ("", "SQLITE_CONSTRAINT"):
                raise GroupFailed from exc
            return exc

    def _still_in_transaction(self) -> bool:
        connection = self.db.connection()
        return not isinstance(connection, sqlite3.Connection) or connection.in_transaction


def deliver(group: list[Job], answers: list[Any]) -> None:
    for job, answer in zip(group, answers, strict=True):
        if job.future.done():  # the client went away
            continue
        if isinstance(answer, Exception):
            job.future.set_exception(answer)
        else:
            job.future.set_result(answer)
