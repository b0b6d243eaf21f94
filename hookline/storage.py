"""Storage: opening a database, and the two ways an asynchronous caller may use it.

    await storage.read(fn, *args)     a short look-up, at once, on the event loop's own connection
    await storage.scan(fn, *args)     the same for work that may be long: in a worker thread
    await storage.write(fn, *args)    inside a transaction; returns once the commit is durable
    await storage.write_together(fn, item)    the same, where `fn([item, ...])` takes all that are waiting at once

`fn` is an ordinary function that uses the database. No connection is ever held across an `await`.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
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
FAILURES = (OperationalError, InterfaceError)
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


class connected:  # a class, because it is on every path
    """This thread's connection, opened for the block unless the caller already holds one.

    The database's own failures in the block become Unavailable.
    """

    def __init__(self, db: Database) -> None:
        self.db = db

    def __enter__(self) -> None:
        self.opened = self.db.is_closed()
        if self.opened:
            try:
                self.db.connect()
            except FAILURES as exc:
                raise Unavailable(sentence_for(exc)) from exc

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        if self.opened:
            self.db.close()
        if isinstance(exc, FAILURES):
            raise Unavailable(sentence_for(exc)) from exc


@contextmanager
def transaction(db: Database) -> Iterator[None]:
    """One unit of work: committed at the end of the block, or, inside a caller's transaction, a savepoint of it.

    Inside `Storage.write` the unit is open already. Failures become Unavailable.
    """
    with connected(db):
        if getattr(_thread, "in_unit", False):
            yield
            return
        with db.atomic():
            yield


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
    together: bool  # does `fn` take a list of the single argument of every such job, and return a list?

    def run(self) -> Any:
        return self.fn(list(self.args))[0] if self.together else self.fn(*self.args)


class GroupFailed(Exception):
    """The transaction of a whole group is lost: none of its writes may be acknowledged."""


class Storage:
    """The connection hook of one database. `start` and `stop` belong to the running event loop."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self._waiting: list[Job] = []  # of this turn of the event loop
        self._jobs: SimpleQueue[list[Job] | None] = SimpleQueue()
        self._writer: threading.Thread | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.db.connect(reuse_if_open=True)  # the loop's own, for reads: they never span an await or a transaction
        self._writer = threading.Thread(target=self._write_groups, name="hookline-writer", daemon=True)
        self._writer.start()

    async def stop(self) -> None:
        """Finish every write that was accepted, then close."""
        writer, self._writer = self._writer, None  # from here on writes are refused, not queued behind the end
        if writer is not None:
            self._hand_over()
            self._jobs.put(None)
            await anyio.to_thread.run_sync(writer.join)
        self.db.close()
        self.db.close_all()  # type: ignore[attr-defined]

    async def read(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(*args)` at once, on the event loop: a point look-up in WAL mode is cheaper than a thread hop.

        Raises Unavailable if the database cannot be read.
        """
        return self.read_now(fn, *args)

    async def scan(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(*args)` in a worker thread, for what may take long. Raises Unavailable."""
        return await anyio.to_thread.run_sync(self.read_now, fn, *args)

    async def write(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(*args)` in the next group of writes; returns when the group's commit is durable.

        `fn` touches nothing but the database: it is run again where a neighbour in its group fails. Raises what `fn`
        raised (then it alone is rolled back), or Unavailable if the group could not be committed (then nothing of it
        is stored).
        """
        answer: T = await self._enqueue(fn, args, together=False)
        return answer

    async def write_together(self, fn: Callable[[list[Any]], Sequence[T]], item: Any) -> T:
        """Like `write` of `fn([item])[0]`, but `fn` is called once with the items of all such writes in the group.

        Each statement of the writer gives up the GIL and must win it back from the event loop, so one statement for
        the whole group is several times as fast. `fn` returns a result for each item, in order.
        """
        answer: T = await self._enqueue(fn, (item,), together=True)
        return answer

    def _enqueue(self, fn: Callable[..., Any], args: tuple[Any, ...], together: bool) -> asyncio.Future[Any]:
        if self._writer is None:
            raise Unavailable("the service is stopping; nothing was stored")
        if not self._waiting:  # the writer gets all writes of this turn of the loop at once
            self._loop.call_soon(self._hand_over)
        future = self._loop.create_future()
        self._waiting.append(Job(fn, args, future, together))
        return future

    def _hand_over(self) -> None:
        if self._waiting:
            self._jobs.put(self._waiting)
            self._waiting = []

    def read_now(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(*args)` on this thread. Raises Unavailable."""
        with connected(self.db):
            return fn(*args)

    def _write_groups(self) -> None:
        _thread.in_unit = True
        while (group := self._next_group()) is not None:
            answers = self._commit(group)
            self._loop.call_soon_threadsafe(deliver, group, answers)

    def _next_group(self) -> list[Job] | None:
        """All that is waiting, at least one; None once stopped."""
        jobs = self._jobs.get()
        if jobs is None:
            return None
        group = list(jobs)
        while len(group) < GROUP_LIMIT and not self._jobs.empty():
            jobs = self._jobs.get()
            if jobs is None:
                self._jobs.put(None)
                break
            group += jobs
        return group

    def _commit(self, group: list[Job]) -> list[Any]:
        """An answer for each write of the group: its result, or the exception it must raise.

        Most groups have no failing write, so a group is first run without savepoints, which cost as much as the
        writes. If one fails, all is rolled back, and the group is run again with a savepoint around each.
        """
        try:
            with connected(self.db), self.db.atomic():
                return run_all(group)
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
                return job.run()
        except Exception as exc:
            # A full disk or an I/O error may have ended the whole transaction, the neighbours' writes with it.
            if not self._still_in_transaction() or error_name(exc) not in ("", "SQLITE_CONSTRAINT"):
                raise GroupFailed from exc
            return exc

    def _still_in_transaction(self) -> bool:
        connection = self.db.connection()
        return not isinstance(connection, sqlite3.Connection) or connection.in_transaction


def run_all(group: list[Job]) -> list[Any]:
    """The answer of each job, those that can run together in one call."""
    answers: list[Any] = [None] * len(group)
    sets: dict[Callable[..., Any], list[int]] = {}
    for place, job in enumerate(group):
        if job.together:
            sets.setdefault(job.fn, []).append(place)
        else:
            answers[place] = job.run()
    for function, places in sets.items():
        results = function([group[place].args[0] for place in places])
        for place, result in zip(places, results, strict=True):
            answers[place] = result
    return answers


def deliver(group: list[Job], answers: list[Any]) -> None:
    for job, answer in zip(group, answers, strict=True):
        if job.future.done():  # the client went away
            continue
        if isinstance(answer, Exception):
            job.future.set_exception(answer)
        else:
            job.future.set_result(answer)
