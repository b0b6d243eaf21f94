"""Units of work at the same time: nothing is lost, sent twice, or blocked for long."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from ipaddress import ip_network
from typing import Any

import pytest
from peewee import Database

from hookline import WebhookManager, clock, deliveries, events, history, lanes, policy, replays
from hookline.egress.client import Client
from hookline.errors import Conflict, Unavailable
from hookline.events import NewEvent, Published
from hookline.policy import Result
from hookline.store import locks
from hookline.store.failures import LOCKED, error_name
from hookline.store.open import open_database, storage_of
from hookline.store.postgres import write_now
from hookline.worker import claiming, clock_jumps, expired_leases, settling
from hookline.worker.jobs import Job, Settled
from hookline.worker.worker import Worker
from models import Delivery, Status, Subscription, stored_time
from tests.conftest import ROOT, SECRET, only_postgres
from tests.databases import Place, wait_for_a_waiter
from tests.receiver import Receiver
from tests.replaying import carry_out
from tests.working import claim_up_to, rules

LONG_AGO = clock.now() - timedelta(days=1)
IN_THE_PAST = f"'{stored_time(LONG_AGO)}'"
ROUNDS = 20


@pytest.fixture
def webhook_id(manager: WebhookManager) -> str:
    return manager.register("http://127.0.0.1:9/", ["goal"], SECRET)


def claim(db: Database) -> list[Job]:
    return write_now(db, claim_up_to, 10)


def settled(job: Job, status_code: int = 200, schedule: tuple[float, ...] = (5,)) -> Settled:
    result = Result(clock.now(), 5, status_code, None, "said")
    return Settled(job, result, policy.settle(result, attempts=1, failures=0, schedule=schedule, now=clock.now()))


@contextmanager
def another(place: Place) -> Iterator[Database]:
    """A transaction of another process, which is rolled back at the end."""
    other = open_database(place.url)
    with other.connection_context(), other.atomic() as transaction:
        yield other
        transaction.rollback()
    other.close_all()  # type: ignore[attr-defined]


def free_to_lock(other: Database, statement: str) -> bool:
    """May this transaction lock a row of that statement at once?"""
    return other.execute_sql(f"{statement} FOR UPDATE NOWAIT").fetchone() is not None


def test_the_table_of_the_lock_order_names_functions_that_exist() -> None:
    named = re.findall(r"\b(\w+)\.([a-z]\w+)\b", locks.__doc__ or "")
    modules = {path.stem: path.read_text() for path in (ROOT / "hookline").rglob("*.py")}
    assert len(named) > 15
    assert not [name for name in named if f"def {name[1]}(" not in modules[name[0]]]


def test_two_changes_at_once_leave_the_subscriptions_that_follow_from_both(db: Database, place: Place) -> None:
    manager = WebhookManager(db=db)
    with ThreadPoolExecutor(2) as threads:
        for _ in range(ROUNDS):
            one = manager.register("http://example.com/", ["a"], SECRET)
            changes: list[dict[str, Any]] = [{"events": ["b"]}, {"team": "x"}]
            list(threads.map(partial(manager.update, one), changes))
            with db.connection_context():
                found = Subscription.select(Subscription.event_type, Subscription.team)
                assert list(found.where(Subscription.webhook == one).tuples()) == [("b", "x")]


@only_postgres
async def test_a_callers_long_transaction_holds_up_neither_the_worker_nor_other_publishers(
    place: Place, db: Database, receiver: Receiver
) -> None:
    manager = WebhookManager(db=db)
    mine = manager.register(f"{receiver.url}/mine", ["mine"], SECRET)
    manager.register(f"{receiver.url}/other", ["other"], SECRET)
    storage, application = storage_of(db), open_database(place.url)
    worker = Worker(storage, Client(allowed=[ip_network("127.0.0.0/8")]), rules())

    async def publish(new: NewEvent) -> Published:
        answer = await storage.write_together(events.publish_all, new)
        assert isinstance(answer, Published)
        return answer

    await storage.start()
    await worker.start()
    with application.connection_context():
        with application.atomic():
            events.publish_one(application, NewEvent("mine", {"n": 1}, "key"))
            assert await storage.scan(expired_leases.overdue) == ([], None)
            same_key = asyncio.ensure_future(publish(NewEvent("mine", {"n": 1}, "key")))
            await asyncio.to_thread(wait_for_a_waiter, place.url)
            assert (await publish(NewEvent("mine", {"n": 2}))).deliveries == 1
            assert (await publish(NewEvent("other", {}))).deliveries == 1
            await asyncio.to_thread(receiver.wait_for, 2)
            assert not same_key.done()
        assert (await same_key).duplicate
    await asyncio.to_thread(receiver.wait_for, 3)
    assert sorted(one.path for one in receiver.received) == ["/mine", "/mine", "/other"]
    assert manager.get(mine)["failed_calls"] == 0
    application.close_all()  # type: ignore[attr-defined]
    await worker.stop()
    await storage.stop()


def test_what_a_caller_rolls_back_opens_no_lane(db: Database, webhook_id: str) -> None:
    with db.connection_context(), db.atomic(), db.atomic() as savepoint:
        events.publish_one(db, NewEvent("goal", {}))
        savepoint.rollback()
    with db.connection_context():
        assert db.execute_sql("SELECT count(*) FROM lanes").fetchone() == (0,)
        with db.atomic():
            events.publish_one(db, NewEvent("goal", {}))
        assert db.execute_sql("SELECT count(*) FROM lanes").fetchone() == (1,)


@pytest.mark.parametrize("again", ["retry", "replay"])
def test_strict_order_holds_while_another_delivery_is_asked_for_again(
    db: Database, manager: WebhookManager, webhook_id: str, again: str
) -> None:
    manager.update(webhook_id, {"ordered": True})
    for number in range(3):
        manager.send_event("goal", {"n": number})
    with db.connection_context():
        first = deliveries.page(db)[-1]["delivery_id"]
        gone = {"status": Status.FAILED, "next_attempt_at": None, "finished_at": clock.now(), "attempts": 1}
        Delivery.update(gone).where(Delivery.delivery_id == first).execute(db)
    (job,) = claim(db)
    if again == "retry":
        deliveries.retry(db, first)
    else:
        replays.start(db, webhook_id, LONG_AGO)
        assert carry_out(db) == 1
    assert claim(db) == []
    write_now(db, settling.settle, [settled(job)], stored_time(LONG_AGO))
    assert [one.delivery_id for one in claim(db)] == [first]


@only_postgres
def test_a_retry_that_comes_just_after_a_claim_is_refused(
    db: Database, manager: WebhookManager, webhook_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's claim is committed between the look and the change of who retries by hand."""
    manager.send_event("goal", {})
    look = deliveries._row

    def look_and_be_late(database: Database, delivery_id: int) -> dict[str, Any]:
        row = look(database, delivery_id)
        with ThreadPoolExecutor(1) as worker:
            claimed.extend(worker.submit(claim, db).result())
        return row

    claimed: list[Job] = []
    monkeypatch.setattr(deliveries, "_row", look_and_be_late)
    with pytest.raises(Conflict, match="just changed"):
        deliveries.retry(db, deliveries.page(db)[0]["delivery_id"])
    assert len(claimed) == 1
    assert claim(db) == []


async def test_what_is_committed_after_the_worker_has_stopped_is_left_to_others(db: Database, webhook_id: str) -> None:
    storage = storage_of(db)
    worker = Worker(storage, Client(), rules())
    await storage.start()
    await worker.start()
    published, stopped = threading.Event(), threading.Event()

    def application() -> None:
        with db.connection_context(), db.atomic():
            events.publish_one(db, NewEvent("goal", {}))
            published.set()
            assert stopped.wait(20)

    thread = threading.Thread(target=application)
    thread.start()
    await asyncio.to_thread(published.wait, 20)
    if db.for_update:  # SQLite's one writer is the application: the worker could not record that it stops
        await worker.stop()
        stopped.set()
    else:
        stopped.set()
        await worker.stop()
    await asyncio.to_thread(thread.join)
    await asyncio.sleep(0)  # the wake has come by now
    await storage.stop()
    (one,) = deliveries.page(db)
    assert (one["status"], one["attempts"], one["waiting_for"]) == ("pending", 0, "its turn")


CHANGES: dict[str, Callable[[Database, WebhookManager, Job], Any]] = {
    "settle": lambda db, manager, job: settling.settle(db, [settled(job, 500)], stored_time(LONG_AGO)),
    "disable": lambda db, manager, job: manager.update(job.webhook_id, {"enabled": False}),
}


@only_postgres
@pytest.mark.parametrize("change", CHANGES)
def test_a_waiter_on_a_deleted_webhook_holds_no_other_lock(
    place: Place, db: Database, manager: WebhookManager, webhook_id: str, change: str
) -> None:
    manager.send_event("goal", {})
    manager.send_event("goal", {})
    job = claim(db)[0]
    with another(place) as other, ThreadPoolExecutor(1) as thread:
        assert free_to_lock(other, "SELECT 1 FROM webhooks")
        waiting = thread.submit(write_now, db, CHANGES[change], manager, job)
        wait_for_a_waiter(place.url)
        assert free_to_lock(other, "SELECT 1 FROM deliveries")
        assert free_to_lock(other, "SELECT 1 FROM lanes")
        assert not waiting.done()
        other.rollback()
        other.begin()
        waiting.result(20)


@only_postgres
def test_a_locked_lane_is_skipped_unless_no_other_is_due(
    place: Place, db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    """Else who publishes to a webhook without pause would keep workers from its lane."""
    manager.send_event("goal", {})
    with another(place) as other, ThreadPoolExecutor(1) as thread:
        assert free_to_lock(other, "SELECT 1 FROM lanes")
        another_webhook = manager.register("http://127.0.0.1:9/", ["other"], SECRET)
        manager.send_event("other", {})
        assert [job.webhook_id for job in claim(db)] == [another_webhook]
        waiting = thread.submit(claim, db)
        wait_for_a_waiter(place.url)
        other.rollback()
        other.begin()
        assert [job.webhook_id for job in waiting.result(20)] == [webhook_id]


@only_postgres
def test_publishing_to_a_webhook_being_deleted_says_that_nothing_is_stored(
    place: Place, db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    other = open_database(place.url)
    with other.connection_context(), ThreadPoolExecutor(1) as thread:
        with other.atomic():
            WebhookManager(db=other).unregister(webhook_id)
            publishing = thread.submit(manager.send_event, "goal", {})
            wait_for_a_waiter(place.url)
        with pytest.raises(Unavailable, match="nothing was stored, try again"):
            publishing.result(20)
    assert manager.send_event("goal", {}).deliveries == 0
    assert len(history.page(db)) == 1
    other.close_all()  # type: ignore[attr-defined]


@pytest.fixture
async def worker(db: Database) -> AsyncIterator[Worker]:
    """One with few slots and a short lease."""
    storage = storage_of(db)
    short = rules(lease=4, timeout=1, concurrency=6)
    started = Worker(storage, Client(allowed=[ip_network("127.0.0.0/8")], timeout=1), short)
    await storage.start()
    await started.start()
    yield started
    await started.stop()
    await storage.stop()


async def recorded(manager: WebhookManager, webhook_id: str, count: int) -> None:
    for _ in range(1500):
        if manager.get(webhook_id)["total_calls"] == count:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{count} deliveries were not recorded")


def hold(other: Database, webhook_id: str) -> None:
    other.execute_sql("SELECT 1 FROM webhooks WHERE webhook_id = %s FOR NO KEY UPDATE", (webhook_id,))


@only_postgres
async def test_results_of_blocked_webhooks_wait_while_others_are_recorded(
    place: Place, db: Database, manager: WebhookManager, receiver: Receiver, worker: Worker
) -> None:
    """Longer than a lease: the results wait, and count when they can be recorded."""
    ids = {name: manager.register(f"{receiver.url}/{name}", [name], SECRET) for name in ("held", "gone", "free")}
    with another(place) as other:
        hold(other, ids["held"])
        hold(other, ids["gone"])
        for number in range(10):
            manager.send_event("held", {"n": number})
            manager.send_event("gone", {"n": number})
        await asyncio.to_thread(receiver.wait_for, 6)
        for number in range(60):
            manager.send_event("free", {"n": number})
            await asyncio.sleep(0.1)
        await recorded(manager, ids["free"], 60)
        assert manager.get(ids["held"])["total_calls"] == 0
        other.execute_sql("DELETE FROM webhooks WHERE webhook_id = %s", (ids["gone"],))
        other.commit()
        other.begin()
    await recorded(manager, ids["held"], 10)
    async with asyncio.timeout(20):
        while worker.in_flight:
            await asyncio.sleep(0.01)
    assert worker.capacity.free == 6
    sent = [one.headers["webhook-id"] for one in receiver.received]
    assert len(sent) == len(set(sent))
    assert [len(receiver.at(f"/{name}")) for name in ("held", "free")] == [10, 60]


@only_postgres
async def test_a_stopping_worker_waits_for_the_lock_on_a_result(
    place: Place, db: Database, manager: WebhookManager, receiver: Receiver, worker: Worker
) -> None:
    held = manager.register(f"{receiver.url}/held", ["held"], SECRET)
    with another(place) as other:
        hold(other, held)
        manager.send_event("held", {})
        await asyncio.to_thread(receiver.wait_for, 1)
        stopping = asyncio.ensure_future(worker.stop())
        await asyncio.sleep(3)
        assert not stopping.done()
        other.rollback()
        other.begin()
        await stopping
    assert manager.get(held)["total_calls"] == 1


@only_postgres
def test_a_claim_gives_up_a_blocked_lane_soon(
    place: Place, db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    manager.send_event("goal", {})
    with another(place) as other, ThreadPoolExecutor(1) as thread:
        assert free_to_lock(other, "SELECT 1 FROM lanes")
        refused = thread.submit(claim, db).exception(5)  # and not only when its statement times out
        assert refused is not None and error_name(refused) == LOCKED
        with db.connection_context():
            assert db.execute_sql("SHOW lock_timeout").fetchone() == ("10s",)
    assert [job.webhook_id for job in claim(db)] == [webhook_id]


def test_what_was_begun_before_strict_order_leaves_its_closed_lane_alone(
    db: Database, manager: WebhookManager, webhook_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "LANE_BACKOFF", 0)
    manager.send_event("goal", {"n": 1})
    (before,) = claim(db)
    manager.update(webhook_id, {"ordered": True})
    manager.send_event("goal", {"n": 2})
    manager.send_event("goal", {"n": 3})
    (first,) = claim(db)
    write_now(db, settling.settle, [settled(before, 500)], stored_time(LONG_AGO))
    with db.connection_context():
        db.execute_sql(f"UPDATE deliveries SET next_attempt_at = {IN_THE_PAST} WHERE status = 'pending' AND NOT leased")
    assert claim(db) == []
    write_now(db, settling.settle, [settled(first)], stored_time(LONG_AGO))
    assert [job.event_id for job in claim(db)] != [first.event_id]


def test_a_clock_that_goes_far_back_opens_no_lane_in_which_one_is_made_in_order(
    db: Database, manager: WebhookManager, webhook_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = manager.register("http://127.0.0.1:9/", ["other"], SECRET)
    manager.update(webhook_id, {"ordered": True})
    manager.send_event("goal", {"n": 1})
    manager.send_event("other", {"n": 2})
    now = clock.now()
    monkeypatch.setattr(clock, "now", lambda: now + timedelta(days=1))
    failed = [settled(job, 500) for job in claim(db) if job.webhook_id == other]
    write_now(db, settling.settle, failed, stored_time(LONG_AGO))
    monkeypatch.setattr(clock, "now", lambda: now)
    assert claim(db) == []
    found, resting, _ = clock_jumps.misdated(db, rules())
    assert write_now(db, clock_jumps.bring_forward, rules(), found, resting) == 3
    assert clock_jumps.misdated(db, rules()) == ([], [], None)
    assert [job.webhook_id for job in claim(db)] == [other]
    monkeypatch.setattr(clock, "now", lambda: now + timedelta(seconds=61))
    assert {job.webhook_id for job in claim(db)} == {webhook_id, other}


def test_a_result_that_is_settled_again_opens_no_lane_in_which_the_next_one_is_made(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    """A commit whose answer was lost is made again."""
    manager.update(webhook_id, {"ordered": True})
    events.publish_all(db, [NewEvent("goal", {"n": number}) for number in range(2)])
    (first,) = claim(db)
    result = settled(first)
    write_now(db, settling.settle, [result], stored_time(LONG_AGO))
    (second,) = claim(db)
    write_now(db, settling.settle, [result], stored_time(LONG_AGO))
    assert claim(db) == []
    write_now(db, settling.settle, [settled(second)], stored_time(LONG_AGO))
    assert manager.get(webhook_id)["total_calls"] == 2


@pytest.mark.parametrize("together", [True, False])
def test_what_was_begun_before_strict_order_brings_no_retry_forward(
    db: Database, manager: WebhookManager, webhook_id: str, together: bool
) -> None:
    manager.send_event("goal", {"n": 1})
    (before,) = claim(db)
    manager.update(webhook_id, {"ordered": True})
    manager.send_event("goal", {"n": 2})
    (first,) = claim(db)
    results = [settled(one, 500, schedule=(600,)) for one in (first, before)]
    for batch in [results] if together else [[one] for one in results]:
        write_now(db, settling.settle, batch, stored_time(LONG_AGO))
    with db.connection_context():
        due = claiming.next_due(db, [])
    assert due is not None and due > clock.now() + timedelta(seconds=500)


@only_postgres
def test_a_claim_that_closes_a_lane_while_an_older_result_waits_for_it_is_not_undone(
    place: Place, db: Database, manager: WebhookManager, webhook_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "LANE_BACKOFF", 0)
    manager.send_event("goal", {"n": 1})
    (before,) = claim(db)
    manager.update(webhook_id, {"ordered": True})
    manager.send_event("goal", {"n": 2})
    manager.send_event("goal", {"n": 3})
    with another(place) as other, ThreadPoolExecutor(1) as thread:
        assert len(claim_up_to(other, 10)) == 1
        waiting = thread.submit(write_now, db, settling.settle, [settled(before, 500)], stored_time(LONG_AGO))
        wait_for_a_waiter(place.url)
        other.commit()
        other.begin()
        waiting.result(20)
    assert claim(db) == []


@only_postgres
def test_a_claim_that_closes_a_lane_while_somebody_opens_it_is_not_undone(
    place: Place, db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    manager.update(webhook_id, {"ordered": True})
    for number in range(2):
        manager.send_event("goal", {"n": number})
    with another(place) as other, ThreadPoolExecutor(1) as thread:
        assert len(claim_up_to(other, 10)) == 1
        waiting = thread.submit(write_now, db, partial(lanes.make_due, now=True), [webhook_id])
        wait_for_a_waiter(place.url)
        other.commit()
        other.begin()
        waiting.result(20)
    assert claim(db) == []
