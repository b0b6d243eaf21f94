"""Who delivers: heartbeats of workers, and what /ready says of them and of what waits."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from peewee import Database

from hookline import WebhookManager, clock, deliveries
from hookline.egress import Client
from hookline.store import sql
from hookline.store.open import open_database, storage_of
from hookline.worker import heartbeat
from hookline.worker.worker import Worker
from models import Heartbeat, stored_time
from tests.conftest import SECRET, Server, running
from tests.databases import Place, plan, read_whole
from tests.faults.load import worker
from tests.working import rules, until

NONE = (503, {"detail": heartbeat.NONE_BEATS})


def rows(db: Database) -> list[dict[str, Any]]:
    with db.connection_context():
        return list(Heartbeat.select().dicts().bind(db).execute())


def ready(server: Server) -> tuple[int, Any]:
    answer = server.client.get("/ready")
    return answer.status_code, answer.json()


def test_a_process_without_a_worker_is_ready_while_any_worker_beats(place: Place, db: Database) -> None:
    with running(place, RUN_WORKER="false") as server:
        assert ready(server) == NONE
        with worker(place):
            for _ in range(2000):
                if ready(server) == (200, {"status": "ready", "oldest_due_seconds": 0.0}):
                    break
            else:
                raise AssertionError(f"not ready: {ready(server)}")
            assert len(rows(db)) == 1
        assert ready(server) == NONE  # one that was told to stop says so
    assert rows(db) == []


def test_a_killed_worker_is_missed_soon_and_forgotten_after_a_day(
    place: Place, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with db.connection_context():
        assert heartbeat.problem(db) == heartbeat.NONE_BEATS
        began = clock.now()
        heartbeat.beat(db, "wrk_killed", began)
        assert heartbeat.problem(db) is None
        later = began + timedelta(seconds=40)
        monkeypatch.setattr(clock, "now", lambda: later)
        assert heartbeat.problem(db) == heartbeat.NONE_BEATS
        heartbeat.beat(db, "wrk_alive", began)
        assert (heartbeat.problem(db), len(rows(db))) == (None, 2)
        monkeypatch.setattr(clock, "now", lambda: later + timedelta(days=1))
        heartbeat.beat(db, "wrk_alive", began)
        (row,) = rows(db)
        assert (row["worker_id"], row["started_at"], row["beat_at"]) == ("wrk_alive", began, clock.now())


def test_a_beat_from_a_clock_that_was_put_right_since_counts_for_nothing(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = clock.now()
    monkeypatch.setattr(clock, "now", lambda: now + heartbeat.ALIVE + timedelta(seconds=1))
    heartbeat.beat(db, "wrk_ahead", now)
    monkeypatch.setattr(clock, "now", lambda: now)
    assert heartbeat.problem(db) == heartbeat.NONE_BEATS
    heartbeat.beat(db, "wrk_ahead", now)  # it is still there, and beats again
    assert heartbeat.problem(db) is None


async def test_a_worker_beats_from_its_start_to_its_end(place: Place, db: Database) -> None:
    workers = [Worker(storage_of(open_database(place.url)), Client(), rules()) for _ in range(2)]
    for started in workers:
        await started.storage.start()
        await started.start()
    await until(lambda: len(rows(db)) == 2)
    for left, stopped in enumerate(reversed(workers)):
        await stopped.stop()
        await stopped.storage.stop()
        assert len(rows(db)) == 1 - left


def test_ready_says_for_how_long_the_oldest_delivery_has_been_due(
    server: Server, db: Database, manager: WebhookManager
) -> None:
    """Whatever its lane says, which is looked at again and again while it has a backlog."""
    status, answer = ready(server)
    assert (status, answer) == (200, {"status": "ready", "oldest_due_seconds": 0.0})
    server.stop()
    webhook_id = manager.register("http://192.0.2.1/", ["goal"], SECRET)
    manager.send_event("goal", {})
    for ordered in (False, True):
        manager.update(webhook_id, {"ordered": ordered})
        manager.send_event("goal", {})
        ago = stored_time(clock.now() - timedelta(hours=1))
        with db.connection_context():
            column = "created_at" if ordered else "next_attempt_at"
            db.execute_sql(f"UPDATE deliveries SET {column} = {sql.time(db, 'ago')}", {"ago": ago})
        assert 3600 <= deliveries.oldest_due(db) < 3700
    with db.connection_context():
        far = f"UPDATE lanes SET due_at = {sql.time(db, 'later')}"
        db.execute_sql(far, {"later": stored_time(clock.now() + timedelta(hours=1))})
    assert deliveries.oldest_due(db) == 0  # a lane that rests has nothing due


def test_looking_for_the_oldest_due_delivery_seeks(db: Database, manager: WebhookManager) -> None:
    manager.register("http://192.0.2.1/", ["goal"], SECRET)
    manager.send_event("goal", {})
    steps: list[str] = []
    db.query_hooks.append(lambda event: steps.extend(plan(db, event.sql, event.params or ())))
    with db.connection_context():
        deliveries.oldest_due(db)
    db.query_hooks.clear()
    assert any("idx_lanes_due" in step for step in steps)
    assert any("idx_deliveries_pending" in step for step in steps)
    assert read_whole(steps, "deliveries", "d") == []
