"""Retention: what is old and has ended goes, in small batches, and nothing that waits ever does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from peewee import Database

from hookline import WebhookManager, clock, deliveries, events, history, replays, retention
from hookline.errors import NotFound
from hookline.events import NewEvent
from hookline.retention import Batch
from hookline.store.open import open_database, storage_of
from models import Attempt, Delivery, Event
from tests.conftest import SECRET, manage, only_postgres
from tests.databases import Place, plan, read_whole, wait_for_a_waiter
from tests.working import until

NOW = datetime.fromisoformat("2026-11-23T12:00:00Z")
CUTOFF = NOW - timedelta(days=30)
OLD, RECENT = NOW - timedelta(days=31), NOW - timedelta(days=29)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime], None]:
    """Set the clock."""

    def set_clock(moment: datetime) -> None:
        monkeypatch.setattr(clock, "now", lambda: moment)

    set_clock(OLD)
    return set_clock


def end(db: Database, finished_at: datetime, *conditions: Any, status: str = "succeeded") -> None:
    """Let these deliveries have ended, with an earlier attempt each."""
    with db.connection_context(), db.atomic():
        query = Delivery.select(Delivery.delivery_id).where(Delivery.delivery_id > 0, *conditions)
        ids = [row[0] for row in query.tuples().execute(db)]
        ended = {"status": status, "next_attempt_at": None, "finished_at": finished_at, "attempts": 2}
        Delivery.update(ended).where(Delivery.delivery_id.in_(ids)).execute(db)
        for delivery_id in ids:
            Attempt.insert(delivery=delivery_id, number=1, started_at=OLD, duration_ms=5).execute(db)


def counts(db: Database) -> tuple[int, int, int]:
    with db.connection_context():
        return tuple(table.select().count(db) for table in (Event, Delivery, Attempt))  # type: ignore[return-value]


def purge(db: Database) -> tuple[int, int]:
    return retention.purge_all(db, CUTOFF, lambda done: None)


@pytest.fixture
def webhooks(manager: WebhookManager, at: Any) -> list[str]:
    return [manager.register("http://example.com/", ["goal"], SECRET) for _ in range(3)]


def test_what_is_old_and_has_ended_goes_with_all_that_hangs_on_it(db: Database, webhooks: list[str], at: Any) -> None:
    hookline_events = events.publish_all(db, [NewEvent("goal", {}), NewEvent("nobody", {})])
    at(RECENT)
    kept = events.publish_one(db, NewEvent("goal", {}))
    end(db, OLD, Delivery.event != kept.event_id)
    end(db, RECENT, Delivery.event == kept.event_id)
    assert len(hookline_events) == 2
    assert counts(db) == (3, 6, 6)
    assert retention.count(db, CUTOFF) == (2, 3)
    assert purge(db) == (2, 3)
    assert counts(db) == (1, 3, 3)
    assert [row["event_id"] for row in history.page(db)] == [kept.event_id]
    assert purge(db) == retention.count(db, CUTOFF) == (0, 0)


@pytest.mark.parametrize("status", ["pending", "succeeded"])
def test_an_event_stays_whole_while_one_delivery_waits_or_has_just_ended(
    db: Database, webhooks: list[str], status: str
) -> None:
    events.publish_one(db, NewEvent("goal", {}))
    end(db, OLD, Delivery.webhook != webhooks[0], status="failed")
    end(db, RECENT, Delivery.webhook == webhooks[0])
    if status == "pending":
        with db.connection_context():
            Delivery.update(status="pending", next_attempt_at=OLD).where(Delivery.webhook == webhooks[0]).execute(db)
    assert purge(db) == (0, 0)
    assert counts(db) == (1, 3, 3)


def test_a_large_event_goes_in_many_batches_and_those_that_stay_are_passed_once(
    db: Database, webhooks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH", 2)
    monkeypatch.setattr(retention, "WINDOW", 2)
    stay = [events.publish_one(db, NewEvent("goal", {})) for _ in range(3)]
    go = [events.publish_one(db, NewEvent("goal", {})) for _ in range(2)]
    end(db, OLD, Delivery.event.in_([published.event_id for published in go]))
    seen: list[str] = []
    position: history.Position | None = retention.START
    while position is not None:
        ids, position = retention.ended(db, CUTOFF, position)
        seen += ids
    assert seen == [published.event_id for published in go]
    batches = [retention.purge(db, seen, CUTOFF) for _ in range(4)]
    partial = Batch(events=0, deliveries=2, done=False)
    assert batches == [partial, partial, partial, Batch(events=2, deliveries=0, done=True)]
    assert counts(db) == (3, 9, 0)
    assert len(stay) == 3


def test_what_is_retried_between_two_batches_stays_with_its_event(
    db: Database, webhooks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH", 1)
    published = events.publish_one(db, NewEvent("goal", {}))
    end(db, OLD)
    ids, _ = retention.ended(db, CUTOFF)
    retention.purge(db, ids, CUTOFF)
    left = deliveries.page(db)[0]["delivery_id"]
    deliveries.retry(db, left)
    while not retention.purge(db, ids, CUTOFF).done:
        pass
    assert [(row["delivery_id"], row["status"]) for row in deliveries.page(db)] == [(left, "pending")]
    assert len(deliveries.get(db, left)["attempt_log"]) == 1
    assert history.get(db, published.event_id)["deliveries"]["pending"] == 1


@only_postgres
def test_what_another_process_is_making_pending_is_neither_deleted_nor_waited_for(
    place: Place, db: Database, webhooks: list[str]
) -> None:
    published = events.publish_one(db, NewEvent("goal", {}))
    end(db, OLD)
    ids, _ = retention.ended(db, CUTOFF)
    retried = deliveries.page(db)[0]["delivery_id"]
    other = open_database(place.url)
    with other.connection_context(), other.atomic():
        deliveries.retry(other, retried)
        assert retention.purge(db, ids, CUTOFF) == Batch(events=0, deliveries=2, done=True)
    assert [row["delivery_id"] for row in deliveries.page(db)] == [retried]
    assert history.get(db, published.event_id)
    other.close_all()  # type: ignore[attr-defined]


@only_postgres
async def test_a_replay_of_an_event_that_is_being_purged_is_made_or_finds_it_gone(
    place: Place, db: Database, webhooks: list[str], manager: WebhookManager, at: Any
) -> None:
    """Its foreign key waits for the purge, and is refused: the replay is then made again, without the event."""
    events.publish_one(db, NewEvent("nobody", {}))
    manager.update(webhooks[0], {"events": ["nobody"]})
    at(OLD + timedelta(hours=1))
    replay_id = replays.start(db, webhooks[0], OLD - timedelta(days=1))["replay_id"]
    other = open_database(place.url)
    storage = storage_of(other)
    await storage.start()
    with db.connection_context(), db.atomic():
        ids, _ = retention.ended(db, CUTOFF)
        assert retention.purge(db, ids, CUTOFF).events == 1
        step = replays.find(other, replay_id)
        assert step is not None and len(step.window.missing) == 1
        replay = asyncio.ensure_future(storage.write(replays.record, step))
        await asyncio.to_thread(wait_for_a_waiter, place.url)
        assert not replay.done()
    assert await replay
    await storage.stop()
    assert counts(db) == (0, 0, 0)
    assert replays.get(db, replay_id)["deliveries"] == 0


def test_looking_and_deleting_seek(db: Database, webhooks: list[str]) -> None:
    steps: list[str] = []
    events.publish_one(db, NewEvent("goal", {}))
    end(db, OLD)

    def explain(event: Any) -> None:
        if "FOR UPDATE" not in event.sql and event.sql.strip().startswith(("SELECT", "WITH", "DELETE")):
            steps.extend(plan(db, event.sql, event.params))

    db.query_hooks.append(explain)
    with db.connection_context():
        ids, _ = retention.ended(db, CUTOFF)
        retention.purge(db, ids, CUTOFF)
    db.query_hooks.clear()
    for index in ("idx_events_created", "idx_deliveries_event"):
        assert any(index in step for step in steps), steps
    assert not [step for table in ("events", "deliveries", "attempts") for step in read_whole(steps, table)]


def test_a_key_may_be_used_again_once_its_event_is_gone(db: Database, webhooks: list[str]) -> None:
    first = events.publish_one(db, NewEvent("nobody", {"n": 1}, "key"))
    purge(db)
    second = events.publish_one(db, NewEvent("nobody", {"n": 2}, "key"))
    assert not second.duplicate
    with pytest.raises(NotFound):
        history.get(db, first.event_id)


async def test_a_worker_purges_again_and_again_until_it_stops(
    db: Database, webhooks: list[str], at: Any, caplog: pytest.LogCaptureFixture
) -> None:
    storage = storage_of(db)
    await storage.start()
    first = events.publish_one(db, NewEvent("nobody", {}))
    at(NOW)
    keeping = asyncio.ensure_future(retention.purge_forever(storage, 30 * 86400, every=0.01, first=0))
    for event_id in (first.event_id, None):
        if event_id is None:
            at(OLD)
            events.publish_one(db, NewEvent("nobody", {}))
            at(NOW)
        await until(lambda: counts(db)[0] == 0)
        assert counts(db) == (0, 0, 0)
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping
    await storage.stop()
    assert not caplog.records


def test_writers_get_in_between_the_batches_of_a_purge(
    db: Database, webhooks: list[str], manager: WebhookManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two batches another thread may write: a purge is many units of work."""
    monkeypatch.setattr(retention, "BATCH", 1)
    events.publish_all(db, [NewEvent("goal", {}) for _ in range(2)])
    end(db, OLD)
    registered: list[str] = []

    def register(_: int) -> None:
        thread = threading.Thread(
            target=lambda: registered.append(manager.register("http://example.com/", ["a"], SECRET))
        )
        thread.start()
        thread.join(20)
        assert not thread.is_alive()

    assert retention.purge_all(db, CUTOFF, register) == (2, 6)
    assert len(registered) == 7


def test_the_command_counts_first_and_refuses_what_is_no_duration(place: Place, db: Database, manager: Any) -> None:
    events.publish_one(db, NewEvent("nobody", {}))
    assert manage(place, "purge").stdout == "purged: 0 events, 0 deliveries\n"
    dry = manage(place, "purge", "--older-than", "1ms", "--dry-run")
    assert dry.stdout == "would purge: 1 events, 0 deliveries\n"
    assert counts(db)[0] == 1
    assert manage(place, "purge", "--older-than", "1ms").stdout == "purged: 1 events, 0 deliveries\n"
    assert counts(db)[0] == 0
    for settings, arguments in (({"RETENTION": "off"}, ()), ({}, ("--older-than", "soon"))):
        wrong = manage(place, "purge", *arguments, **settings)
        assert wrong.returncode == 1
        assert "--older-than" in wrong.stderr
        assert "Traceback" not in wrong.stderr


async def test_a_clock_that_jumps_forward_by_more_than_a_day_purges_nothing_and_says_so(
    db: Database,
    webhooks: list[str],
    at: Any,
    place: Place,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until the process has run for a day since; a purge by hand does its work all the same."""
    wall, run = time.time, time.monotonic
    events.publish_one(db, NewEvent("nobody", {}))
    looked: asyncio.Queue[bool] = asyncio.Queue()

    class Told(retention.Watch):
        def trusts_the_clock(self) -> bool:
            looked.put_nowait(trusted := super().trusts_the_clock())
            return trusted

    monkeypatch.setattr(retention, "Watch", Told)
    storage = storage_of(db)
    await storage.start()
    keeping = asyncio.ensure_future(retention.purge_forever(storage, 30 * 86400, every=0.01, first=0))
    assert await looked.get()
    monkeypatch.setattr(time, "time", lambda: wall() + 31 * 86400)
    at(NOW)
    while await looked.get():
        pass
    assert not await looked.get() and counts(db)[0] == 1
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "went forward by 31.0 days" in warning and "manage.py purge" in warning
    assert manage(place, "purge", "--older-than", "1ms").stdout == "purged: 1 events, 0 deliveries\n"
    at(OLD)
    events.publish_one(db, NewEvent("nobody", {}))
    at(NOW)
    assert not await looked.get() and counts(db)[0] == 1
    monkeypatch.setattr(time, "time", lambda: wall() + 32 * 86400)
    monkeypatch.setattr(time, "monotonic", lambda: run() + 86401)
    await until(lambda: counts(db)[0] == 0)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    await storage.stop()


def test_a_clock_that_is_put_right_again_is_trusted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, watch = time.time, retention.Watch()
    for jump, trusted in ((0, True), (86_000, True), (3 * 86_400, False), (3 * 86_400, False), (86_000, True)):
        monkeypatch.setattr(time, "time", lambda jump=jump: wall() + jump)
        assert watch.trusts_the_clock() is trusted
