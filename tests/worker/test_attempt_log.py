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
from hookline.egress import Client
from hookline.policy import Result
from hookline.store.postgres import write_now
from hookline.worker import settling
from hookline.worker.jobs import Job, Settled
from hookline.worker.settling import Outcomes
from models import Webhook, stored_time
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


class Held:
    """An endpoint that gives its answer once it may."""

    def __init__(self, status: int, text: bytes) -> None:
        self.answer: Answer = (status, {}, text)
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self, _: Received) -> Answer:
        self.has_begun.set()
        self.may_end.wait(30)
        return self.answer


def ended(db: Database) -> Callable[[], Row | None]:
    def look() -> Row | None:
        (found,) = deliveries.page(db)
        return found if found["status"] in ("succeeded", "failed") else None

    return look


def the_one(db: Database) -> Row:
    (found,) = deliveries.page(db)
    return deliveries.get(db, found["delivery_id"])


def by_hand(db: Database, manager: WebhookManager, webhook_id: str) -> str:
    deliveries.cancel(db, deliveries.page(db)[0]["delivery_id"])
    return "cancelled by request"


def by_disabling(db: Database, manager: WebhookManager, webhook_id: str) -> str:
    manager.update(webhook_id, {"enabled": False})
    return "the webhook was disabled"


@pytest.mark.parametrize("give_up", [by_hand, by_disabling])
@pytest.mark.parametrize(("status_code", "status"), [(500, "cancelled"), (200, "succeeded")])
async def test_a_request_that_was_under_way_when_its_delivery_was_cancelled_is_in_the_log(
    db: Database,
    manager: WebhookManager,
    receiver: Receiver,
    give_up: Callable[[Database, WebhookManager, str], str],
    status_code: int,
    status: str,
) -> None:
    held = receiver.answers["/hook"] = Held(status_code, b"said")
    webhook_id = manager.register(f"{receiver.url}/hook", ["goal"], SECRET)
    async with working(db, RULES) as worker:
        manager.send_event("goal", {})
        await asyncio.to_thread(held.has_begun.wait, 20)
        reason = await asyncio.to_thread(give_up, db, manager, webhook_id)
        await until(lambda: the_one(db)["status"] == "cancelled")
        held.may_end.set()
        await until(lambda: worker.capacity.free == RULES.concurrency)
    found = the_one(db)
    (attempt,) = found["attempt_log"]
    assert (found["status"], found["attempts"]) == (status, 1)
    assert found["reason"] == (reason if status == "cancelled" else None)
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
    return [(one["number"], one["status_code"]) for one in row["attempt_log"]]


@pytest.fixture
def webhook_id(manager: WebhookManager) -> str:
    return manager.register("http://127.0.0.1:9/", ["goal"], SECRET)


def test_why_a_delivery_was_cancelled_leaves_what_its_last_attempt_met(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    manager.send_event("goal", {})
    settle(db, result_of(claimed(db), 503))
    manager.update(webhook_id, {"enabled": False})
    write_now(db, claim_up_to, 10)  # who comes by cancels what waits
    found = the_one(db)
    assert (found["status"], found["reason"], codes(found)) == ("cancelled", "the webhook was disabled", [(1, 503)])
    assert found["attempt_log"][0]["error"] == "answered 503"


@pytest.mark.parametrize("again", ["retry", "replay"])
def test_a_delivery_that_is_asked_for_again_has_no_reason_any_more(
    db: Database, manager: WebhookManager, webhook_id: str, again: str
) -> None:
    start = clock.now()
    manager.send_event("goal", {})
    settle(db, result_of(claimed(db), 503))
    deliveries.cancel(db, the_one(db)["delivery_id"])
    if again == "retry":
        deliveries.retry(db, the_one(db)["delivery_id"])
    else:
        replayed(db, webhook_id, start)
    assert the_one(db)["reason"] is None
    settle(db, result_of(claimed(db), 410))
    assert (the_one(db)["status"], the_one(db)["reason"]) == ("failed", "answered 410")


@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize(
    ("first", "second", "status"),
    [(500, 200, "succeeded"), (200, 500, "succeeded"), (500, 503, "pending"), (200, 201, "succeeded")],
)
def test_two_requests_of_one_delivery_at_the_same_time_are_two_rows(
    db: Database, manager: WebhookManager, webhook_id: str, earlier: int, first: int, second: int, status: str
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
    results = [result_of(before, first), result_of(after, second)]
    for result in [*results, *results]:  # and each settlement is made again, as if its commit's answer had been lost
        settle(db, result)
    found = the_one(db)
    expected = [404] * earlier + [first, second]
    assert codes(found) == list(enumerate(expected, 1))
    assert [one["response"] for one in found["attempt_log"]] == [f"said {code}" for code in expected]
    assert (found["status"], found["attempts"]) == (status, len(expected))
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
    found = the_one(db)
    assert codes(found) == [(1, 500), (2, 502), (3, 503)]
    assert (found["status"], found["waiting_for"]) != ("pending", "nothing: it is being made right now")


def test_a_deleted_delivery_is_no_obstacle(db: Database, manager: WebhookManager, webhook_id: str) -> None:
    manager.send_event("goal", {})
    job = claimed(db)
    manager.unregister(webhook_id)
    assert settle(db, result_of(job, 500)) == Outcomes([], [], {})


@pytest.mark.parametrize(
    "schedule", ["[1e12]", '["x"]', "[NaN]", "[-1]", "not JSON", '{"a": 1}', "null", "[" * 5000 + "]" * 5000]
)
async def test_a_retry_schedule_that_cannot_be_used_is_replaced_by_the_services(
    db: Database, manager: WebhookManager, receiver: Receiver, schedule: str
) -> None:
    receiver.answers["/down"] = lambda _: (500, {}, b"")
    manager.register(f"{receiver.url}/down", ["goal"], SECRET)
    with db.connection_context():
        Webhook.update(retry_schedule=schedule).execute(db)
    async with working(db, RULES):
        manager.send_event("goal", {})
        found = await until(ended(db))
    assert (found["status"], found["attempts"], found["reason"]) == ("failed", 2, "answered 500")
    assert len(receiver.received) == 2


@pytest.mark.parametrize("headers", ["not JSON", "[1]", '{"X-A": 1}', '{"X-A": "a\\nb"}'])
async def test_headers_that_cannot_be_sent_fail_the_delivery_in_words(
    db: Database, manager: WebhookManager, receiver: Receiver, headers: str
) -> None:
    manager.register(f"{receiver.url}/hook", ["goal"], SECRET)
    with db.connection_context():
        Webhook.update(headers=headers).execute(db)
    async with working(db, RULES):
        manager.send_event("goal", {})
        found = await until(ended(db))
    assert (found["status"], found["attempts"]) == ("failed", 2)
    assert "headers" in found["reason"] or "header" in found["reason"] or "request failed" in found["reason"]
    assert receiver.received == []


async def test_a_result_that_cannot_be_recorded_is_a_failed_attempt_and_harms_no_other(
    db: Database, manager: WebhookManager, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No database stores a lone surrogate. The client replaces them, should it ever fail to."""
    post = Client.post

    async def post_with_a_flaw(self: Client, url: str, body: bytes, headers: Any) -> Result:
        result = await post(self, url, body, headers)
        return result._replace(response="\ud800") if url.endswith("/flawed") else result

    monkeypatch.setattr(Client, "post", post_with_a_flaw)
    flawed = manager.register(f"{receiver.url}/flawed", ["goal"], SECRET)
    sound = manager.register(f"{receiver.url}/sound", ["goal"], SECRET)
    async with working(db, RULES) as worker:
        manager.send_event("goal", {})
        await until(lambda: not deliveries.page(db, status="pending"))
        await until(lambda: worker.capacity.free == RULES.concurrency)
    (failed,), (succeeded,) = deliveries.page(db, webhook_id=flawed), deliveries.page(db, webhook_id=sound)
    assert (failed["status"], failed["attempts"]) == ("failed", 2)
    assert failed["reason"] == "the result of the attempt could not be recorded"
    assert (succeeded["status"], len(receiver.at("/sound")), len(receiver.at("/flawed"))) == ("succeeded", 1, 2)
