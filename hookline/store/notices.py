"""Notices: wake the workers of other processes on PostgreSQL, by LISTEN and NOTIFY.

A NOTIFY locks the whole database server while its transaction commits. So it is sent alone, after the commit that it
tells of, and by each process at most once in QUIET seconds. A lost notice costs a poll, never an event.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from peewee import Database

from hookline.store.failures import FAILURES, reason
from hookline.store.pool import is_postgres

log = logging.getLogger("hookline")

CHANNEL = "hookline"
QUIET = 0.02  # seconds between two notices of one process
RECONNECT = 1.0  # seconds


def send(db: Database) -> None:
    """Send a notice on this thread's connection, outside a transaction. Failures are ignored. PostgreSQL only."""
    if is_postgres(db):
        with suppress(*FAILURES):
            db.execute_sql(f"NOTIFY {CHANNEL}")


class Notices:
    """A connection that listens, and a task that sends: `send_now` is awaited outside any transaction."""

    def __init__(self, db: Database, send_now: Callable[[], Awaitable[None]]) -> None:
        self.db, self._send_now = db, send_now
        self.heard: Callable[[], None] | None = None
        self._connection: Any = None
        self._socket = -1

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._to_send, self._disconnected = asyncio.Event(), asyncio.Event()
        self._tasks = [self._loop.create_task(self._send())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._drop()

    def listen(self, heard: Callable[[], None]) -> None:
        self.heard = heard
        self._tasks.append(self._loop.create_task(self._listen()))

    def tell(self) -> None:
        """Send a notice soon. Call it from any thread."""
        self._loop.call_soon_threadsafe(self._to_send.set)

    async def _send(self) -> None:
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            try:
                await self._send_now()
            except Exception as exc:  # the workers poll
                log.debug("a notice was lost: %s", exc)
            await asyncio.sleep(QUIET)

    async def _listen(self) -> None:
        """Listen, and connect again whenever the connection is lost."""
        listening = True
        while True:
            self._disconnected.clear()
            try:
                await self._connect()
                listening = True
                self._wake()  # for notices that were sent while it did not listen
                await self._disconnected.wait()
            except Exception as exc:  # such as psycopg's, which may not be installed
                if listening:  # warn once, not at every try
                    log.warning("not listening for notices, polling goes on: %s", reason(exc))
                listening = False
            finally:
                self._drop()
            await asyncio.sleep(RECONNECT)

    async def _connect(self) -> None:
        opening = asyncio.ensure_future(asyncio.to_thread(self._open))
        try:
            self._connection = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(lambda done: done.exception() or done.result().close())
            raise
        self._socket = self._connection.fileno()
        self._loop.add_reader(self._socket, self._read)

    def _open(self) -> Any:
        """Open a connection that is not of the pool."""
        connection = self.db._adapter.connect(self.db, **self.db.connect_params)  # type: ignore[attr-defined]
        try:
            connection.execute(f"LISTEN {CHANNEL}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _read(self) -> None:
        pgconn, heard = self._connection.pgconn, False
        try:
            pgconn.consume_input()
            while pgconn.notifies() is not None:
                heard = True
        except Exception:
            self._forget_socket()  # it is closed, and its number may soon be used again
            self._disconnected.set()
            return
        if heard:
            self._wake()

    def _wake(self) -> None:
        if self.heard is not None:
            self.heard()

    def _forget_socket(self) -> None:
        if self._socket >= 0:
            self._loop.remove_reader(self._socket)
            self._socket = -1

    def _drop(self) -> None:
        self._forget_socket()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
