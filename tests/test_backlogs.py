"""However much waits for a webhook, what changes its lane reads no more rows: else every writer would wait for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from peewee import Database

from hookline import WebhookManager, clock, deliveries, lanes, removal, webhooks
from hookline.store.open import storage_of
from hookline.store.pool import is_postgres
from hookline.store.units import transaction
from hookline.worker import claiming, settling
from models import stored_time
from tests.conftest import SECRET, Server
from tests.working import claim_up_to

FEW, MANY = 200, 40_000
ALLOWED = 1500  # rows more, or hundreds of steps of SQLite's machine


@pytest.fixture
def webhook_id(manager: WebhookManager) -> str:
    return manager.register("http://127.0.0.1:9/", ["goal"], SECRET)


def wait(db: Database, webhook_id: str, first: int, last: int, due: str) -> None:
    """Let deliveries wait for the webhook."""
    numbers = f"generate_series({first}, {last}) AS numbers(n)"
    if not is_postgres(db):
        series = f"SELECT {first} AS n UNION ALL SELECT n + 1 FROM series WHERE n < {last}"
        numbers = f"(WITH RECURSIVE series(n) AS ({series}) SELECT n FROM series) AS numbers"
    now = stored_time(clock.now())
    with db.connection_context(), db.atomic():
        db.execute_sql(
            "INSERT INTO events (event_id, event_type, payload, created_at) "
            f"SELECT 'evt_' || n, 'goal', '{{}}', '{now}' FROM {numbers}"
        )
        db.execute_sql(
            "INSERT INTO deliveries (webhook_id, event_id, next_attempt_at, created_at) "
            f"SELECT '{webhook_id}', 'evt_' || n, '{due}', '{now}' FROM {numbers}"
        )
    if is_postgres(db):
        with db.connection_context():
            db.execute_sql("ANALYZE")


def work(db: Database, change: Callable[[], Any]) -> int:
    """How many rows PostgreSQL reads for a change, or how many hundreds of steps SQLite takes."""
    steps: list[None] = []
    read = """
        SELECT sum(pg_stat_get_xact_tuples_returned(oid) + pg_stat_get_xact_tuples_fetched(oid))
        FROM pg_class WHERE relnamespace = 'public'::regnamespace"""
    with transaction(db):
        if is_postgres(db):
            before = db.execute_sql(read).fetchone()[0]  # of what its session has not reported yet
            change()
            return int(db.execute_sql(read).fetchone()[0] - before)
        db.connection().set_progress_handler(lambda: steps.append(None), 100)
        change()
        db.connection().set_progress_handler(None, 100)
    return len(steps)


def release(db: Database, webhook_id: str) -> None:
    made = f"SELECT min(delivery_id) FROM deliveries WHERE webhook_id = '{webhook_id}'"
    first = db.execute_sql(made).fetchone()[0]
    db.execute_sql(f"UPDATE deliveries SET leased = TRUE WHERE delivery_id = {first}")
    claiming.release(db, [first])


def disable(db: Database, webhook_id: str) -> None:
    assert settling.disable(db, [webhook_id], "gone", stored_time(clock.now())) == [webhook_id]
    db.execute_sql("UPDATE webhooks SET enabled = TRUE")


def retry(db: Database, webhook_id: str) -> None:
    last = db.execute_sql("SELECT max(delivery_id) FROM deliveries").fetchone()[0]
    deliveries.retry(db, last)


def claim(db: Database, webhook_id: str) -> None:
    jobs = claim_up_to(db, 1)
    assert len(jobs) == 1
    claiming.release(db, [jobs[0].delivery_id])


def change_its_url(db: Database, webhook_id: str) -> None:
    WebhookManager(db=db).update(webhook_id, {"url": "http://127.0.0.1:9/other"})


CHANGES = [release, disable, retry, claim, change_its_url]


@pytest.mark.parametrize("ordered", [False, True])
def test_what_waits_for_a_webhook_does_not_make_a_change_of_its_lane_longer(
    db: Database, manager: WebhookManager, webhook_id: str, ordered: bool
) -> None:
    manager.update(webhook_id, {"ordered": ordered})
    due = lanes.next_attempt_at(ordered, stored_time(clock.now()))
    wait(db, webhook_id, 1, FEW, due)
    before = works(db, webhook_id)
    wait(db, webhook_id, FEW + 1, MANY, due)
    allowed = ALLOWED if is_postgres(db) else 50
    longer = {name: work for name, work in works(db, webhook_id).items() if work >= before[name] + allowed}
    assert longer == {}, before


def works(db: Database, webhook_id: str) -> dict[str, int]:
    """Make each change once, with an open lane."""
    done = {}
    for change in CHANGES:
        lanes.open_lanes(db, [webhook_id], now=True)
        done[change.__name__] = work(db, functools.partial(change, db, webhook_id))
    return done


def left(db: Database) -> tuple[int, int]:
    """How many webhooks and deliveries there are."""
    with db.connection_context():
        tables = ("webhooks", "deliveries")
        webhooks, rows = (db.execute_sql(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables)
    return webhooks, rows


def test_deleting_a_webhook_with_many_deliveries_holds_up_no_writer(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    wait(db, webhook_id, 1, 1700, stored_time(clock.now()))
    manager.register("http://127.0.0.1:9/", ["goal"], SECRET)
    most: list[int] = []

    def note(event: Any) -> None:
        if event.sql.strip().startswith("DELETE FROM deliveries"):
            most.append(removal.BATCH)
        elif event.sql.strip().startswith("DELETE FROM webhooks"):
            most.append(db.execute_sql("SELECT count(*) FROM deliveries").fetchone()[0])

    db.query_hooks.append(note)
    assert manager.unregister(webhook_id)
    db.query_hooks.remove(note)
    assert most == [500, 500, 500, 500, 0]
    assert left(db) == (1, 0)


async def test_a_deletion_that_is_cut_off_leaves_a_disabled_webhook_that_can_be_deleted(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    wait(db, webhook_id, 1, 1700, stored_time(clock.now()))
    storage = storage_of(db)
    await storage.start()
    await removal.delete_deliveries_beside(storage, webhook_id)
    shown = await storage.read(webhooks.get, webhook_id)
    assert (shown["enabled"], shown["disabled_reason"]) == (False, "it is being deleted")
    assert await storage.write(webhooks.unregister, webhook_id)
    await storage.stop()
    assert left(db) == (0, 0)


def test_deleting_a_webhook_with_many_deliveries_over_http(server: Server, db: Database) -> None:
    webhook_id = server.register().json()["webhook_id"]
    wait(db, webhook_id, 1, 1700, stored_time(clock.now()))
    assert server.client.delete(f"/api/v1/webhooks/{webhook_id}").status_code == 204
    assert server.client.delete(f"/api/v1/webhooks/{webhook_id}").status_code == 404
    assert left(db) == (0, 0)


def test_a_caller_that_rolls_a_deletion_back_has_everything_again(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    wait(db, webhook_id, 1, 700, stored_time(clock.now()))
    with db.connection_context(), db.atomic() as transaction:
        assert manager.unregister(webhook_id)
        transaction.rollback()
    assert left(db) == (1, 700)
    assert manager.get(webhook_id)["enabled"]
