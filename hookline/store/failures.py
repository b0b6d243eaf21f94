"""Failures of the databases and their meaning: SQLite names its errors, PostgreSQL gives an SQLSTATE."""

from __future__ import annotations

from typing import Any

from peewee import InterfaceError, InternalError, OperationalError
from peewee import __exception_wrapper__ as wrapper  # type: ignore[attr-defined]

in_peewees_words: Any = wrapper  # a block in which the driver's exceptions become Peewee's
FAILURES = (OperationalError, InterfaceError, InternalError)
LOCKED = "55P03"  # lock_not_available
UNKNOWN = "the database is unavailable; nothing was stored, try again"
NOT_MIGRATED = "the database is not migrated: a table or column is missing; nothing was stored"
BUSY = "the database is busy; nothing was stored, try again"
SENTENCES = {
    "SQLITE_FULL": "the disk is full; nothing was stored",
    "SQLITE_BUSY": BUSY,
    "SQLITE_READONLY": "the database is read-only; nothing was stored",
    "53100": "the disk is full; nothing was stored",  # SQLSTATEs of PostgreSQL from here on
    "25006": "the database is read-only; nothing was stored",
    "42501": "the database role lacks a right that it needs; nothing was stored",
    "42P01": NOT_MIGRATED,  # undefined_table
    "42703": NOT_MIGRATED,  # undefined_column
    "23503": BUSY,  # foreign_key_violation: the row that it points at has just been deleted
    "40001": BUSY,  # serialization_failure
    "40P01": BUSY,  # deadlock_detected
    LOCKED: BUSY,
    "57014": BUSY,  # query_canceled, by statement_timeout
}
MISSING = ("no such table", "no such column", "has no column named")  # SQLite has no name for these
OF_OPERATORS = frozenset({"42501", "42P01", "42703"})  # an operator's mistakes, which Peewee raises as ProgrammingError
TRANSIENT = frozenset({"40001", "40P01", "23503"})  # a concurrent change, such as a webhook just deleted


def sentence_for(exc: BaseException) -> str:
    """The reason for a user, without SQL, paths or hosts."""
    if any(words in str(exc) for words in MISSING):
        return NOT_MIGRATED
    return SENTENCES.get(error_name(exc), UNKNOWN)


def error_name(exc: BaseException) -> str:
    """SQLite's primary name of an error, such as SQLITE_FULL, or PostgreSQL's SQLSTATE, along the chain of causes.

    '' if there is none.
    """
    seen: BaseException | None = exc
    name = ""
    while seen is not None:
        extended = getattr(seen, "sqlite_errorname", "") or getattr(getattr(seen, "orig", None), "sqlite_errorname", "")
        if extended and extended != "SQLITE_ERROR":
            name = "_".join(extended.split("_")[:2])
        name = name or getattr(seen, "sqlstate", None) or ""
        seen = seen.__cause__ or seen.__context__
    return name


def is_lost(exc: BaseException) -> bool:
    """True if the connection to PostgreSQL is lost: the server went away, or ended it."""
    name = error_name(exc)
    seen: BaseException | None = exc
    while seen is not None:
        if isinstance(seen, OperationalError | InterfaceError):
            return not name or name.startswith(("08", "57P"))
        seen = seen.__cause__ or seen.__context__
    return False


def reason(exc: BaseException) -> str:
    """The driver's own message, in one line, without its hints. For operators: it may name hosts."""
    lines = [line.strip() for line in str(getattr(exc, "orig", None) or exc).splitlines()]
    hints = ("DETAIL:", "HINT:", "LINE ", "^", "Is the server running")
    return " ".join(line for line in lines if line and not line.startswith(hints))
