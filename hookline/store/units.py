"""Units of work: this thread's connection, its transaction, and the errors that the database's failures become.

What each block does, by what this thread has when the block begins:

                     no connection           a connection open    our unit of work    a caller's own transaction
    ---------------  ----------------------  -------------------  ------------------  --------------------------
    connected(db)    checks one out of the   uses it, leaves it   uses its            uses its connection
                     pool, gives it back     open                 connection
    transaction(db)  the same, with a        begins and ends      is part of it       is a savepoint in it
                     transaction on it       a transaction
    unit(db)         like `transaction`      like `transaction`   must not be used    must not be used

Functions of the domain read in `connected` and write in `transaction`. `unit` is for storage, which runs them: every
`transaction` block inside is part of it. A transaction that no unit has begun is a caller's own (`in_unit`).

All three raise Unavailable for the database's failures, and Invalid for values that it cannot store.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from peewee import Database, DatabaseError, DataError, IntegrityError
from playhouse.pool import MaxConnectionsExceeded

from hookline.errors import Invalid, Unavailable
from hookline.store import forks
from hookline.store.failures import FAILURES, OF_OPERATORS, TRANSIENT, error_name, is_lost, sentence_for

_thread = threading.local()  # `unit_of`: the database on which this thread runs a unit of work
forks.in_child(lambda: setattr(_thread, "unit_of", None))

UNSTORABLE = "it has a NUL character or a lone surrogate, or is out of range"


class Unreachable(Unavailable):
    """No connection could be had: trying again at once would not help."""


class CommitUnknown(Unavailable):
    """The connection was lost during the commit: it may have been stored, or not."""


class connected:  # a class: it is on every path, and cheaper than a generator
    """Check a connection out of the pool for the block, unless this thread has one open. See the table above.

    Raises Unreachable if there is none to be had, or if this process is a child that must not use the database.
    """

    def __init__(self, db: Database) -> None:
        self.db = db

    def __enter__(self) -> None:
        if forks.inherited and forks.is_refused(self.db):
            raise Unreachable(forks.REFUSED)
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
        if isinstance(exc, (DataError, UnicodeEncodeError)):  # its own message may quote a secret
            raise Invalid(f"the database cannot store one of these values: {UNSTORABLE}") from exc


@contextmanager
def transaction(db: Database) -> Iterator[None]:
    """Commit at the end of the block, or roll back; part of the unit of work or transaction that is open already."""
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
    """Begin a transaction that `transaction` blocks inside are part of. Raises CommitUnknown, Unavailable."""
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
            raise CommitUnknown("the database went away in the middle: it may have been stored, or not") from exc
        raise


def in_unit(db: Database) -> bool:
    """Does this thread run a unit of work on `db`? If not, a transaction that is open is the caller's own."""
    return getattr(_thread, "unit_of", None) is db
