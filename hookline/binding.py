"""Hookline on one database, for a Python program that publishes there and manages its webhooks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peewee import Database, PostgresqlDatabase, SqliteDatabase

from hookline import events, tables
from hookline.errors import Conflict, Invalid
from hookline.events import NewEvent, Published
from hookline.store import schema
from hookline.store.files import create_private
from hookline.store.open import adopt, open_database
from hookline.store.pool import SqlitePool

if TYPE_CHECKING:
    from hookline.manager import WebhookManager


def connect(database: str | Database) -> Binding:
    """Bind a database; from now on `hookline.publish` uses it, too.

    `database`: a URL, `sqlite:///data/webhooks.db` or `postgresql://user:password@host/name`, or a Peewee database of
    the caller's own, whose transactions then hold what is published in them. Changes nothing there: see
    `Binding.migrate`. Raises Invalid, also if it is SQLite that does not enforce foreign keys, and Unavailable.
    """
    if isinstance(database, str):
        db = open_database(database)
    elif isinstance(database, SqliteDatabase | PostgresqlDatabase) and not database.deferred:
        db = database
        adopt(db)
    else:
        raise Invalid("connect takes the URL of a database, or an initialized SqliteDatabase or PostgresqlDatabase")
    tables.db.initialize(db)
    return Binding(db)


class Binding:
    """Hookline on the Peewee database `db`. Inside `with db.atomic():` every method is part of that transaction.

    One that was opened by its URL does not connect of itself: `with db.connection_context(), db.atomic():`.
    """

    def __init__(self, db: Database) -> None:
        self.db = db

    def migrate(self) -> list[str]:
        """Bring the schema up to date; returns the names of the migrations that were applied.

        Makes the SQLite file of a URL if there is none. Raises Invalid, Unavailable.
        """
        if isinstance(self.db, SqlitePool):  # opened by its URL: unlike Peewee's own classes it makes no file
            create_private(Path(self.db.database))
        return schema.up(self.db)

    def publish(self, event_type: str, data: Mapping[str, Any], idempotency_key: str | None = None) -> Published:
        """Like `hookline.publish`, on this database. Raises Conflict also if it is not migrated."""
        return events.publish_one(self._migrated, NewEvent(event_type, data, idempotency_key))

    @cached_property
    def webhooks(self) -> WebhookManager:
        """The webhooks: register, get, list, update, rotate, unregister. Raises Conflict if it is not migrated.

        Its `startup()` delivers nothing: a service, a worker or a WebhookManager of a URL does.
        """
        from hookline.manager import WebhookManager  # with the HTTP client, which publishing does not need

        return WebhookManager(db=self._migrated)

    @cached_property
    def _migrated(self) -> Database:
        has_file = not isinstance(self.db, SqlitePool) or Path(self.db.database).exists()
        if not has_file or schema.pending(self.db):
            raise Conflict("the database is not migrated: call .migrate() on what hookline.connect returned")
        return self.db
