"""Open a database by its URL, and check that it can be used."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

from peewee import Database, DatabaseError, SqliteDatabase

from hookline.errors import Invalid, Unavailable
from hookline.store import forks, pool
from hookline.store.failures import FAILURES, reason
from hookline.store.files import create_private, is_open_to_others
from hookline.store.pool import PostgresPool, is_postgres
from hookline.store.postgres import PostgresStorage
from hookline.store.sqlite import SqliteStorage
from hookline.store.storage import Storage
from hookline.store.units import connected

log = logging.getLogger("hookline")

SQLITE_SCHEME = "sqlite:///"
POSTGRES_SCHEMES = ("postgresql://", "postgres://")

BUSY_TIMEOUT = 30  # seconds that a writer waits for another process, such as an import of a million webhooks
POOL_SIZE = 8  # connections of one process to PostgreSQL
STATEMENT_TIMEOUT = 30  # seconds, on PostgreSQL
STALE = 3600  # seconds until a pooled connection is replaced, so that a fail-over is noticed
LARGE_CACHE = -256 * 1024  # KiB: long work then writes each changed page once

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
FIXED = {"application_name": "hookline", "client_encoding": "utf8"}  # against the URL: `copy` looks for the name


def open_database(
    url: str,
    *,
    create: bool = False,
    pool_size: int = POOL_SIZE,
    long_work: bool = False,
    pragmas: Mapping[str, Any] | None = None,
) -> Database:
    """Return the database at this URL, not yet connected.

    `sqlite:///relative.db`, `sqlite:////absolute.db` or `postgresql://user:password@host:port/name?sslmode=require`.
    `create`: make the file and its folder, for their owner alone, if there is none. `long_work`: for a command whose
    statements may take long. Raises Invalid for any other URL, a file or folder that cannot be made, and PostgreSQL
    without its driver; no message has the URL in it, which may hold a password.
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
    db: Database = pool.SqlitePool(
        str(path),
        pragmas={**PRAGMAS, **large, **(pragmas or {})},
        timeout=BUSY_TIMEOUT,  # the pool's: how long a thread waits for a connection
        check_same_thread=False,
        lock_type="IMMEDIATE",
        autoconnect=False,
        max_connections=64,
    )
    db.timeout = BUSY_TIMEOUT  # type: ignore[attr-defined]  # SQLite's, which the pool does not pass on
    forks.follow(db)
    return db


def _open_postgres(url: str, pool_size: int, long_work: bool) -> Database:
    try:
        from psycopg import ProgrammingError
        from psycopg.conninfo import conninfo_to_dict
    except ImportError as exc:
        raise Invalid("PostgreSQL needs its driver: pip install 'psycopg[binary]>=3.3,<4'") from exc
    try:
        parameters: dict[str, Any] = {**CONNECTION, **conninfo_to_dict(url), **FIXED}
    except (ProgrammingError, UnicodeDecodeError) as exc:
        raise Invalid("this is not a PostgreSQL URL; one is like postgresql://user:password@host:port/name") from exc
    port = str(parameters.get("port", "")).replace(",", "")
    if "@" in f"{parameters.get('host')} {parameters.get('dbname')}" or (port and not port.isdecimal()):
        raise Invalid("a PostgreSQL URL needs @ : / ? % in the user and the password percent-encoded, such as %40")
    db: Database = PostgresPool(
        parameters.get("dbname") or "the default one",  # a name for Peewee: libpq gets the parameters
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
    """Prepare a database that a caller opened, once: check it, and keep its connections from children of a fork.

    Raises Invalid if it is SQLite that does not enforce foreign keys, and Unavailable.
    """
    if db in _adopted:
        return
    if isinstance(db, SqliteDatabase) and not isinstance(db, pool.SqlitePool):
        with connected(db):
            if not db.execute_sql("PRAGMA foreign_keys").fetchone()[0]:
                raise Invalid(
                    "the database does not enforce foreign keys, so that deleting leaves rows behind: "
                    "open it with pragmas={'foreign_keys': 1}"
                )
    forks.follow(db)
    _adopted.add(db)


_adopted: WeakSet[Database] = WeakSet()


def require_reachable(db: Database) -> None:
    """Raise Unavailable or Invalid with the reason why a database cannot be used, for operators: it names paths."""
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


def storage_of(db: Database, pool_size: int = POOL_SIZE) -> Storage:
    """Return a storage for this database, not yet started."""
    return PostgresStorage(db, pool_size) if is_postgres(db) else SqliteStorage(db)
