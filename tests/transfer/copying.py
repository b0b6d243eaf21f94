"""A source and a target of a copy, filled with every kind of value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from peewee import Database

import models
from hookline import WebhookManager, events
from hookline.store.open import open_database
from hookline.transfer import rows
from models import Attempt, Delivery, Webhook
from tests import databases as places
from tests.conftest import SECRET
from tests.databases import Place

PAIRS = [("sqlite", "postgres"), ("postgres", "sqlite"), ("sqlite", "sqlite"), ("postgres", "postgres")]
AWKWARD = ["", "\\N", "\t\n\r\\", "'\";--", "ä€😀\u2028", "\x01\x7f", "{}[],", " " * 5]


@contextmanager
def source_and_target(first: str, second: str, folder: Path, empty: bool = False) -> Iterator[tuple[Place, Place]]:
    """A migrated source, and a target that is migrated or empty."""
    for backend in (first, second):
        if reason := places.why_not(backend):
            pytest.skip(reason)
    (folder / "from").mkdir()
    (folder / "to").mkdir()
    make = places.empty if empty else places.migrated
    with places.migrated(first, folder / "from") as source, make(second, folder / "to") as target:
        yield source, target


@contextmanager
def opened(*places: Place) -> Iterator[list[Database]]:
    dbs = [open_database(place.url) for place in places]
    models.db.initialize(dbs[0])
    yield dbs
    for db in dbs:
        db.close_all()  # type: ignore[attr-defined]


def fill(db: Database) -> None:
    """Rows of every table, with every kind of value."""
    manager = WebhookManager(db=db)
    ids = [
        manager.register(f"http://example.com/{n}", ["goal"], SECRET + text, text or None, description=text)
        for n, text in enumerate(AWKWARD)
    ]
    ids.append(manager.register("http://example.com/", ["goal", "*"], SECRET, headers={"X-Own": "mine"}))
    manager.update(ids[-1], {"rate_limit": 0.1, "ordered": True, "retry_schedule": [1.5, 2]})
    manager.update(ids[0], {"enabled": False})
    for text in AWKWARD:
        events.publish_one(db, events.NewEvent("goal", {"text": text, "team": text}, f"key {len(text)} {text!a}"))
    with db.connection_context(), db.atomic():
        changed = {"total_calls": 2**63 - 1, "last_success": models.read_time("9999-12-31T23:59:59.999999Z")}
        Webhook.update(changed).where(Webhook.webhook_id == ids[1]).execute(db)
        numbers = [row[0] for row in Delivery.select(Delivery.delivery_id).tuples().execute(db)]
        Delivery.update(leased=True, attempts=3, last_error="x", last_response="\ufffd").where(
            Delivery.delivery_id == numbers[0]
        ).execute(db)
        at = models.read_time("1970-01-01T00:00:00.000001Z")
        for number in range(1, 3):
            Attempt.insert(delivery=numbers[0], number=number, started_at=at, duration_ms=0, response="").execute(db)
        models.Import.insert(webhook_id=ids[0], entry='{"url": "ä"}', imported_at=at).execute(db)
        models.Replay.insert(
            replay_id="rpl_1", webhook=ids[0], since=at, until=at, statuses="all", cursor="[]", created_at=at
        ).execute(db)


def contents(db: Database) -> dict[str, list[rows.CopiedRow]]:
    with db.connection_context():
        return {
            table.name: sorted((row for batch in rows.read_batches(db, table, 100) for row in batch), key=repr)
            for table in rows.TABLES
        }
