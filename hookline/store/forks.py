"""Forks: a child never uses, returns or closes a connection of its parent, and opens its own.

PostgreSQL: a connection is a socket to the parent's session. The child keeps it open and does not touch it.

SQLite: locks belong to a file and a process. While a handle of the parent is open in the child, a new handle there
takes the parent's locks for its own, and the parent deletes the `-wal` under it when it ends: the child's commits would
be lost. So the child must have no handle of the parent on that file. The parent waits until other threads have given
their connections back, and closes the idle ones before it forks; the child closes the one of the thread that forked. If
a handle is left (a transaction is open, or another thread works for longer than WAIT), the child may not use the file.
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

WAIT = 10.0  # seconds that a fork waits for other threads to give back their SQLite connections
CHECK_EVERY = 0.02  # seconds between two checks whether they have
REFUSED = (
    "this process was forked while its parent used this SQLite database, so it cannot: fork outside of transactions, "
    "and while no other thread uses it, or start the process by spawn"
)


class Forkable(Protocol):
    def forked(self) -> None:
        """Forget, in a child, what only the parent has, such as its threads."""


inherited: set[tuple[int, int]] = set()  # device and inode of the files that the parent had open
_databases: WeakSet[Database] = WeakSet()
_forkables: WeakSet[Forkable] = WeakSet()
_forking = threading.Lock()  # one fork at a time
_locked_pools: list[Any] = []  # until the fork is done


def follow(db: Database) -> None:
    """Keep the connections of this database from children of this process."""
    if ":memory:" not in str(db.database):  # of which a child has its own copy
        _databases.add(db)


def follow_state(forkable: Forkable) -> None:
    """Call `forked` of this object in every child, as long as it exists."""
    _forkables.add(forkable)


def in_child(callback: Callable[[], None]) -> Callable[[], None]:
    """Call this function in every child. A decorator."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=callback)
    return callback


def is_refused(db: Database) -> bool:
    """True if this is SQLite and a handle of the parent on its file is open here: it must not be used."""
    if not inherited or not isinstance(db, SqliteDatabase):
        return False
    with suppress(OSError, TypeError):  # no file, or no name yet
        file = os.stat(db.database)
        return (file.st_dev, file.st_ino) in inherited
    return False


def _before() -> None:
    """In the parent: lock every pool of SQLite, wait for its connections in use, close the idle ones."""
    _forking.acquire()
    deadline = time.monotonic() + WAIT
    for pool in _pools():
        if pool._pool_lock.acquire(timeout=WAIT):
            _locked_pools.append(pool)
            pool.is_forking = True  # it gives out no connections now
            while _others_work(pool) and (left := deadline - time.monotonic()) > 0:
                pool._pool_available.wait(min(left, CHECK_EVERY))  # Peewee wakes one thread, not always this one
            pool.close_idle()


def _pools() -> Iterator[Any]:
    for db in list(_databases):
        if isinstance(db, SqliteDatabase) and isinstance(db, PooledDatabase):
            yield db


def _others_work(pool: Any) -> bool:
    """Do other threads have connections that they checked out less than WAIT ago? Older ones are not waited for."""
    own, since = id(pool._state.conn), time.time() - WAIT
    return any(key != own and entry.checked_out > since for key, entry in pool._in_use.items())


def _in_parent() -> None:
    while _locked_pools:
        pool = _locked_pools.pop()
        pool.is_forking = False
        pool._pool_available.notify_all()
        pool._pool_lock.release()
    _forking.release()


def _in_child() -> None:
    global _forking
    _forking = threading.Lock()
    _locked_pools.clear()
    inherited.clear()
    files = [_leave(db) for db in list(_databases)]
    if any(files):
        inherited.update(_open_files())
    for forkable in list(_forkables):
        forkable.forked()


def _leave(db: Any) -> bool:
    """Set a database back to before its first connection; returns whether it is SQLite."""
    is_sqlite, own = isinstance(db, SqliteDatabase), db._state.conn
    if is_sqlite and own is not None:
        with suppress(Exception):  # `own` may be closed already
            if not own.in_transaction:
                own.close()
    _never_collect(own)
    db._state.reset()
    if db.thread_safe and not isinstance(db._lock, nullcontext):  # as in `PostgresPool`, which keeps it
        db._lock = threading.Lock()  # a thread of the parent may hold it
    if isinstance(db, PooledDatabase):
        _never_collect(db._connections, db._in_use)
        db._pool_lock = threading.RLock()
        db._pool_available = threading.Condition(db._pool_lock)
        db._connections, db._in_use = [], {}
        db.is_forking, db.connecting = False, 0
    return is_sqlite


def _never_collect(*handles: Any) -> None:
    """Keep these even when Python ends, since collecting a connection closes it."""
    for handle in handles:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(handle))


def _open_files() -> Iterator[tuple[int, int]]:
    try:
        numbers = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:
        numbers = list(range(1024))
    for number in numbers:
        with suppress(OSError):
            file = os.fstat(number)
            if stat.S_ISREG(file.st_mode):
                yield file.st_dev, file.st_ino


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
