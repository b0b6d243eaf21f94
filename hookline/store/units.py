"""Databases: opening one by its URL, this thread's connection to it, its transaction, and who is alone on it.

SQLite is one file; PostgreSQL is reached through psycopg 3. What differs between them is here, in `failures.py`, in
`sql.py` (text of statements) and in `storage.py` (who runs them).
"""

from __future__ import annotations

import heapq
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

from peewee import (
    Database,
    DatabaseError,
    DataError,
    IntegrityError,
    OperationalError,
    PostgresqlDatabase,
    Psycopg3Adapter,
    SqliteDatabase,
)
from playhouse.pool import MaxConnectionsExceeded, PoolConnection, PooledPostgresqlDatabase

from hookline.errors import Conflict, Invalid, Unavailable
from hookline.store import forks
from hookline.store.failures import FAILURES, OF_OPERATORS, PASSING, error_name, is_lost, reason, sentence_for
from hookline.store.files import create_private, is_open_to_others

log = logging.getLogger("hookline")

SQLITE_SCHEME = "sqlite:///"
POSTGRES_SCHEMES = ("postgresql://", "postgres://")
BUSY_TIMEOUT = 30  # seconds that a writer waits for another process, an import of a million webhooks included
POOL_SIZE = 8  # connections of one process to PostgreSQL
STATEMENT_TIMEOUT = 30  # seconds, on PostgreSQL
LOCK_TIMEOUT = 10  # seconds, on PostgreSQL
STALE = 3600  # seconds after which a pooled connection is made anew, so that a fail-over is noticed
LARGE_CACHE = -256 * 1024  # KiB: long work writes more pages than the service keeps, each only once then

PRAGMAS = {
    "journal_mode": "wal",
    "synchronous": "full",
    "foreign_keys": 1,
    "cache_size": -16_000,  # KiB
    "journal_size_limit": 64 * 1024 * 1024,
}
CONNECTION = {
    "connect_timeout": 5,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # ms
}
FIXED = {"application_name": "hookline", "client_encoding": "utf8"}  # whatever the URL says: `copy` looks for the name
SESSION = {  # what we rely on, whatever the server's, the database's and the role's defaults are
    "timezone": "UTC",
    "datestyle": "ISO",
    "default_transaction_isolation": "read committed",  # locks, then looks again: see lanes.py
    "lock_timeout": f"{LOCK_TIMEOUT}s",
    "jit": "off",  # it costs more than any statement of ours takes
}


def open_database(
    url: str,
    *,
    create: bool = False,
    pool_size: int = POOL_SIZE,
    long_work: bool = False,
    pragmas: Mapping[str, Any] | None = None,
) -> Database:
    """The database at this URL, not yet connected.

    `sqlite:///relative.db`, `sqlite:////absolute.db` or `postgresql://user:password@host:port/name?sslmode=require`.
    `create`: make the file and its folder, for their owner alone, if there is none. `long_work`: for a command that may
    run long statements. Raises Invalid for any other URL, a file or folder that cannot be made, or PostgreSQL without
    its driver; no message holds the URL, which may have a password.
    """
    if url.startswith(POSTGRES_SCHEMES):
        return _open_postgres(url, pool_size, long_work)
    if not url.startswith(SQLITE_SCHEME) or url == SQLITE_SCHEME:
        raise Invalid("a database URL must be like sqlite:///data/webhooks.db or postgresql://user:password@host/name")
    path = Path(url.removeprefix(SQLITE_SCHEME)).absolute()
    if path.name == ":memory:":
        raise Invalid("SQLite in memory would be another database for each connection: give the path of a file")
    if create:
        create_private(path)
    large = {"cache_size": LARGE_CACHE} if long_work else {}
    db: Database = forks.SqlitePool(
        str(path),
        pragmas={**PRAGMAS, **large, **(pragmas or {})},
        timeout=BUSY_TIMEOUT,  # the pool's own: how long to wait for a free connection
        check_same_thread=False,
        lock_type="IMMEDIATE",
        autoconnect=False,
        max_connections=64,
    )
    db.timeout = BUSY_TIMEOUT  # type: ignore[attr-defined]  # SQLite's: the pool keeps the argument above to itself
    forks.follow(db)
    return db


def _open_postgres(url: str, pool_size: int, long_work: bool) -> Database:
    try:
        from psycopg import ProgrammingError
        from psycopg.conninfo import conninfo_to_dict
    except ImportError as exc:
        raise Invalid("PostgreSQL needs its driver: pip install -r requirements-postgres.txt") from exc
    try:
        parameters: dict[str, Any] = {**CONNECTION, **conninfo_to_dict(url), **FIXED}
    except (ProgrammingError, UnicodeDecodeError) as exc:
        raise Invalid("this is not a PostgreSQL URL; one is like postgresql://user:password@host:port/name") from exc
    port = str(parameters.get("port", "")).replace(",", "")
    if "@" in f"{parameters.get('host')} {parameters.get('dbname')}" or (port and not port.isdecimal()):
        raise Invalid("a PostgreSQL URL needs @ : / ? % in the user and the password percent-encoded, such as %40")
    db: Database = PostgresPool(
        parameters.get("dbname") or "the default one",  # only a name for Peewee: libpq gets the parameters
        max_connections=pool_size,
        timeout=BUSY_TIMEOUT,
        stale_timeout=STALE,
        prefer_psycopg3=True,
        autoconnect=False,
        **parameters,
    )
    db.statement_timeout = 0 if long_work else STATEMENT_TIMEOUT  # type: ignore[attr-defined]
    forks.follow(db)
    return db


def adopt(db: Database) -> None:
    """Take on a database that a caller opened: keep its connections from children, and check it, once.

    Raises Invalid if it is SQLite that does not enforce foreign keys, Unavailable.
    """
    if db in _adopted:
        return
    if isinstance(db, SqliteDatabase) and not isinstance(db, forks.SqlitePool):
        with connected(db):
            if not db.execute_sql("PRAGMA foreign_keys").fetchone()[0]:
                raise Invalid(
                    "the database does not enforce foreign keys, so that deleting leaves rows behind: "
                    "open it with pragmas={'foreign_keys': 1}"
                )
    forks.follow(db)
    _adopted.add(db)


_adopted: WeakSet[Database] = WeakSet()


class Adapter(Psycopg3Adapter):
    """Sets up each new connection, and checks one that was idle without a round trip."""

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
        # What is acknowledged is on the disk, whatever the server's default is; a stricter default is left alone.
        durable = "SELECT set_config('synchronous_commit', 'on', false) "
        connection.execute(durable + "WHERE current_setting('synchronous_commit') = 'off'")
        return connection

    def is_connection_closed(self, conn: Any) -> bool:
        """A server that went away has closed the socket, and an idle connection has nothing else to say."""
        if self.is_connection_reusable(conn):
            poll = select.poll()
            poll.register(conn.fileno(), select.POLLIN)
            if not poll.poll(0):
                return False
        conn.close()  # the pool forgets it, and would leave its socket open
        return True


class PostgresPool(PooledPostgresqlDatabase):  # type: ignore[misc]
    """Peewee's pool, but connections are made outside its locks.

    A server that does not answer then holds up who needs a new one, and nobody who has one or gives one back.
    """

    psycopg3_adapter = Adapter

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lock = nullcontext()  # what it guards is of each thread

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
            connection = PostgresqlDatabase._connect(self)  # type: ignore[attr-defined]  # the pool's holds its lock
        finally:
            with self._pool_lock:
                closed = self._in_use.pop(id(reserved), None) is None  # by `close_all`, meanwhile
                if connection is None:
                    self._pool_available.notify()
                elif not closed:
                    self._in_use[id(connection)] = PoolConnection(time.time(), connection, time.time())
        if closed:
            connection.close()
            raise OperationalError("the pool was closed")
        return connection


def is_postgres(db: Database) -> bool:
    return isinstance(db, PostgresqlDatabase)


def require_reachable(db: Database) -> None:
    """Raises Unavailable or Invalid that says why it cannot be used: for those who start a program, not for HTTP."""
    if not db.is_closed():
        return
    if not is_postgres(db) and not os.path.exists(db.database):
        raise Unavailable(f"there is no database at {db.database}: run  python manage.py migrate up")
    try:
        db.connect()
    except (*FAILURES, DatabaseError) as exc:
        if is_postgres(db):
            raise Unavailable(f"PostgreSQL cannot be reached: {reason(exc)}") from exc
        raise Unavailable(f"{db.database} cannot be opened: {exc}") from exc
    try:
        encoding = db.execute_sql("SHOW server_encoding").fetchone()[0] if is_postgres(db) else "UTF8"
        if encoding != "UTF8":
            raise Invalid(f"the database's encoding is {encoding}: make one with  ENCODING 'UTF8' TEMPLATE template0")
    finally:
        db.close()
    if not is_postgres(db) and is_open_to_others(db.database):
        log.warning("%s holds secrets, and other users can read it: run  chmod 600  on it", db.database)


_thread = threading.local()  # `unit_of`: the database of which this thread runs a unit of work of ours
forks.in_child(lambda: setattr(_thread, "unit_of", None))

UNSTORABLE = "it has a NUL character or a lone surrogate, or is out of range"


class connected:  # a class, because it is on every path
    """This thread's connection, opened for the block unless the caller already holds one.

    The database's own failures in the block become Unavailable, and values that it cannot store Invalid.
    """

    def __init__(self, db: Database) -> None:
        self.db = db

    def __enter__(self) -> None:
        if forks.inherited:
            require_own(self.db)
        self.opened = self.db.is_closed()
        if self.opened:
            try:
                self.db.connect()
            except (*FAILURES, MaxConnectionsExceeded) as exc:
                raise Unreachable(sentence_for(exc)) from exc

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        if self.opened:
            self.db.close()
        if exc is None:
            return
        if isinstance(exc, FAILURES) or (isinstance(exc, DatabaseError) and error_name(exc) in OF_OPERATORS):
            raise Unavailable(sentence_for(exc)) from exc
        if isinstance(exc, (DataError, UnicodeEncodeError)):  # whose own words may quote a secret
            raise Invalid(f"the database cannot store one of these values: {UNSTORABLE}") from exc


class Unreachable(Unavailable):
    """No connection could be had: trying again at once would not help."""


def require_own(db: Database) -> None:
    """Raises Unreachable in a child of a fork that must not use this database: see forks.py."""
    if forks.is_refused(db):
        raise Unreachable(forks.REFUSED)


class Unknown(Unavailable):
    """The connection was lost while it was committing."""


@contextmanager
def transaction(db: Database) -> Iterator[None]:
    """One unit of work: committed at the end of the block, or, inside a caller's transaction, a savepoint of it.

    Inside a unit that is open already it is a part of that. Failures become Unavailable.
    """
    if in_unit(db):
        yield
        return
    with connected(db):
        try:
            with db.atomic() if db.in_transaction() else unit(db):
                yield
        except IntegrityError as exc:
            if error_name(exc) in PASSING:
                raise Unavailable(sentence_for(exc)) from exc
            raise


@contextmanager
def unit(db: Database) -> Iterator[None]:
    """A transaction that `transaction` blocks inside it are part of, without savepoints of their own."""
    done = False
    try:
        with connected(db), db.atomic():
            _thread.unit_of = db
            try:
                yield
                done = True
            finally:
                _thread.unit_of = None
    except Unavailable as exc:
        if done and is_lost(exc):
            raise Unknown("the database went away in the middle: it may have been stored, or not") from exc
        raise


def in_unit(db: Database) -> bool:
    """Does this thread run a unit of work of ours? If not, a transaction that is open is the caller's own."""
    return getattr(_thread, "unit_of", None) is db


@contextmanager
def alone(db: Database, lock: int, busy: str = "") -> Iterator[None]:
    """One process at a time, on one database: others wait, and say so, or raise Conflict if `busy` has a sentence.

    `lock` is the number of an advisory lock of PostgreSQL. SQLite's lock is on the folder: no lock file is left behind.
    """
    take, give_back = _advisory_lock(db, lock) if is_postgres(db) else _folder_lock(db)
    if not take(False):
        if busy:
            raise Conflict(busy)
        log.warning("waiting for another process that works on this database")
        take(True)
    try:
        yield
    finally:
        give_back()


def _advisory_lock(db: Database, lock: int) -> tuple[Callable[[bool], bool], Callable[[], None]]:
    def take(wait: bool) -> bool:
        if not wait:
            return bool(db.execute_sql("SELECT pg_try_advisory_lock(%s)", (lock,)).fetchone()[0])
        db.execute_sql("SELECT set_config('lock_timeout', '0', false)")
        db.execute_sql("SELECT pg_advisory_lock(%s)", (lock,))
        db.execute_sql("SELECT set_config('lock_timeout', %s, false)", (SESSION["lock_timeout"],))
        return True

    def give_back() -> None:
        with suppress(*FAILURES):  # a connection that was lost has given it back
            db.execute_sql("SELECT pg_advisory_unlock(%s)", (lock,))

    return take, give_back


def _folder_lock(db: Database) -> tuple[Callable[[bool], bool], Callable[[], None]]:
    try:
        import fcntl
    except ImportError:  # Windows: two at once collide, harmlessly
        return lambda wait: True, lambda: None
    folder = os.open(Path(db.database).resolve().parent, os.O_RDONLY)

    def take(wait: bool) -> bool:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    return take, lambda: os.close(folder)
