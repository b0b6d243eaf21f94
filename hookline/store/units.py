"""Units of work: this thread's connection, its transaction, and what the database's failures become.

SQLite is one file; PostgreSQL is reached through psycopg 3. What differs between them is here, in `failures.py`, in
`sql.py` (text of statements), in `pool.py` and in `sqlite.py` and `postgres.py` (who runs them).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from peewee import (
    Database,
    DatabaseError,
    DataError,
    IntegrityError,
)
from playhouse.pool import MaxConnectionsExceeded

from hookline.errors import Invalid, Unavailable
from hookline.store import forks
from hookline.store.failures import FAILURES, OF_OPERATORS, TRANSIENT, error_name, is_lost, sentence_for

log = logging.getLogger("hookline")


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
            if error_name(exc) in TRANSIENT:
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
