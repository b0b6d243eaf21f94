"""What the databases' failures mean: SQLite names its own, PostgreSQL gives an SQLSTATE."""

from __future__ import annotations

from typing import Any

from peewee import InterfaceError, InternalError, OperationalError
from peewee import __exception_wrapper__ as wrapper  # type: ignore[attr-defined]

in_peewees_words: Any = wrapper  # what a cursor of the driver raises in this block becomes Peewee's
FAILURES = (OperationalError, InterfaceError, InternalError)
LOCKED = "55P03"  # lock_not_available
UNKNOWN = "the database is unavailable; nothing was stored, try again"
BUSY = "the database is busy; nothing was stored, try again"
SENTENCES = {
    "SQLITE_FULL": "the disk is full; nothing was stored",
    "SQLITE_BUSY": BUSY,
    "SQLITE_READONLY": "the database is read-only; nothing was stored",
    "53100": "the disk is full; nothing was stored",  # SQLSTATEs of PostgreSQL from here on
    "25006": "the database is read-only; nothing was stored",
    "42501": "the database role lacks a right that it needs; nothing was stored",
    "23503": BUSY,  # foreign_key_violation: what it points at has just been deleted
    "40001": BUSY,  # serialization_failure
    "40P01": BUSY,  # deadlock_detected
    LOCKED: BUSY,
    "57014": BUSY,  # query_canceled, by the time-out of statements
}
OF_OPERATORS = frozenset({"42501"})  # failures that Peewee takes for the programmer's
TRANSIENT = frozenset({"40001", "40P01", "23503"})  # a concurrent change was in the way: also a webhook just deleted


def sentence_for(exc: BaseException) -> str:
    """Why the database could not do it, without SQL, paths or hosts."""
    return SENTENCES.get(error_name(exc), UNKNOWN)


def error_name(exc: BaseException) -> str:
    """SQLite's primary name of an error, such as SQLITE_FULL, or PostgreSQL's SQLSTATE, along the chain of causes.

    '' if there is none.
    """
    seen: BaseException | None = exc
    name = ""
    while seen is not None:
        found = getattr(seen, "sqlite_errorname", None) or getattr(getattr(seen, "orig", None), "sqlite_errorname", "")
        if found and found != "SQLITE_ERROR":
            name = "_".join(found.split("_")[:2])
        name = name or getattr(seen, "sqlstate", None) or ""
        seen = seen.__cause__ or seen.__context__
    return name


def is_lost(exc: BaseException) -> bool:
    """Did PostgreSQL go away, or end this connection?"""
    name = error_name(exc)
    seen: BaseException | None = exc
    while seen is not None:
        if isinstance(seen, OperationalError | InterfaceError):
            return not name or name.startswith(("08", "57P"))
        seen = seen.__cause__ or seen.__context__
    return False


def reason(exc: BaseException) -> str:
    """What the driver says of a failure, in one line, without its hints."""
    lines = [line.strip() for line in str(getattr(exc, "orig", None) or exc).splitlines()]
    hints = ("DETAIL:", "HINT:", "LINE ", "^", "Is the server running")
    return " ".join(line for line in lines if line and not line.startswith(hints))
