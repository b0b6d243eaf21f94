"""Connections: a pool for each kind of database, and the settings of every new connection."""

from __future__ import annotations

import heapq
import os
import select
import sqlite3
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

from peewee import (
    Database,
    OperationalError,
    PostgresqlDatabase,
    Psycopg3Adapter,
)
from playhouse.pool import (
    MaxConnectionsExceeded,
    PoolConnection,
    PooledPostgresqlDatabase,
    PooledSqliteDatabase,
)

LOCK_TIMEOUT = 10  # seconds, on PostgreSQL
SESSION = {  # relied on, whatever the defaults of the server, the database and the role are
    "timezone": "UTC",
    "datestyle": "ISO",
    "default_transaction_isolation": "read committed",  # see locks.py
    "lock_timeout": f"{LOCK_TIMEOUT}s",
    "jit": "off",  # it costs more than any statement of ours takes
}


def is_postgres(db: Database) -> bool:
    """True for PostgreSQL, False for SQLite."""
    return isinstance(db, PostgresqlDatabase)


class Adapter(Psycopg3Adapter):
    """Set up each new connection, and check an idle one without a round trip."""

    def connect(self, db: Database, **parameters: Any) -> Any:
        from psycopg import connect

        try:
            connection = connect(**parameters, autocommit=True)  # transactions are begun by name
        except UnicodeError as exc:
            raise OperationalError("a part of the host's name is empty or too long") from exc
        seconds = db.statement_timeout  # type: ignore[attr-defined]
        limits = {"statement_timeout": f"{seconds}s", "idle_in_transaction_session_timeout": f"{2 * seconds}s"}
        values = {**SESSION, **limits}
        calls = ", ".join(["set_config(%s, %s, false)"] * len(values))
        connection.execute(f"SELECT {calls}".encode(), [part for pair in values.items() for part in pair])
        # An acknowledged commit must be on the disk; a default that is stricter than "on" is left alone.
        durable = "SELECT set_config('synchronous_commit', 'on', false) "
        connection.execute(durable + "WHERE current_setting('synchronous_commit') = 'off'")
        return connection

    def is_connection_closed(self, conn: Any) -> bool:
        """Ask the socket: it is readable only if the server has closed it, since an idle server sends nothing."""
        if self.is_connection_reusable(conn):
            poll = select.poll()
            poll.register(conn.fileno(), select.POLLIN)
            if not poll.poll(0):
                return False
        conn.close()  # the pool drops it without closing its socket
        return True


class PostgresPool(PooledPostgresqlDatabase):  # type: ignore[misc]
    """Peewee's pool, but connections are made outside its locks.

    While the server does not answer, a thread that needs a new connection waits; all others go on.
    """

    psycopg3_adapter = Adapter

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lock = nullcontext()  # Peewee's guards only this thread's state

    def _connect(self) -> Any:
        reserved = object()
        with self._pool_lock:
            while self._connections:
                since, _, connection = heapq.heappop(self._connections)
                if not self._is_closed(connection):
                    if not self._is_stale(since):
                        self._in_use[id(connection)] = PoolConnection(since, connection, time.time())
                        return connection
                    self._close_raw(connection)
            if len(self._in_use) >= self._max_connections:
                raise MaxConnectionsExceeded
            self._in_use[id(reserved)] = PoolConnection(time.time(), None, time.time())
        connection = None
        try:
            connection = PostgresqlDatabase._connect(self)  # type: ignore[attr-defined]  # not the pool's
        finally:
            with self._pool_lock:
                closed = self._in_use.pop(id(reserved), None) is None  # by `close_all`
                if connection is None:
                    self._pool_available.notify()
                elif not closed:
                    self._in_use[id(connection)] = PoolConnection(time.time(), connection, time.time())
        if closed:
            connection.close()
            raise OperationalError("the pool was closed")
        return connection


checked_out = partial(tuple.__new__, PoolConnection)  # the constructor costs as much as the lock


class SqlitePool(PooledSqliteDatabase):  # type: ignore[misc]
    """Peewee's pool with a fast path: checking out an idle connection and giving it back costs 2 µs instead of 7.

    `connect` and `close` change Peewee's own structures under its lock, and leave to Peewee whatever is not plain: no
    idle connection, a thread that waits for one, a transaction left open, a fork. The newest idle connection is taken,
    since its page cache is the warmest; Peewee's heap order does not matter, because no connection becomes stale.
    The pool never creates the file, and gives out nothing while this process forks.
    """

    is_forking = False
    connecting = 0  # threads that wait for a connection or make one: Peewee's `close` wakes them

    def connect(self, reuse_if_open: bool = False) -> Any:
        state = self._state.__dict__  # this thread's; each access through the thread-local object costs 50 ns
        if not state["closed"]:
            return super().connect(reuse_if_open)
        with self._pool_lock:
            if self._connections and not self.is_forking:
                since, _, connection = self._connections.pop()
                self._in_use[id(connection)] = checked_out((since, connection, time.time()))
                state["conn"], state["closed"] = connection, False
                return True
            self.connecting += 1
        try:
            return super().connect(reuse_if_open)
        finally:
            with self._pool_lock:
                self.connecting -= 1

    def close(self) -> Any:
        state = self._state.__dict__
        connection = state["conn"]
        used = state["transactions"] or state["ctx"] or state["commit_callbacks"]
        try:
            clean = not used and connection is not None and not connection.in_transaction
        except sqlite3.ProgrammingError:  # it was closed behind the pool's back
            clean = False
        if clean:
            with self._pool_lock:
                if not (self.is_forking or self.connecting) and (entry := self._in_use.pop(id(connection), None)):
                    self._heap_counter += 1
                    self._connections.append((entry[0], self._heap_counter, connection))
                    state["conn"], state["closed"] = None, True
                    return True
        return super().close()

    def _connect(self) -> Any:
        if self.is_forking:
            raise MaxConnectionsExceeded
        if not self._connections and not os.path.exists(self.database):
            raise OperationalError(f"there is no database at {self.database}")
        return super()._connect()
