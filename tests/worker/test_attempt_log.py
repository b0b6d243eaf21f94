"""Each request that was sent is one row of the log, with its own answer, and counts, whatever goes wrong with it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from peewee import Database

from hookline import WebhookManager, clock, deliveries, policy
from hookline.policy import Result
from hookline.store.postgres import write_now
from hookline.worker import settling
from hookline.worker.jobs import Job, Settled
from hookline.worker.settling import Outcomes
from models import stored_time
from tests.conftest import SECRET
from tests.receiver import Answer, Received, Receiver
from tests.replaying import replayed
from tests.working import claim_up_to, rules, until, working

RULES = rules(retry_schedule=(0.05,), lease=30, timeout=10, concurrency=4)
NOBODY = stored_time(clock.now() - timedelta(days=5))  # has failed since then

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def short_lane_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "LANE_BACKOFF", 0.01)


class Gated:
    """An endpoint that gives its answer once it may."""

    def __init__(self, status: int, text: bytes) -> None:
        self.answer: Answer = (status, {}, text)
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self, _: Received) -> Answer:
        self.has_begun.set()
        self.may_end.wait(30)
        return self.answer


def the_one(db: Database) -> Row:
    (delivery,) = deliveries.page(db)
    return deliveries.get(db, delivery["delivery_id"])


def by_hand(db: Database, manager: WebhookManager, webhook_id: str) -> str:
    deliveries.cancel(db, deliveries.page(db)[0]["delivery_id"])
    return "cancelled by request"


def by_disabling(db: Database, manager: WebhookManager, webhook_id: str) -> str:
    manager.update(webhook_id, {"enabled": False})
    return "the webhook was disabled"


@pytest.mark.parametrize("give_up", [by_hand, by_disabling])
@pytest.mark.parametrize(("status_code", "status"), [(500, "cancelled"), (200, "succeeded")])
async def test_a_request_in_flight_when_its_delivery_is_cancelled_is_in_the_log(
    db: Database,
    manager: WebhookManager,
    receiver: Receiver,
    give_up: Callable[[Database, WebhookManager, str], str],
    status_code: int,
    status: str,
) -> None:
    endpoint = receiver.answers["/hook"] = Gated(status_code, b"said")
    webhook_id = manager.register(f"{receiver.url}/hook", ["goal"], SECRET)
    async with working(db, RULES) as worker:
        manager.send_event("goal", {})
        await asyncio.to_thread(endpoint.has_begun.wait, 20)
        reason = await asyncio.to_thread(give_up, db, manager, webhook_id)
        await until(lambda: the_one(db)["status"] == "cancelled")
        endpoint.may_end.set()
        await until(lambda: worker.capacity.free == RULES.concurrency)
    delivery = the_one(db)
    (attempt,) = delivery["attempt_log"]
    assert (delivery["status"], delivery["attempts"]) == (status, 1)
    assert delivery["reason"] == (reason if status == "cancelled" else None)
    assert (attempt["number"], attempt["status_code"], attempt["response"]) == (1, status_code, "said")
    assert attempt["error"] == ("answered 500" if status_code == 500 else None)
    webhook = manager.get(webhook_id)
    assert (webhook["total_calls"], webhook["failed_calls"]) == (1, int(status_code == 500))


def claimed(db: Database) -> Job:
    (job,) = write_now(db, claim_up_to, 10)
    assert isinstance(job, Job)
    return job


def result_of(job: Job, status_code: int) -> Settled:
    error = None if status_code < 300 else f"answered {status_code}"
    result = Result(clock.now(), 7, status_code, error, f"said {status_code}")
    attempts = job.attempts + 1
    settlement = policy.settle(result, attempts=attempts, failures=0, schedule=(0.0, 60), now=clock.now())
    return Settled(job, result, settlement)


def settle(db: Database, *settled: Settled) -> Outcomes:
    return write_now(db, settling.settle, settled, NOBODY)


def codes(row: Row) -> list[tuple[int, int]]:
    return [(attempt["number"], attempt["status_code"]) for attempt in row["attempt_log"]]


@pytest.fixture
def webhook_id(manager: WebhookManager) -> str:
    return manager.register("http://127.0.0.1:9/", ["goal"], SECRET)


def test_cancelling_keeps_the_error_of_the_last_attempt(db: Database, manager: WebhookManager, webhook_id: str) -> None:
    manager.send_event("goal", {})
    settle(db, result_of(claimed(db), 503))
    manager.update(webhook_id, {"enabled": False})
    write_now(db, claim_up_to, 10)  # who comes by cancels what waits
    delivery = the_one(db)
    assert (delivery["status"], delivery["reason"], codes(delivery)) == (
        "cancelled",
        "the webhook was disabled",
        [(1, 503)],
    )
    assert delivery["attempt_log"][0]["error"] == "answered 503"


@pytest.mark.parametrize("action", ["retry", "replay"])
def test_a_retry_or_replay_clears_the_reason(
    db: Database, manager: WebhookManager, webhook_id: str, action: str
) -> None:
    start = clock.now()
    manager.send_event("goal", {})
    settle(db, result_of(claimed(db), 503))
    deliveries.cancel(db, the_one(db)["delivery_id"])
    if action == "retry":
        deliveries.retry(db, the_one(db)["delivery_id"])
    else:
        replayed(db, webhook_id, start)
    assert the_one(db)["reason"] is None
    settle(db, result_of(claimed(db), 410))
    assert (the_one(db)["status"], the_one(db)["reason"]) == ("failed", "answered 410")


@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize(
    ("answers", "status"),
    [((500, 200), "succeeded"), ((200, 500), "succeeded"), ((500, 503), "pending"), ((200, 201), "succeeded")],
)
def test_two_requests_of_one_delivery_at_the_same_time_are_two_rows(
    db: Database, manager: WebhookManager, webhook_id: str, earlier: int, answers: tuple[int, int], status: str
) -> None:
    """It was cancelled and retried by hand, and another worker sent it again, while the first request was under way."""
    manager.send_event("goal", {})
    for _ in range(earlier):
        settle(db, result_of(claimed(db), 404))
        deliveries.retry(db, the_one(db)["delivery_id"])
    before = claimed(db)
    deliveries.cancel(db, before.delivery_id)
    deliveries.retry(db, before.delivery_id)
    after = claimed(db)
    assert (before.delivery_id, before.attempts) == (after.delivery_id, after.attempts)
    results = [result_of(job, code) for job, code in zip((before, after), answers, strict=True)]
    for result in [*results, *results]:  # and each settlement is made again, as if its commit's answer had been lost
        settle(db, result)
    delivery = the_one(db)
    expected = [404] * earlier + list(answers)
    assert codes(delivery) == list(enumerate(expected, 1))
    assert [attempt["response"] for attempt in delivery["attempt_log"]] == [f"said {code}" for code in expected]
    assert (delivery["status"], delivery["attempts"]) == (status, len(expected))
    failures = sum(code >= 300 for code in expected)
    webhook = manager.get(webhook_id)
    assert (webhook["total_calls"], webhook["failed_calls"]) == (len(expected), failures)


def test_a_late_failure_does_not_leave_a_delivery_leased_for_nobody(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    manager.send_event("goal", {})
    before = claimed(db)
    deliveries.cancel(db, before.delivery_id)
    deliveries.retry(db, before.delivery_id)
    settle(db, result_of(before, 500))
    deliveries.retry(db, before.delivery_id)
    after = claimed(db)
    settle(db, Settled(before, *result_of(before, 502)[1:]))  # another one that began as early
    settle(db, result_of(after, 503))
    delivery = the_one(db)
    assert codes(delivery) == [(1, 500), (2, 502), (3, 503)]
    assert (delivery["status"], delivery["waiting_for"]) != ("pending", "nothing: it is being made right now")


def test_settling_a_deleted_delivery_changes_nothing(db: Database, manager: WebhookManager, webhook_id: str) -> None:
    manager.send_event("goal", {})
    job = claimed(db)
    manager.unregister(webhook_id)
    assert settle(db, result_of(job, 500)) == Outcomes([], [], {})
