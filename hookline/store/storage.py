"""Storage: the two ways in which an asynchronous caller may use a database.

    await storage.read(fn, *args)     a short look-up
    await storage.scan(fn, *args)     the same for work that may be long
    await storage.write(fn, *args)    inside a transaction; returns once the commit is durable
    await storage.write_together(fn, item)    the same, where `fn([item, ...])` takes all that are waiting at once

`fn` is an ordinary function that uses the database. No connection is ever held across an `await`.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import anyio.to_thread
from peewee import Database

from hookline.errors import Unavailable
from hookline.store import forks, notices, sql
from hookline.store.failures import LOCKED, PASSING, error_name, is_lost, sentence_for
from hookline.store.notices import Notices
from hookline.store.units import POOL_SIZE, Unknown, Unreachable, connected, is_postgres, require_own, unit

T = TypeVar("T")

GROUP_LIMIT = 500  # writes in one commit
PAUSE = 0.02  # seconds between tries, at most
TRIES = 3  # of a write that something passing was in the way of, on PostgreSQL
STOPPING = "the service is stopping; nothing was stored"
FORKED = "this process was forked from the one that runs the storage: start one here; nothing was stored"


def read_now(db: Database, fn: Callable[..., T], *args: Any) -> T:
    """`fn(*args)` on this thread, once more if the connection was lost. Raises Unavailable."""
    try:
        with connected(db):
            return fn(*args)
    except Unreachable:
        raise
    except Unavailable as exc:
        if not is_lost(exc):
            raise
    with connected(db):
        return fn(*args)


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
    """The connection hook of one database: see `storage_of`. `start` and `stop` belong to the running event loop."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self._why_refused = STOPPING
        forks.follow_state(self)

    def forked(self) -> None:
        """In a child of a fork: our threads are the parent's, so nothing is taken any more."""
        self._why_refused = FORKED

    async def start(self) -> None:
        raise NotImplementedError

    async def stop(self) -> None:
        """Finish every write that was accepted, then close."""
        raise NotImplementedError

    async def read(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(*args)`, a point look-up or the like. Raises Unavailable if the database cannot be read."""
        raise NotImplementedError

    async def scan(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(*args)` in a worker thread, for what may take long. Raises Unavailable."""
        raise NotImplementedError

    async def write(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(*args)` in a transaction; returns when its commit is durable.

        `fn` touches nothing but the database: it is run again where something passing was in its way. Raises what
        `fn` raised (then it alone is rolled back), or Unavailable if it could not be committed.
        """
        raise NotImplementedError

    async def write_together(self, fn: Callable[[list[Any]], Sequence[T]], item: Any) -> T:
        """Like `write` of `fn([item])[0]`, but `fn` is called once with the items of all such writes that wait.

        One statement for a whole group costs little more than one for a single write. `fn` returns a result for each
        item, in order.
        """
        raise NotImplementedError

    def listen(self, wake: Callable[[], None]) -> None:
        """Call `wake` on the loop when another process has queued something, as far as the database can tell."""

    def notify(self) -> None:
        """Tell the other processes, soon, that something is queued. From any thread; one lost costs them a poll."""


def storage_of(db: Database, pool_size: int = POOL_SIZE) -> Storage:
    return PostgresStorage(db, pool_size) if is_postgres(db) else SqliteStorage(db)


class SqliteStorage(Storage):
    """Reads on the event loop's own connection, writes in one thread that commits in groups.

    A point look-up in WAL mode takes less than a hop to a thread, and never waits for the writer. Each statement of the
    writer gives up the GIL and must win it back from the event loop, hence few statements for many writes.
    """

    def __init__(self, db: Database) -> None:
        super().__init__(db)
        self._waiting: list[Job] = []  # of this turn of the event loop
        self._jobs: SimpleQueue[list[Job] | None] = SimpleQueue()
        self._writer: threading.Thread | None = None

    def forked(self) -> None:
        super().forked()
        self._writer = None

    async def start(self) -> None:
        require_own(self.db)
        self._loop = asyncio.get_running_loop()
        self.db.connect(reuse_if_open=True)  # the loop's own, for reads: they never span an await or a transaction
        self._writer = threading.Thread(target=self._write_groups, name="hookline-writer", daemon=True)
        self._writer.start()

    async def stop(self) -> None:
        writer, self._writer = self._writer, None  # from here on writes are refused, not queued behind the end
        if writer is not None:
            self._hand_over()
            self._jobs.put(None)
            await anyio.to_thread.run_sync(writer.join)
        self.db.close()
        self.db.close_all()  # type: ignore[attr-defined]

    async def read(self, fn: Callable[..., T], *args: Any) -> T:
        return read_now(self.db, fn, *args)

    async def scan(self, fn: Callable[..., T], *args: Any) -> T:
        return await anyio.to_thread.run_sync(read_now, self.db, fn, *args)

    async def write(self, fn: Callable[..., T], *args: Any) -> T:
        answer: T = await self._enqueue(fn, args, together=False)
        return answer

    async def write_together(self, fn: Callable[[list[Any]], Sequence[T]], item: Any) -> T:
        answer: T = await self._enqueue(fn, (item,), together=True)
        return answer

    def _enqueue(self, fn: Callable[..., Any], args: tuple[Any, ...], together: bool) -> asyncio.Future[Any]:
        if self._writer is None:
            raise Unavailable(self._why_refused)
        if not self._waiting:  # the writer gets all writes of this turn of the loop at once
            self._loop.call_soon(self._hand_over)
        future = self._loop.create_future()
        self._waiting.append(Job(fn, args, future, together))
        return future

    def _hand_over(self) -> None:
        if self._waiting:
            self._jobs.put(self._waiting)
            self._waiting = []

    def _write_groups(self) -> None:
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
            with unit(self.db):
                return run_all(group)
        except Exception as exc:
            if error_name(exc) == "SQLITE_BUSY":  # waited long enough once
                return [Unavailable(sentence_for(exc))] * len(group)
            return self._commit_each(group)

    def _commit_each(self, group: list[Job]) -> list[Any]:
        try:
            with unit(self.db):
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
        return bool(self.db.connection().in_transaction)


class PostgresStorage(Storage):
    """Reads and writes in worker threads, as many as the pool has connections, each write in its own transaction.

    Units of different kinds never share a transaction: each takes its locks in one order, but not all in the same.
    """

    def __init__(self, db: Database, pool_size: int) -> None:
        super().__init__(db)
        self._pool_size = pool_size
        self._groups: dict[Callable[..., Any], list[Job]] = {}  # what waits, by the function that takes it together
        self._running: set[asyncio.Future[Any]] = set()
        self._refusing = True
        self._notices = Notices(db, self._notify_now)

    def forked(self) -> None:
        super().forked()
        self._refusing = True

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(self._pool_size, "hookline-postgres")
        self._scans = asyncio.Semaphore(max(self._pool_size // 2, 1))  # the other threads are for what is short
        self._refusing = False
        await self._notices.start()

    async def stop(self) -> None:
        if not self._refusing:
            self._refusing = True
            await self._notices.stop()
            while self._running:
                await asyncio.wait(self._running)
            await anyio.to_thread.run_sync(self._threads.shutdown)
        self.db.close_all()  # type: ignore[attr-defined]

    async def read(self, fn: Callable[..., T], *args: Any) -> T:
        self._require_open()
        return await self._in_thread(read_now, self.db, fn, *args)

    async def scan(self, fn: Callable[..., T], *args: Any) -> T:
        async with self._scans:
            return await self.read(fn, *args)

    async def write(self, fn: Callable[..., T], *args: Any) -> T:
        self._require_open()
        writing = self._tracked(self._in_thread(write_now, self.db, fn, *args))
        return await asyncio.shield(writing)  # what was begun is finished, also when the client goes away

    async def write_together(self, fn: Callable[[list[Any]], Sequence[T]], item: Any) -> T:
        self._require_open()
        job = Job(fn, (item,), self._loop.create_future(), together=True)
        if fn in self._groups:
            self._groups[fn].append(job)
        else:
            self._groups[fn] = [job]
            self._tracked(self._write_groups(fn))
        answer: T = await job.future
        return answer

    def listen(self, wake: Callable[[], None]) -> None:
        self._notices.listen(wake)

    def notify(self) -> None:
        if not self._refusing:
            self._notices.tell()

    def _require_open(self) -> None:
        if self._refusing:
            raise Unavailable(self._why_refused)

    def _in_thread(self, fn: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return self._loop.run_in_executor(self._threads, fn, *args)

    def _tracked(self, work: Coroutine[Any, Any, T] | asyncio.Future[T]) -> asyncio.Future[T]:
        """Work that `stop` waits for."""
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def _write_groups(self, fn: Callable[..., Any]) -> None:
        """Commit what waits for `fn`, one group after the other: the next one gathers while one is committed."""
        while group := self._groups[fn][:GROUP_LIMIT]:
            del self._groups[fn][:GROUP_LIMIT]
            try:
                deliver(group, await self._in_thread(write_now, self.db, together, self.db, fn, group))
            except Exception as exc:
                if isinstance(exc, Unknown) or is_lost(exc) or (len(group) == 1 and error_name(exc) != LOCKED):
                    deliver(group, [exc] * len(group))
                else:
                    for job in group:
                        self._tracked(self._write_alone(job))
        del self._groups[fn]

    async def _write_alone(self, job: Job) -> None:
        """In a transaction of its own, so that it neither fails others nor has them wait."""
        try:
            deliver([job], [await self._in_thread(write_now, self.db, job.run)])
        except Exception as exc:
            deliver([job], [exc])

    async def _notify_now(self) -> None:
        await self._in_thread(read_now, self.db, notices.send, self.db)


def together(db: Database, fn: Callable[..., Any], group: list[Job]) -> list[Any]:
    """An answer for each job. If one waits for a lock that somebody holds on to, the others soon go on without it."""
    sql.wait_briefly(db)
    return list(fn([job.args[0] for job in group]))


def write_now(db: Database, fn: Callable[..., T], *args: Any) -> T:
    """`fn(*args)` in a transaction on this thread, again where something passing was in its way. Raises Unavailable."""
    for left in reversed(range(TRIES)):
        try:
            with unit(db):
                return fn(*args)
        except Unknown:
            raise
        except Exception as exc:
            if left and (error_name(exc) in PASSING or (is_lost(exc) and not isinstance(exc, Unreachable))):
                time.sleep(random.uniform(0, PAUSE))  # so that two that collided do not collide again
                continue
            if error_name(exc) in PASSING:
                raise Unavailable(sentence_for(exc)) from exc
            raise
    raise AssertionError("unreachable")


def run_all(group: Sequence[Job]) -> list[Any]:
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
