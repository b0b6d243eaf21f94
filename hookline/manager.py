"""WebhookManager: the replaced service's object, as a drop-in for Python programs, with a worker of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from ipaddress import ip_network
from typing import Any

from peewee import Database

from hookline import events, legacy, tables, webhooks
from hookline.egress import Client
from hookline.errors import NotFound
from hookline.events import NewEvent, Published
from hookline.policy import DEFAULT
from hookline.registration import Registration
from hookline.store import forks, schema
from hookline.store.open import POSTGRES_SCHEMES, SQLITE_SCHEME, adopt, open_database, storage_of
from hookline.worker.worker import Worker

Rows = list[dict[str, Any]]


class WebhookManager:
    """The registrations in one database. Every method is one unit of work, as the functions of `webhooks` are.

    `WebhookManager("data/webhooks.db")` opens that file and brings its schema up to date, creating it if need be; so
    does the URL of a database, such as `postgresql://user:password@host/name`. With `db` it uses that database, which
    has been migrated by hand. `allowed_networks`: where `startup()` may deliver besides public addresses, such as
    `["192.168.0.0/16"]`. Raises Invalid, also if `db` is SQLite that does not enforce foreign keys, and Unavailable.
    """

    def __init__(
        self,
        db_path: str | os.PathLike[str] = "data/webhooks.db",
        *,
        db: Database | None = None,
        allowed_networks: Sequence[str] = (),
    ) -> None:
        self._allowed = [ip_network(network) for network in allowed_networks]
        self._worker: Worker | None = None
        self._owns_database = db is None
        self.db = db if db is not None else open_database(url_of(db_path), create=True)
        if self._owns_database:
            if tables.db.obj is None:
                tables.db.initialize(self.db)
            schema.up(self.db)
        else:
            adopt(self.db)
        forks.follow_state(self)

    def forked(self) -> None:
        """In a child of a fork: the worker is the parent's; `startup()` starts one here."""
        self._worker = None

    async def startup(self) -> None:
        """Deliver from now on, if this object opened its database: else the service does."""
        if self._owns_database and self._worker is None:
            storage = storage_of(self.db)
            await storage.start()
            self._worker = Worker(storage, Client(allowed=self._allowed, timeout=DEFAULT.timeout), DEFAULT)
            await self._worker.start()

    async def shutdown(self) -> None:
        """Finish or release what is in flight, and close the database, if this object opened it."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.stop()
            await worker.storage.stop()
        if self._owns_database:
            self.db.close_all()  # type: ignore[attr-defined]

    def register(
        self,
        url: str,
        events: Sequence[str],
        secret: str,
        team: str | None = None,
        *,
        description: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """Store a webhook; returns its new id. Raises Invalid, Unavailable.

        A secret of fewer than 16 characters is taken, with a warning in the log, as the replaced manager took it.
        """
        return webhooks.register(self.db, Registration(url, events, secret, team, description, headers))

    def unregister(self, webhook_id: str) -> bool:
        """Like `webhooks.unregister`."""
        return webhooks.unregister(self.db, webhook_id)

    def get(self, webhook_id: str) -> dict[str, Any]:
        """Like `webhooks.get`."""
        return webhooks.get(self.db, webhook_id)

    def list(
        self,
        *,
        team: str | None = None,
        event: str | None = None,
        enabled: bool | None = None,
        limit: int = 50,
        after: tuple[datetime, str] | None = None,
    ) -> Rows:
        """Like `webhooks.page`."""
        return webhooks.page(self.db, team=team, event=event, enabled=enabled, limit=limit, after=after)

    def get_all(self) -> Rows:
        """Every webhook in the replaced manager's form: `id`, naive ISO times, the secret as `***`."""
        return legacy.everything(self.db)

    @property
    def webhooks(self) -> Mapping[str, dict[str, Any]]:
        """A read-only mapping of id to webhook that asks the database each time, so that processes agree."""
        return Registrations(self.db)

    def update(self, webhook_id: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Like `webhooks.update`."""
        return webhooks.update(self.db, webhook_id, changes)

    def rotate(self, webhook_id: str, secret: str, overlap_seconds: int) -> datetime | None:
        """Like `webhooks.rotate`."""
        return webhooks.rotate(self.db, webhook_id, secret, overlap_seconds)

    def send_event(self, event_type: str, event_data: Mapping[str, Any]) -> Published:
        """Store an event and a delivery of it to every matching webhook. Raises Invalid, TooLarge, Unavailable.

        They are sent by whichever worker runs on this database: the service's, or ours after `startup()`.
        """
        return events.publish_one(self.db, NewEvent(event_type, event_data))

    def send_test(
        self, webhook_id: str, event_type: str | None = None, data: Mapping[str, Any] | None = None
    ) -> Published:
        """Like `webhooks.send_test`."""
        return webhooks.send_test(self.db, webhook_id, event_type, data)


def url_of(path: str | os.PathLike[str]) -> str:
    """The URL of a database, given as such or as the path of an SQLite file."""
    text = os.fspath(path)
    return text if text.startswith((*POSTGRES_SCHEMES, SQLITE_SCHEME)) else SQLITE_SCHEME + text


class Registrations(Mapping[str, dict[str, Any]]):
    """`manager.webhooks`: the replaced manager's dictionary, read from the database at every use."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def __getitem__(self, webhook_id: str) -> dict[str, Any]:
        try:
            webhook = legacy.shown(webhooks.get(self._db, webhook_id))
        except NotFound:
            raise KeyError(webhook_id) from None
        del webhook["id"]
        return webhook

    def __iter__(self) -> Iterator[str]:
        return iter([webhook["webhook_id"] for webhook in webhooks.everything(self._db)])

    def __len__(self) -> int:
        return webhooks.count(self._db)
