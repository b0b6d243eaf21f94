"""PostgreSQL: worker threads that read and write, each on a connection of the pool."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio.to_thread
from peewee import Database

from hookline.errors import Unavailable
from hookline.store import locks, notices
from hookline.store.failures import LOCKED, TRANSIENT, error_name, is_lost, sentence_for
from hookline.store.notices import Notices
from hookline.store.storage import GROUP_LIMIT, Storage, T, Write, read_now, resolve
from hookline.store.units import CommitUnknown, Unreachable, unit

PAUSE = 0.02  # seconds between two tries, at most
TRIES = 3  # of a write that meets transient failures


class PostgresStorage(Storage):
    """Reads and writes in worker threads, as many as the pool has connections.

    Only writes of `write_together` with the same `fn` share a transaction: each unit of work takes its locks in the
    order of locks.py, and two after one another in a transaction would not.
    """

    def __init__(self, db: Database, pool_size: int) -> None:
        super().__init__(db)
        self._pool_size = pool_size
        self._groups: dict[Callable[..., Any], list[Write]] = {}  # waiting writes, by their `fn`
        self._running: set[asyncio.Future[Any]] = set()
        self._refusing = True
        self._notices = Notices(db, self._notify_now)

    def forked(self) -> None:
        super().forked()
        self._refusing = True

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(self._pool_size, "hookline-postgres")
        self._scans = asyncio.Semaphore(max(self._pool_size // 2, 1))  # the other threads are for short reads
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
        writing = self._start(self._in_thread(write_now, self.db, fn, *args))
        return await asyncio.shield(writing)  # a write is finished even if the client goes away

    async def write_together(self, fn: Callable[[Database, list[Any]], Sequence[T]], item: Any) -> T:
        self._require_open()
        write = Write(fn, (item,), self._loop.create_future(), together=True)
        if fn in self._groups:
            self._groups[fn].append(write)
        else:
            self._groups[fn] = [write]
            self._start(self._write_groups(fn))
        result: T = await write.future
        return result

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

    def _start(self, work: Coroutine[Any, Any, T] | asyncio.Future[T]) -> asyncio.Future[T]:
        """Start work that `stop` waits for."""
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def _write_groups(self, fn: Callable[..., Any]) -> None:
        """Commit the waiting writes of `fn` in groups: the next group gathers while one is committed."""
        while group := self._groups[fn][:GROUP_LIMIT]:
            del self._groups[fn][:GROUP_LIMIT]
            try:
                resolve(group, await self._in_thread(write_now, self.db, run_together, fn, group))
            except Exception as exc:
                if isinstance(exc, CommitUnknown) or is_lost(exc) or (len(group) == 1 and error_name(exc) != LOCKED):
                    resolve(group, [exc] * len(group))
                else:
                    for write in group:
                        self._start(self._write_alone(write))
        del self._groups[fn]

    async def _write_alone(self, write: Write) -> None:
        """Commit a write in a transaction of its own, so that other writes neither fail nor wait with it."""
        try:
            resolve([write], [await self._in_thread(write_now, self.db, write.run)])
        except Exception as exc:
            resolve([write], [exc])

    async def _notify_now(self) -> None:
        await self._in_thread(read_now, self.db, notices.send)


def run_together(db: Database, fn: Callable[..., Any], group: list[Write]) -> list[Any]:
    """Return a result for each write. If one is blocked by a lock the group fails soon, to be made one by one."""
    locks.limit_lock_waits(db)
    return list(fn(db, [write.args[0] for write in group]))


def write_now(db: Database, fn: Callable[..., T], *args: Any) -> T:
    """Run `fn(db, *args)` in a unit of work on this thread, up to TRIES times while it meets transient failures.

    Raises what `fn` raises, and Unavailable; after a CommitUnknown it does not try again.
    """
    for tries_left in reversed(range(TRIES)):
        try:
            with unit(db):
                return fn(db, *args)
        except CommitUnknown:
            raise
        except Exception as exc:
            if tries_left and (error_name(exc) in TRANSIENT or (is_lost(exc) and not isinstance(exc, Unreachable))):
                time.sleep(random.uniform(0, PAUSE))  # random, so that two that collided do not again
                continue
            if error_name(exc) in TRANSIENT:
                raise Unavailable(sentence_for(exc)) from exc
            raise
    raise AssertionError("unreachable")
