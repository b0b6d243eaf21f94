"""Forks: a child never uses, returns or closes a connection of its parent's, and opens its own.

PostgreSQL: a connection is a socket to the parent's session. The child keeps it untouched.

SQLite keeps its locks by file for the whole process. While a handle of the parent's is open in the child, a new one
there takes the parent's locks for its own, and the parent removes the `-wal` under it when it ends. So the child must
have no handle of the parent's on that file: the parent closes idle ones before it forks, and the child closes that of
the thread that forked, which does nothing else now. If one is left (in a transaction, or in use by another thread),
the child is refused the file: nothing is acknowledged that would be lost.
"""

from __future__ import annotations

import ctypes
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any, Protocol
from weakref import WeakSet

from peewee import Database, SqliteDatabase
from playhouse.pool import PooledDatabase

WAIT = 10.0  # seconds that a fork waits for other threads to give back their connections to SQLite
LOOK = 0.02  # seconds between looks whether they have
REFUSED = (
    "this process was forked while its parent used this SQLite database, so it cannot: fork outside of transactions, "
    "and while no other thread uses it, or start the process by spawn"
)


class Forkable(Protocol):
    def forked(self) -> None:
        """Called in a child: let go of what only the parent has, such as its threads."""


inherited: set[tuple[int, int]] = set()  # device and inode of the files that came open from the parent
_databases: WeakSet[Database] = WeakSet()
_forkables: WeakSet[Forkable] = WeakSet()
_one_at_a_time = threading.Lock()
_held: list[Any] = []  # the pools that are held until the fork is done


def follow(db: Database) -> None:
    """Keep the connections of this database to the process that opened them."""
    if ":memory:" not in str(db.database):  # a child has its own copy of that
        _databases.add(db)


def follow_state(forkable: Forkable) -> None:
    """Call its `forked` in every child that has it."""
    _forkables.add(forkable)


def in_child(callback: Callable[[], None]) -> Callable[[], None]:
    """Call it in every child (a decorator)."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=callback)
    return callback


def is_refused(db: Database) -> bool:
    """Must this process not use the file of this SQLite database, because its parent's handle is still open here?"""
    if not inherited or not isinstance(db, SqliteDatabase):
        return False
    with suppress(OSError, TypeError):  # no file, or no name yet
        found = os.stat(db.database)
        return (found.st_dev, found.st_ino) in inherited
    return False


def _before() -> None:
    """In the parent: hold every pool of SQLite, and close what is idle in it."""
    _one_at_a_time.acquire()
    deadline = time.monotonic() + WAIT
    for pool in _pools():
        if pool._pool_lock.acquire(timeout=WAIT):
            _held.append(pool)
            pool.is_forking = True  # nobody gets a connection now
            while _others(pool) and (left := deadline - time.monotonic()) > 0:
                pool._pool_available.wait(min(left, LOOK))  # Peewee wakes one of those that wait, and not always us
            pool.close_idle()


def _pools() -> Iterator[Any]:
    for db in list(_databases):
        if isinstance(db, SqliteDatabase) and isinstance(db, PooledDatabase):
            yield db


def _others(pool: Any) -> bool:
    """Do other threads have connections that they will give back soon? What is held for long is held for good."""
    own, since = id(pool._state.conn), time.time() - WAIT
    return any(key != own and held.checked_out > since for key, held in pool._in_use.items())


def _in_parent() -> None:
    while _held:
        pool = _held.pop()
        pool.is_forking = False
        pool._pool_available.notify_all()
        pool._pool_lock.release()
    _one_at_a_time.release()


def _in_child() -> None:
    global _one_at_a_time
    _one_at_a_time = threading.Lock()
    _held.clear()
    inherited.clear()
    files = [_leave(db) for db in list(_databases)]
    if any(files):
        inherited.update(_open_files())
    for forkable in list(_forkables):
        forkable.forked()


def _leave(db: Any) -> bool:
    """Make a database as it was before its first connection; returns whether it is SQLite."""
    is_sqlite, own = isinstance(db, SqliteDatabase), db._state.conn
    if is_sqlite and own is not None:
        with suppress(Exception):  # `own` may be closed already
            if not own.in_transaction:
                own.close()
    _keep(own)
    db._state.reset()
    if db.thread_safe and not isinstance(db._lock, nullcontext):  # which `PostgresPool` has, and keeps
        db._lock = threading.Lock()  # another thread of the parent's may have had it
    if isinstance(db, PooledDatabase):
        _keep(db._connections, db._in_use)
        db._pool_lock = threading.RLock()
        db._pool_available = threading.Condition(db._pool_lock)
        db._connections, db._in_use = [], {}
        db.is_forking, db.connecting = False, 0
    return is_sqlite


def _keep(*handles: Any) -> None:
    """For ever, also when Python ends: a connection that is collected is closed."""
    for handle in handles:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(handle))


def _open_files() -> Iterator[tuple[int, int]]:
    try:
        numbers = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:
        numbers = list(range(1024))
    for number in numbers:
        with suppress(OSError):
            found = os.fstat(number)
            if stat.S_ISREG(found.st_mode):
                yield found.st_dev, found.st_ino


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
