"""Rows of nobody: a database of the caller's own without foreign keys, and what other tools leave behind."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing

import pytest
from peewee import Database, SqliteDatabase

import models
from hookline import WebhookManager, clock, publish
from hookline.errors import Invalid
from hookline.store.open import storage_of
from hookline.worker import claiming, orphans
from models import stored_time
from tests.conftest import SECRET, only_sqlite, running
from tests.databases import Place

TABLES = ("lanes", "subscriptions", "deliveries", "attempts", "imports", "replays")


@pytest.fixture
def without_foreign_keys(place: Place) -> Database:
    db = SqliteDatabase(str(place.file))
    models.db.initialize(db)
    return db


@only_sqlite
def test_a_database_of_the_callers_own_without_foreign_keys_is_refused(
    without_foreign_keys: Database, place: Place
) -> None:
    with pytest.raises(Invalid, match=r"open it with pragmas=\{'foreign_keys': 1\}"):
        WebhookManager(db=without_foreign_keys)
    with pytest.raises(Invalid, match=r"open it with pragmas=\{'foreign_keys': 1\}"):
        publish("a", {})
    with without_foreign_keys.atomic(), pytest.raises(Invalid, match="foreign keys"):
        publish("a", {})
    without_foreign_keys.close()

    checked = SqliteDatabase(str(place.file), pragmas={"foreign_keys": 1})
    models.db.initialize(checked)
    manager = WebhookManager(db=checked)
    webhook_id = manager.register("http://example.com/", ["a"], SECRET)
    assert publish("a", {}).deliveries == 1
    assert manager.unregister(webhook_id)
    assert counts(checked) == dict.fromkeys(TABLES, 0)
    checked.close()


def counts(db: Database) -> dict[str, int]:
    with db.connection_context():
        return {table: db.execute_sql(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES}


def orphaned(place: Place, db: Database, deliveries: int) -> None:
    """Two webhooks and two events, of which one each are deleted by the `sqlite3` shell and its like."""
    manager = WebhookManager(db=db)
    ids = [manager.register("http://example.com/", ["a"], SECRET) for _ in range(2)]
    for _ in range(deliveries):
        manager.send_event("a", {})
    now = clock.now()
    with db.connection_context(), db.atomic():
        for webhook_id in ids:
            models.Import.insert(webhook_id=webhook_id, entry="{}", imported_at=now).execute(db)
            replay = {"replay_id": webhook_id, "webhook": webhook_id, "since": now, "until": now, "statuses": "all"}
            cursor = json.dumps([stored_time(now), ""])
            models.Replay.insert(replay | {"cursor": cursor, "created_at": now}).execute(db)
        attempt = "INSERT INTO attempts (delivery_id, number, started_at, duration_ms) SELECT delivery_id, 1, ?, 1"
        db.execute_sql(f"{attempt} FROM deliveries", (stored_time(now),))
    with closing(sqlite3.connect(place.file, isolation_level=None)) as shell:
        shell.execute("DELETE FROM webhooks WHERE webhook_id = ?", (ids[0],))
        shell.execute("DELETE FROM events WHERE event_id = (SELECT min(event_id) FROM events)")
        shell.execute("INSERT INTO attempts (delivery_id, number, started_at, duration_ms) VALUES (999999, 1, '', 1)")


@only_sqlite
async def test_sweeps_remove_orphans_and_nothing_else(
    place: Place, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "ROWS", 3)
    monkeypatch.setattr(orphans, "KEYS", 4)
    orphaned(place, db, deliveries=10)
    storage, positions = storage_of(db), orphans.Positions()
    await storage.start()
    for _ in range(10):
        await orphans.sweep(storage, positions)
    await storage.stop()
    assert counts(db) == {
        "lanes": 1,
        "subscriptions": 1,
        "deliveries": 9,
        "attempts": 9,
        "imports": 2,
        "replays": 1,
    }
    with db.connection_context():
        assert db.execute_sql("PRAGMA foreign_key_check").fetchall() == []


@only_sqlite
def test_a_worker_skips_orphaned_lanes_and_removes_them(place: Place, db: Database) -> None:
    orphaned(place, db, deliveries=3)
    with db.connection_context():
        db.execute_sql("DELETE FROM lanes WHERE webhook_id IN (SELECT webhook_id FROM webhooks)")
        assert claiming.next_due(db, []) is None
        assert claiming.next_due(db, ["somebody"]) is None
    with running(place, ALLOWED_NETWORKS="127.0.0.0/8") as server:
        for _ in range(1000):
            if (rows := counts(db))["deliveries"] == 2 and rows["subscriptions"] == 1 and rows["replays"] == 1:
                break
            time.sleep(0.01)  # the sweep of another process: there is no signal to wait on
        printed = server.stop()
    with db.connection_context():
        assert db.execute_sql("PRAGMA foreign_key_check").fetchall() == []
    assert "removed 1 rows of lanes whose webhook_id is not in webhooks" in printed
    assert "Traceback" not in printed, printed
