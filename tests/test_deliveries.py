"""The log and control of deliveries: what waits for what, retry, cancel and explain."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from peewee import Database

from hookline import WebhookManager, clock, deliveries, history, lanes, policy
from hookline.errors import Conflict, NotFound
from hookline.events import Published
from hookline.lanes import Slots
from hookline.policy import DEFAULT, Result
from hookline.store import sql
from hookline.worker import settling
from hookline.worker.jobs import Settled
from models import stored_time
from tests.conftest import SECRET
from tests.outlets import outlet
from tests.working import claim_up_to

URL = "http://example.com/"
Row = dict[str, Any]


def the_one(db: Database) -> Row:
    (row,) = deliveries.page(db)
    return row


def attempt(db: Database, status_code: int = 500, schedule: Sequence[float] = DEFAULT.retry_schedule) -> list[int]:
    """Claim what is due and settle it as if the endpoint had answered so; returns the ids."""
    with db.connection_context(), db.atomic():
        jobs = claim_up_to(db, 100)
        settled = []
        for job in jobs:
            result = Result(
                clock.now(), 7, status_code, None if status_code < 300 else f"answered {status_code}", "said"
            )
            settlement = policy.settle(
                result,
                attempts=job.attempts + 1,
                failures=job.lane.failures,
                schedule=schedule,
                now=clock.now(),
            )
            settled.append(Settled(job, result, settlement))
        settling.settle(db, settled, stored_time(clock.now() - timedelta(days=5)))
    return [job.delivery_id for job in jobs]


@pytest.fixture
def webhook_id(manager: WebhookManager) -> str:
    return manager.register(URL, ["goal"], SECRET)


@pytest.fixture
def published(manager: WebhookManager, webhook_id: str) -> Published:
    return manager.send_event("goal", {"n": 1})


def test_a_delivery_waits_for_its_turn_then_for_its_back_off(db: Database, published: Published) -> None:
    assert the_one(db)["waiting_for"] == "its turn"
    attempt(db)
    waiting = the_one(db)
    assert waiting["waiting_for"].startswith("back-off")
    assert waiting["next_attempt_at"] > clock.now()
    assert (waiting["status"], waiting["attempts"]) == ("pending", 1)


def test_a_delivery_under_way_waits_for_nothing(db: Database, manager: WebhookManager, webhook_id: str) -> None:
    lanes.attach(db, outlet(Slots(1, 1)))
    manager.send_event("goal", {})
    assert the_one(db)["waiting_for"] == "nothing: it is being made right now"
    with pytest.raises(Conflict, match="right now"), db.connection_context():
        deliveries.retry(db, the_one(db)["delivery_id"])


def test_order_and_rate_limits_are_named(db: Database, manager: WebhookManager, webhook_id: str) -> None:
    manager.update(webhook_id, {"ordered": True})
    for n in range(2):
        manager.send_event("goal", {"n": n})
    second, first = deliveries.page(db)
    assert (first["waiting_for"], second["waiting_for"][:5]) == ("its turn", "order")
    manager.update(webhook_id, {"ordered": False, "rate_limit": 0.1})
    attempt(db, 200)
    assert the_pending(db)["waiting_for"] == "rate limit"


def the_pending(db: Database) -> Row:
    (row,) = deliveries.page(db, status="pending")
    return row


def test_the_log_is_filtered_and_paged(db: Database, manager: WebhookManager, webhook_id: str) -> None:
    other = manager.register(URL, ["goal"], SECRET)
    for n in range(5):
        manager.send_event("goal", {"n": n})
    assert len(deliveries.page(db, webhook_id=other)) == 5
    assert len(deliveries.page(db, status="succeeded")) == 0
    first = deliveries.page(db, limit=4)
    rest = deliveries.page(db, limit=50, before=first[-1]["delivery_id"])
    assert [row["delivery_id"] for row in first + rest] == list(range(10, 0, -1))
    assert {row["webhook_id"] for row in deliveries.page(db, event_id=first[0]["event_id"])} == {webhook_id, other}


def test_retrying_one_that_failed_starts_its_schedule_anew(db: Database, published: Published) -> None:
    attempt(db, 500, schedule=())
    failed = the_one(db)
    assert (failed["status"], failed["reason"]) == ("failed", "answered 500")
    retried = deliveries.retry(db, failed["delivery_id"])
    assert (retried["status"], retried["waiting_for"]) == ("pending", "its turn")
    assert attempt(db, 200) == [failed["delivery_id"]]
    log = deliveries.get(db, failed["delivery_id"])["attempt_log"]
    assert [(row["number"], row["status_code"]) for row in log] == [(1, 500), (2, 200)]


def test_retrying_one_that_backs_off_makes_it_due_now(db: Database, published: Published) -> None:
    (delivery_id,) = attempt(db)
    assert attempt(db) == []
    deliveries.retry(db, delivery_id)
    assert attempt(db, 200) == [delivery_id]


def test_a_cancelled_delivery_is_not_made_and_says_why(db: Database, published: Published) -> None:
    (delivery_id,) = attempt(db)
    cancelled = deliveries.cancel(db, delivery_id)
    assert (cancelled["status"], cancelled["next_attempt_at"]) == ("cancelled", None)
    assert cancelled["reason"] == "cancelled by request; before that: answered 500"
    with pytest.raises(Conflict, match="cancelled already"):
        deliveries.cancel(db, delivery_id)
    with db.connection_context():
        due = f"UPDATE lanes SET due_at = {sql.time(db, 'now')}, open_at = NULL"  # even if its lane came due
        db.execute_sql(due, {"now": stored_time(clock.now())})
    assert attempt(db) == []


def test_a_cancelled_delivery_that_arrives_all_the_same_has_succeeded(db: Database, published: Published) -> None:
    with db.connection_context(), db.atomic():
        (job,) = claim_up_to(db, 10)
    deliveries.cancel(db, job.delivery_id)
    result = Result(clock.now(), 7, 200, None, "ok")
    settlement = policy.settle(result, attempts=1, failures=0, schedule=(), now=clock.now())
    with db.connection_context(), db.atomic():
        settling.settle(db, [Settled(job, result, settlement)], stored_time(clock.now()))
    assert the_one(db)["status"] == "succeeded"


def test_a_result_that_comes_twice_is_recorded_once(db: Database, published: Published) -> None:
    with db.connection_context(), db.atomic():
        (job,) = claim_up_to(db, 10)
    result = Result(clock.now(), 7, 500, "answered 500", None)
    settled = Settled(job, result, policy.settle(result, attempts=1, failures=0, schedule=(5,), now=clock.now()))
    for _ in range(2):
        with db.connection_context(), db.atomic():
            settling.settle(db, [settled], stored_time(clock.now() - timedelta(days=5)))
    assert the_one(db)["attempts"] == 1
    assert len(deliveries.get(db, job.delivery_id)["attempt_log"]) == 1


def test_what_is_not_there_is_not_found(db: Database) -> None:
    for look in (deliveries.get, deliveries.retry, deliveries.cancel):
        with pytest.raises(NotFound):
            look(db, 1)
    with pytest.raises(NotFound):
        history.get(db, "evt_x")
    with pytest.raises(NotFound):
        history.explain(db, "evt_x")


def test_explain_says_for_each_webhook_why(db: Database, manager: WebhookManager) -> None:
    names = {
        manager.register(URL, ["goal"], SECRET): "matched",
        manager.register(URL, ["*"], SECRET): "matched",
        manager.register(URL, ["other"], SECRET): "not subscribed",
        manager.register(URL, ["goal"], SECRET, "buf"): "another team",
    }
    disabled = manager.register(URL, ["goal"], SECRET)
    manager.update(disabled, {"enabled": False})
    names[disabled] = "disabled"
    published = manager.send_event("goal", {"team": "ne"})
    names[manager.register(URL, ["goal"], SECRET)] = "changed since: it would match today"
    explained = history.explain(db, published.event_id)
    assert {row["webhook_id"]: row["reason"] for row in explained} == names
    assert [row["matched"] for row in explained] == [name == "matched" for _, name in sorted(names.items())]
    rest = history.explain(db, published.event_id, after=explained[1]["webhook_id"], limit=3)
    assert rest == explained[2:5]


def test_an_event_shows_its_data_and_how_its_deliveries_fare(db: Database, published: Published) -> None:
    attempt(db, 200)
    event = history.get(db, published.event_id)
    assert event["data"]["n"] == 1
    assert event["deliveries"] == {"pending": 0, "succeeded": 1, "failed": 0, "cancelled": 0}
    assert [(row["event_id"], row["deliveries"]) for row in history.page(db)] == [(published.event_id, 1)]


def test_a_test_event_goes_to_one_webhook_alone(db: Database, manager: WebhookManager, webhook_id: str) -> None:
    manager.register(URL, ["*"], SECRET)
    tested = manager.send_test(webhook_id)
    assert (tested.event_type, tested.deliveries) == ("hookline.webhook.test", 1)
    assert the_one(db)["webhook_id"] == webhook_id
    manager.update(webhook_id, {"enabled": False})
    with pytest.raises(Conflict, match="disabled"):
        manager.send_test(webhook_id)
    with pytest.raises(NotFound):
        manager.send_test("nothing")
