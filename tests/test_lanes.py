"""Lanes that rest: a change that removes the cause opens them, and what the endpoint asked for is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from peewee import Database

from hookline import WebhookManager, clock, deliveries, events, lanes, policy
from hookline.events import NewEvent
from hookline.lanes import Slots
from hookline.policy import Result
from hookline.store.postgres import write_now
from hookline.transfer import json_file
from hookline.worker import claiming, settling
from hookline.worker.jobs import Job, Settled
from models import Delivery, Lane, stored_time
from tests.conftest import SECRET, only_sqlite
from tests.databases import plan, read_whole
from tests.outlets import outlet
from tests.working import claim_up_to

NOW = datetime.fromisoformat("2026-11-23T12:00:00Z")
DAY = 86400.0
LONG_AGO = stored_time(NOW - timedelta(days=9))


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the clock to so many seconds after NOW."""

    def set_clock(seconds: float) -> None:
        monkeypatch.setattr(clock, "now", lambda: NOW + timedelta(seconds=seconds))

    set_clock(0)
    return set_clock


@pytest.fixture
def webhook_id(manager: WebhookManager, after: Any) -> str:
    return manager.register("http://example.com/", ["goal"], SECRET)


def publish(db: Database, count: int = 1) -> None:
    events.publish_all(db, [NewEvent("goal", {"n": number}) for number in range(count)])


def claim(db: Database) -> list[Job]:
    return write_now(db, claim_up_to, 100)


def settled(job: Job, status_code: int, retry_after: float | None = None, wait: float = DAY) -> Settled:
    result = Result(clock.now(), 5, status_code, None, "said", retry_after)
    decided = policy.settle(result, attempts=1, failures=job.lane.failures, schedule=(wait,), now=clock.now(), spread=0)
    return Settled(job, result, decided)


def settle(db: Database, *results: Settled) -> None:
    write_now(db, settling.settle, results, LONG_AGO)


def opens(db: Database, webhook_id: str) -> float:
    """In how many seconds its lane opens."""
    with db.connection_context():
        open_at = Lane.select(Lane.open_at).where(Lane.webhook == webhook_id).scalar()
    return 0.0 if open_at is None else max((open_at - clock.now()).total_seconds(), 0.0)


def sent(db: Database) -> list[int]:
    """The deliveries that are sent now, all of them successfully."""
    delivery_ids: list[int] = []
    while jobs := claim(db):
        settle(db, *(settled(job, 200) for job in jobs))
        delivery_ids += [job.delivery_id for job in jobs]
    return delivery_ids


@pytest.mark.parametrize(
    ("new", "rest"), [(None, 0), (0.001, 1000), (0.0005, 2000), (0.0001, 10_000), (0.00005, 10_000)]
)
def test_a_higher_rate_limit_opens_a_lane_that_rests_by_the_old_one(
    db: Database,
    manager: WebhookManager,
    webhook_id: str,
    new: float | None,
    rest: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hookline.registration.MIN_RATE", 0.00001)
    manager.update(webhook_id, {"rate_limit": 0.0001})
    publish(db, 2)
    (job,) = claim(db)
    settle(db, settled(job, 200))
    assert opens(db, webhook_id) == pytest.approx(10_000)
    manager.update(webhook_id, {"rate_limit": new})
    assert opens(db, webhook_id) == pytest.approx(rest)
    if new is None:
        assert len(sent(db)) == 1
        lanes.attach(db, outlet(Slots(9, 9)))
        publish(db)
        assert deliveries.page(db)[0]["waiting_for"] == "nothing: it is being made right now"


@pytest.mark.parametrize("ordered", [False, True])
def test_a_rate_limit_removed_during_an_attempt_does_not_rest_the_lane_after_it(
    db: Database, manager: WebhookManager, webhook_id: str, ordered: bool
) -> None:
    manager.update(webhook_id, {"rate_limit": 0.0001, "ordered": ordered})
    publish(db, 2)
    (job,) = claim(db)
    manager.update(webhook_id, {"rate_limit": None})
    settle(db, settled(job, 200))
    assert opens(db, webhook_id) == 0
    assert len(sent(db)) == 1


def test_without_its_rate_limit_a_failing_endpoint_rests_for_its_back_off_alone(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    manager.update(webhook_id, {"rate_limit": 0.0001, "ordered": True})
    publish(db, 2)
    (job,) = claim(db)
    settle(db, settled(job, 500, wait=10))
    assert opens(db, webhook_id) == pytest.approx(10_000)
    manager.update(webhook_id, {"rate_limit": None})
    assert opens(db, webhook_id) == pytest.approx(5)


def test_another_rate_limit_does_not_undo_what_the_endpoint_asked_for(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    manager.update(webhook_id, {"rate_limit": 10.0})
    publish(db, 2)
    (job,) = claim(db)
    settle(db, settled(job, 429, retry_after=3600))
    for limit in (20.0, None):
        manager.update(webhook_id, {"rate_limit": limit})
        assert opens(db, webhook_id) == pytest.approx(3600)


def test_another_url_is_tried_at_once_by_what_waited_for_the_old_one(
    db: Database, manager: WebhookManager, webhook_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "BROUGHT_FORWARD", 3)
    publish(db, 5)
    settle(db, *(settled(job, 503, retry_after=DAY) for job in claim(db)))
    assert opens(db, webhook_id) == pytest.approx(DAY)
    manager.update(webhook_id, {"url": "http://example.com/another"})
    assert len(claim(db)) == 3  # at once, and not one by one as to an endpoint that fails
    publish(db)
    assert len(claim(db)) == 1
    assert len(deliveries.page(db, status="pending")) == 6


@pytest.mark.parametrize("ordered", [False, True])
def test_what_the_old_url_answers_after_the_change_does_not_rest_the_lane(
    db: Database, manager: WebhookManager, webhook_id: str, ordered: bool
) -> None:
    manager.update(webhook_id, {"ordered": ordered})
    publish(db, 2)
    jobs = claim(db)
    manager.update(webhook_id, {"url": "http://example.com/another"})
    if ordered:
        assert claim(db) == []  # strict order: one at a time, whatever the URL
    settle(db, *(settled(job, 503, retry_after=DAY) for job in jobs))
    assert opens(db, webhook_id) == 0
    publish(db)
    assert len(sent(db)) == (3 if ordered else 1)


def test_new_headers_and_enabling_again_open_the_lane_too(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    publish(db, 3)
    settle(db, *(settled(job, 401, retry_after=DAY) for job in claim(db)))
    manager.update(webhook_id, {"headers": {"Authorization": "mine"}})
    assert opens(db, webhook_id) == 0
    settle(db, *(settled(job, 401, retry_after=DAY) for job in claim(db)))
    manager.update(webhook_id, {"enabled": False})
    manager.update(webhook_id, {"enabled": True})
    publish(db)
    assert len(claim(db)) >= 1


def test_without_strict_order_nothing_waits_any_longer(db: Database, manager: WebhookManager, webhook_id: str) -> None:
    manager.update(webhook_id, {"ordered": True})
    publish(db, 3)
    settle(db, *(settled(job, 500) for job in claim(db)))
    assert opens(db, webhook_id) == pytest.approx(DAY)
    manager.update(webhook_id, {"ordered": False})
    publish(db)
    assert len(sent(db)) == 4


@pytest.mark.parametrize("on_again", [False, True])
def test_strict_order_that_ends_during_an_attempt_sends_nothing_twice(
    db: Database, manager: WebhookManager, webhook_id: str, on_again: bool
) -> None:
    manager.update(webhook_id, {"ordered": True})
    publish(db, 3)
    (job,) = claim(db)
    manager.update(webhook_id, {"ordered": False})
    if on_again:
        manager.update(webhook_id, {"ordered": True})
    assert claim(db) == []
    settle(db, settled(job, 200))
    assert len(sent(db)) == 2
    assert {row["attempts"] for row in deliveries.page(db)} == {1}


def test_what_fails_as_strict_order_ends_waits_for_its_next_attempt_alone(
    db: Database, manager: WebhookManager, webhook_id: str, after: Any
) -> None:
    manager.update(webhook_id, {"ordered": True})
    publish(db, 2)
    (job,) = claim(db)
    manager.update(webhook_id, {"ordered": False})
    settle(db, settled(job, 500))
    assert opens(db, webhook_id) == pytest.approx(5)
    after(6)
    assert job.delivery_id not in sent(db)
    assert deliveries.get(db, job.delivery_id)["next_attempt_at"] == NOW + timedelta(days=1)


def test_a_shorter_schedule_opens_a_lane_of_strict_order(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    manager.update(webhook_id, {"ordered": True})
    publish(db, 2)
    settle(db, *(settled(job, 500) for job in claim(db)))
    manager.update(webhook_id, {"retry_schedule": [10, 20]})
    assert opens(db, webhook_id) == pytest.approx(22)


def test_cancelling_the_head_of_an_ordered_lane_lets_the_next_one_go_at_once(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    manager.update(webhook_id, {"ordered": True})
    publish(db, 3)
    (head,) = claim(db)
    settle(db, settled(head, 500))
    third, second, first = [row["delivery_id"] for row in deliveries.page(db)]
    assert head.delivery_id == first
    deliveries.cancel(db, third)
    assert claim(db) == []  # it is not the one that the lane waits for
    deliveries.cancel(db, first)
    assert sent(db) == [second]


@pytest.mark.parametrize("status_code", [200, 500])
def test_cancelling_the_head_while_it_is_made_lets_the_next_one_go_when_that_ends(
    db: Database, manager: WebhookManager, webhook_id: str, after: Any, status_code: int
) -> None:
    manager.update(webhook_id, {"ordered": True})
    publish(db, 2)
    (head,) = claim(db)
    deliveries.cancel(db, head.delivery_id)
    assert claim(db) == []
    settle(db, settled(head, status_code))
    assert opens(db, webhook_id) == (
        0 if status_code == 200 else 5
    )  # the endpoint fails, but nobody waits for the head
    after(6)
    assert len(sent(db)) == 1


@pytest.mark.parametrize("later", [500, 200])
@pytest.mark.parametrize("together", [True, False])
def test_retry_after_is_not_undone_by_what_was_under_way(
    db: Database, webhook_id: str, together: bool, later: int
) -> None:
    publish(db, 4)
    first, second, third = claim(db)[:3]
    results = [settled(first, 500), settled(second, 429, retry_after=3600), settled(third, later)]
    for batch in [results] if together else [[result] for result in results]:
        settle(db, *batch)
    assert opens(db, webhook_id) == pytest.approx(3600)


@pytest.mark.parametrize("status_code", [500, 200])
@pytest.mark.parametrize("together", [True, False])
def test_retry_after_is_not_undone_by_the_attempt_for_which_the_lane_was_closed(
    db: Database, webhook_id: str, after: Any, status_code: int, together: bool
) -> None:
    publish(db, 4)
    first, second = claim(db)[:2]
    settle(db, settled(first, 500))
    after(6)
    publish(db, 2)
    (probe,) = claim(db)
    assert probe.is_exclusive
    results = [settled(second, 429, retry_after=3600), settled(probe, status_code)]
    for batch in [results] if together else [[result] for result in results]:
        settle(db, *batch)
    assert opens(db, webhook_id) == pytest.approx(3600)


def test_a_change_in_the_callers_own_transaction_opens_the_lane_after_its_commit(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    publish(db, 3)
    settle(db, *(settled(job, 503, retry_after=DAY) for job in claim(db)))
    woken: list[Any] = []
    lanes.attach(db, outlet(wake=woken.append))
    with db.connection_context():
        with db.atomic() as transaction:
            manager.update(webhook_id, {"url": "http://example.com/a"})
            transaction.rollback()
        assert opens(db, webhook_id) == pytest.approx(DAY) and not woken
        with db.atomic():
            manager.update(webhook_id, {"url": "http://example.com/b"})
    assert opens(db, webhook_id) == 0 and woken


def test_what_is_brought_forward_is_found_by_its_index(db: Database, manager: WebhookManager, webhook_id: str) -> None:
    steps: list[str] = []

    def explain(event: Any) -> None:
        if "deliveries" in event.sql and "next_attempt_at" in event.sql and "INSERT" not in event.sql:
            steps.extend(plan(db, event.sql, event.params))

    publish(db, 3)
    settle(db, *(settled(job, 500) for job in claim(db)))
    db.query_hooks.append(explain)
    manager.update(webhook_id, {"url": "http://example.com/another"})
    db.query_hooks.clear()
    assert any("idx_deliveries_pending" in step for step in steps), steps
    assert not read_whole(steps, "deliveries", "d")
    with db.connection_context():
        assert Delivery.select().where(Delivery.next_attempt_at <= clock.now()).count() == 3


@only_sqlite
@pytest.mark.parametrize("step", ["release", "disable", "enable again", "import"])
def test_opening_the_lane_of_a_webhook_costs_the_same_however_much_waits(
    db: Database, manager: WebhookManager, webhook_id: str, tmp_path: Path, step: str
) -> None:
    """Giving back one lease read all that waited for its webhook: 85 ms of the writer where 300,000 did."""
    file = tmp_path / "webhooks.json"
    spent: list[int] = []
    with db.connection_context():
        for waiting in (20, 2000):
            manager.update(webhook_id, {"enabled": True, "url": "http://a/"})
            publish(db, waiting)
            file.write_text(
                json.dumps({webhook_id: {"url": f"http://{waiting}/", "events": ["goal"], "secret": SECRET}})
            )
            manager.update(webhook_id, {"enabled": step != "enable again"})
            db.execute_sql("UPDATE deliveries SET leased = (delivery_id = 7)")
            counted = [0]
            db.connection().set_progress_handler(partial(count_one, counted), 10)
            if step == "release":
                write_now(db, claiming.release, [7])
            elif step == "disable":
                write_now(db, settling.disable, [webhook_id], "gone", LONG_AGO)
            elif step == "import":
                json_file.import_file(db, file, overwrite=True)
            else:
                manager.update(webhook_id, {"enabled": True})
            db.connection().set_progress_handler(None, 10)
            spent.append(counted[0])
            assert Lane.select().where(Lane.due_at <= clock.now()).count() == 1
    few, many = spent
    assert 0 < many < few + 500


def count_one(counted: list[int]) -> None:
    counted[0] += 1


@pytest.mark.parametrize(("change", "enabled"), [({"url": "http://new/"}, True), ({"team": None}, False)])
def test_a_410_of_the_endpoint_before_does_not_disable_the_new_one(
    db: Database, manager: WebhookManager, webhook_id: str, change: dict[str, Any], enabled: bool
) -> None:
    publish(db)
    (job,) = claim(db)
    manager.update(webhook_id, change)
    settle(db, settled(job, 410))
    assert manager.get(webhook_id)["enabled"] is enabled
    assert deliveries.get(db, job.delivery_id)["status"] == "failed"


def test_a_new_endpoint_is_not_disabled_for_how_long_the_one_before_it_failed(
    db: Database, manager: WebhookManager, webhook_id: str, after: Callable[[float], None]
) -> None:
    publish(db, 2)
    first, second = claim(db)
    settle(db, settled(first, 500))
    after(DAY)
    manager.update(webhook_id, {"url": "https://other.example/"})
    failure = settled(second._replace(url="https://other.example/"), 500)
    write_now(db, settling.settle, [failure], stored_time(NOW))
    assert manager.get(webhook_id)["enabled"]


def test_the_attempt_that_closed_the_lane_outweighs_a_failure_begun_before_it(
    db: Database, webhook_id: str, after: Callable[[float], None]
) -> None:
    publish(db, 4)
    first, before, *_ = claim(db)
    settle(db, settled(first, 500))
    publish(db)
    after(policy.LANE_BACKOFF + 1)
    (probe,) = claim(db)
    assert probe.is_exclusive and not before.is_exclusive
    settle(db, settled(probe, 200), settled(before, 500))
    assert opens(db, webhook_id) == 0
