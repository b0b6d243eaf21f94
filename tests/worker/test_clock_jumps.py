"""Clocks that were wrong: what one that was ahead has set is brought forward, and what is right is left alone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from peewee import Database

from hookline import WebhookManager, clock, events, lanes, policy
from hookline.egress import Client
from hookline.events import NewEvent
from hookline.lanes import Slots
from hookline.policy import Result
from hookline.store.open import storage_of
from hookline.store.postgres import write_now
from hookline.worker import clock_jumps, expired_leases, settling
from hookline.worker.jobs import Job, Settled
from hookline.worker.worker import Worker
from models import Delivery, Lane, stored_time
from tests.conftest import SECRET
from tests.databases import plan, read_whole
from tests.outlets import outlet
from tests.working import claim_up_to, rules, until

NOW = datetime.fromisoformat("2026-11-23T12:00:00Z")
LONG_AGO = stored_time(NOW - timedelta(days=9))
HOUR = 3600.0
AHEAD = 10 * HOUR


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the clock to so many seconds after NOW."""

    def set_clock(seconds: float) -> None:
        monkeypatch.setattr(clock, "now", lambda: NOW + timedelta(seconds=seconds))

    set_clock(0)
    return set_clock


@pytest.fixture
def webhook_id(manager: WebhookManager, at: Any) -> str:
    return manager.register("http://127.0.0.1:9/", ["goal"], SECRET)


def claim(db: Database) -> list[Job]:
    return write_now(db, claim_up_to, 100)


def publish(db: Database, count: int = 1) -> None:
    events.publish_all(db, [NewEvent("goal", {"n": number}) for number in range(count)])


def fail(db: Database, wait: float = 5, retry_after: float | None = None) -> None:
    """Let what is due fail, to be tried again after `wait`."""
    results = []
    for job in claim(db):
        result = Result(clock.now(), 5, 503, None, "said", retry_after)
        decided = policy.settle(result, attempts=1, failures=0, schedule=(wait,), now=clock.now(), spread=1)
        results.append(Settled(job, result, decided))
    write_now(db, settling.settle, results, LONG_AGO)


def look(db: Database) -> int:
    """One whole look, as a worker takes it; how many times it has changed."""
    changed = 0
    following: str | None = ""
    while following is not None:
        late, resting, following = clock_jumps.misdated(db, rules(), following)
        changed += write_now(db, clock_jumps.bring_forward, rules(), late, resting)
    return changed


def due(db: Database) -> list[float]:
    """In how many seconds each pending delivery is due, by its own row."""
    with db.connection_context():
        rows = Delivery.select().where(Delivery.status == "pending")
        return sorted((row.next_attempt_at - clock.now()).total_seconds() for row in rows)


def opens(db: Database) -> list[float]:
    with db.connection_context():
        return [(row.open_at - clock.now()).total_seconds() for row in Lane.select().where(Lane.open_at.is_null(False))]


async def test_a_start_brings_forward_what_a_clock_ahead_had_scheduled(db: Database, webhook_id: str, at: Any) -> None:
    at(AHEAD)
    publish(db, 3)
    fail(db)
    publish(db)
    at(0)
    storage = storage_of(db)
    worker = Worker(storage, Client(), rules())
    await storage.start()
    await worker.start()
    await until(lambda: max(due(db)) < 60)
    await worker.stop()
    await storage.stop()
    assert max(due(db)) < 60


@pytest.mark.parametrize("ahead", [2 * 60, AHEAD, 400 * 24 * HOUR])
@pytest.mark.parametrize("ordered", [False, True])
def test_retries_that_a_clock_ahead_has_set_are_due_now(
    db: Database, manager: WebhookManager, webhook_id: str, at: Any, ahead: float, ordered: bool
) -> None:
    manager.update(webhook_id, {"ordered": ordered})
    at(ahead)
    publish(db, 2)
    fail(db, wait=600)
    at(0)
    assert claim(db) == []
    assert look(db) == (1 if ordered else 3)
    assert len(claim(db)) == 1
    assert look(db) == 0


def test_first_attempts_and_leases_of_a_clock_ahead_are_brought_forward(db: Database, webhook_id: str, at: Any) -> None:
    at(AHEAD)
    publish(db)
    lanes.attach(db, outlet(Slots(9, 9)))  # a worker that takes it and dies
    with db.connection_context():
        db.execute_sql("DELETE FROM lanes")
    publish(db)
    at(0)
    assert due(db) == [AHEAD, AHEAD + 60]
    assert look(db) == 2
    assert due(db) == [0, 60]
    assert look(db) == 0


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("waits", [(24 * HOUR, None), (5, 24 * HOUR), (0.1, None)])  # scheduled, Retry-After
def test_what_waits_as_long_as_it_should_is_left_alone(
    db: Database,
    manager: WebhookManager,
    webhook_id: str,
    at: Any,
    ordered: bool,
    waits: tuple[float, float | None],
) -> None:
    manager.update(webhook_id, {"ordered": ordered})
    publish(db, 2)
    fail(db, *waits)
    for seconds in (0, HOUR, 23 * HOUR):
        at(seconds)
        before = due(db), opens(db)
        assert look(db) == 0
        assert (due(db), opens(db)) == before


def test_a_schedule_of_its_own_may_be_longer_than_a_day(db: Database, manager: WebhookManager, webhook_id: str) -> None:
    manager.update(webhook_id, {"retry_schedule": [30 * 24 * HOUR]})
    publish(db, 2)
    fail(db, 30 * 24 * HOUR)
    assert look(db) == 0
    manager.update(webhook_id, {"retry_schedule": [5]})
    assert look(db) == 2  # longer than the longest step of its schedule, and than a day
    assert due(db) == [0, 0]


def test_a_rate_limit_rests_a_lane_as_long_as_it_should_and_no_longer(
    db: Database, manager: WebhookManager, webhook_id: str, at: Any
) -> None:
    manager.update(webhook_id, {"rate_limit": 0.0001})
    publish(db, 2)
    claim(db)
    assert opens(db) == [10_000]
    assert look(db) == 0
    at(-AHEAD)
    assert look(db) > 0
    assert opens(db) == [0]


def test_a_look_takes_what_is_late_in_steps(
    db: Database, webhook_id: str, at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock_jumps, "LATE", 3)
    monkeypatch.setattr(expired_leases, "WEBHOOKS", 1)
    at(AHEAD)
    publish(db, 10)
    fail(db)
    at(0)
    assert look(db) == 11
    assert set(due(db)) == {0}


def test_a_look_seeks_and_reads_nothing_whole(db: Database, webhook_id: str, at: Any) -> None:
    steps: list[str] = []
    at(AHEAD)
    publish(db, 2)
    fail(db)
    at(0)
    db.query_hooks.append(lambda event: steps.extend(plan(db, event.sql, event.params)))
    with db.connection_context():
        clock_jumps.misdated(db, rules())
    db.query_hooks.clear()
    assert any("idx_deliveries_pending" in step for step in steps), steps
    assert not [
        step for table in ("deliveries d", "lanes l", "webhooks w") for step in read_whole(steps, *table.split())
    ]
