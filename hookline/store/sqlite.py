"""SQLite: short reads on the event loop, and one writer thread that commits in groups."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import anyio.to_thread
from peewee import Database

from hookline.errors import Unavailable
from hookline.store.failures import error_name, sentence_for
from hookline.store.storage import GROUP_LIMIT, Storage, T, Write, read_now, resolve, run_all
from hookline.store.units import connected, unit


class GroupFailed(Exception):
    """The transaction of a whole group was rolled back: none of its writes may be acknowledged."""


class SqliteStorage(Storage):
    """Reads on the event loop's thread, writes on one thread that commits in groups.

    A look-up in WAL mode takes less time than a hop to a thread, and never waits for the writer. Each statement of the
    writer releases the GIL and must get it back from the event loop, hence few statements for many writes.
    """

    def __init__(self, db: Database) -> None:
        super().__init__(db)
        self._waiting: list[Write] = []  # made in this turn of the event loop
        self._handed_over: SimpleQueue[list[Write] | None] = SimpleQueue()
        self._writer: threading.Thread | None = None

    def forked(self) -> None:
        super().forked()
        self._writer = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        with connected(self.db):  # raises Unavailable if it cannot be opened
            pass
        self._writer = threading.Thread(target=self._write_groups, name="hookline-writer", daemon=True)
        self._writer.start()

    async def stop(self) -> None:
        writer, self._writer = self._writer, None  # from here on writes are refused
        if writer is not None:
            self._hand_over()
            self._handed_over.put(None)
            await anyio.to_thread.run_sync(writer.join)
        self.db.close_all()  # type: ignore[attr-defined]

    async def read(self, fn: Callable[..., T], *args: Any) -> T:
        return read_now(self.db, fn, *args)

    async def scan(self, fn: Callable[..., T], *args: Any) -> T:
        return await anyio.to_thread.run_sync(read_now, self.db, fn, *args)

    async def write(self, fn: Callable[..., T], *args: Any) -> T:
        result: T = await self._enqueue(fn, args, together=False)
        return result

    async def write_together(self, fn: Callable[[Database, list[Any]], Sequence[T]], item: Any) -> T:
        result: T = await self._enqueue(fn, (item,), together=True)
        return result

    def _enqueue(self, fn: Callable[..., Any], args: tuple[Any, ...], together: bool) -> asyncio.Future[Any]:
        if self._writer is None:
            raise Unavailable(self._why_refused)
        if not self._waiting:  # hand over all writes of this turn at once
            self._loop.call_soon(self._hand_over)
        future = self._loop.create_future()
        self._waiting.append(Write(fn, args, future, together))
        return future

    def _hand_over(self) -> None:
        if self._waiting:
            self._handed_over.put(self._waiting)
            self._waiting = []

    def _write_groups(self) -> None:
        while (group := self._next_group()) is not None:
            self._loop.call_soon_threadsafe(resolve, group, self._commit(group))

    def _next_group(self) -> list[Write] | None:
        """Wait for at least one write; return all that wait, up to about GROUP_LIMIT, or None once stopped."""
        writes = self._handed_over.get()
        if writes is None:
            return None
        group = list(writes)
        while len(group) < GROUP_LIMIT and not self._handed_over.empty():
            writes = self._handed_over.get()
            if writes is None:
                self._handed_over.put(None)
                break
            group += writes
        return group

    def _commit(self, group: list[Write]) -> list[Any]:
        """Commit a group; returns for each write its result, or the exception that it must raise.

        Savepoints cost as much as the writes, and few groups have a write that fails: so a group is run without them
        first. If one fails everything is rolled back, and the group is run again with a savepoint around each write.
        """
        try:
            with unit(self.db):
                return run_all(self.db, group)
        except Exception as exc:
            if error_name(exc) == "SQLITE_BUSY":  # it has waited for BUSY_TIMEOUT: do not wait again
                return [Unavailable(sentence_for(exc))] * len(group)
            return self._commit_each(group)

    def _commit_each(self, group: list[Write]) -> list[Any]:
        try:
            with unit(self.db):
                return [self._attempt(write) for write in group]
        except Exception as exc:
            failure = exc if isinstance(exc, Unavailable) else Unavailable(sentence_for(exc))
            return [failure] * len(group)

    def _attempt(self, write: Write) -> Any:
        try:
            with self.db.atomic():
                return write.run(self.db)
        except Exception as exc:
            # A full disk or an I/O error may have rolled back the whole transaction, with the other writes.
            if not self._still_in_transaction() or error_name(exc) not in ("", "SQLITE_CONSTRAINT"):
                raise GroupFailed from exc
            return exc

    def _still_in_transaction(self) -> bool:
        return bool(self.db.connection().in_transaction)
