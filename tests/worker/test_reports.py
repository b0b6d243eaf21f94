"""What the log tells of endpoints: it fails aloud, once, and tells no secret."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest
from peewee import Database

from hookline import WebhookManager, clock, deliveries, policy
from hookline.policy import Result
from hookline.worker import reports
from hookline.worker.jobs import Job, Settled
from hookline.worker.reports import Reports, State
from hookline.worker.settling import Outcomes
from tests.receiver import Answer, Received, Receiver
from tests.working import rules, until, working

SECRET = "a-marked-secret-of-enough-characters"
RULES = rules(retry_schedule=(0.05, 0.05), lease=30, timeout=10, concurrency=4)


@pytest.fixture(autouse=True)
def short_lane_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "LANE_BACKOFF", 0.01)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "hookline")
    return caplog


def lines(log: pytest.LogCaptureFixture, about: str) -> list[str]:
    return [record.getMessage() for record in log.records if record.name == "hookline" and about in record.getMessage()]


def answering(*codes: int) -> Callable[[Received], Answer]:
    """These one after the other, then the last one again, with a text that nobody may log."""
    left = list(codes)
    return lambda _: (left.pop(0) if len(left) > 1 else left[0], {}, b"a-marked-answer")


async def test_a_failing_endpoint_is_told_once_and_each_delivery_given_up(
    db: Database, manager: WebhookManager, receiver: Receiver, log: pytest.LogCaptureFixture
) -> None:
    path = "/down?token=a-marked-token"
    receiver.answers[path] = answering(503)
    webhook_id = manager.register(f"{receiver.url}{path}", ["goal"], SECRET, headers={"X-Key": "a-marked-header"})
    async with working(db, RULES):
        for _ in range(2):
            manager.send_event("goal", {"body": "a-marked-body"})
        await until(lambda: not deliveries.page(db, status="pending"))
        await until(lambda: len(lines(log, "failed for good")) == 2)
    (fails,) = lines(log, f"webhook {webhook_id} fails")
    assert "answered 503 (event type goal, attempt 1, the next one at 2" in fails
    for delivery_id, line in zip((1, 2), sorted(lines(log, "failed for good")), strict=True):
        assert line.startswith(f"delivery {delivery_id} to webhook {webhook_id} has failed for good: answered 503")
        assert line.endswith("(event type goal, attempt 3, the last one)")
    assert {record.levelname for record in log.records if webhook_id in record.getMessage()} == {"WARNING"}
    assert "a-marked" not in log.text


async def test_an_endpoint_that_works_again_is_told(
    db: Database,
    manager: WebhookManager,
    receiver: Receiver,
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reports, "REST", 0.0)
    receiver.answers["/flaky"] = answering(500, 200)
    webhook_id = manager.register(f"{receiver.url}/flaky", ["goal"], SECRET)
    async with working(db, RULES):
        manager.send_event("goal", {})
        await until(lambda: lines(log, "works again"))
        manager.send_event("goal", {})
        await asyncio.to_thread(receiver.wait_for, 3)
    fails, works = lines(log, webhook_id)
    assert fails.startswith(f"webhook {webhook_id} fails") and works == f"webhook {webhook_id} works again"


@pytest.mark.parametrize(("code", "why"), [(410, "the endpoint answered 410 Gone"), (500, "too long")])
async def test_a_webhook_that_is_disabled_is_told(
    db: Database, manager: WebhookManager, receiver: Receiver, log: pytest.LogCaptureFixture, code: int, why: str
) -> None:
    receiver.answers["/down"] = answering(code)
    webhook_id = manager.register(f"{receiver.url}/down", ["goal"], SECRET)
    async with working(db, rules(retry_schedule=(0.05,) * 9, lease=30, timeout=10, disable_after=0.01)):
        manager.send_event("goal", {})
        (line,) = await until(lambda: lines(log, "was disabled"))
    assert line.startswith(f"webhook {webhook_id} was disabled: ") and why in line


def test_a_webhook_that_somebody_disables_is_told_once_it_is(
    db: Database, manager: WebhookManager, log: pytest.LogCaptureFixture
) -> None:
    webhook_id = manager.register("http://example.com/", ["goal"], SECRET)
    with db.connection_context(), db.atomic() as transaction:
        manager.update(webhook_id, {"enabled": False})
        transaction.rollback()
    assert lines(log, "was disabled") == []
    manager.update(webhook_id, {"enabled": False})
    assert lines(log, "was disabled") == [f"webhook {webhook_id} was disabled: disabled by request"]


def result_of(webhook_id: str, code: int) -> Settled:
    error = None if code == 200 else f"answered {code}"
    result = Result(clock.now(), 5, code, error)
    job = Job(
        delivery_id=1,
        webhook_id=webhook_id,
        event_id="evt_1",
        attempts=0,
        attempts_before=0,
        url="http://u/",
        secret=SECRET,
        previous_secret=None,
        previous_secret_expires_at=None,
        earlier_secrets=None,
        headers=None,
        retry_schedule=None,
        rate_limit=None,
        ordered=False,
        event_type="goal",
        body=b"x" * 1000,
        event_time="",
        leased_at=0.0,
    )
    return Settled(job, result, policy.settle(result, attempts=1, failures=0, schedule=(5,), now=clock.now()))


class Clock:
    """Of `time.monotonic`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("hookline.worker.reports.time.monotonic", lambda: self.now)


def tell(told: Reports, *settled: Settled) -> None:
    told.recorded(settled, Outcomes([], [], {}))


def test_an_endpoint_that_flaps_gets_a_line_a_minute(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, now = Reports(), Clock(monkeypatch)
    for second in range(600):
        now.now = 1000.0 + second
        tell(told, result_of("a", 500), result_of("a", 200))
        told.catch_up()
    assert 8 <= len(lines(log, "webhook a")) <= 10
    assert lines(log, "webhook a")[0].startswith("webhook a fails: answered 500")


def test_recovery_is_told_after_its_minute_though_nothing_more_is_sent(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, now = Reports(), Clock(monkeypatch)
    tell(told, result_of("a", 500), result_of("b", 500), result_of("b", 200), result_of("a", 200), result_of("b", 502))
    told.catch_up()
    assert len(lines(log, "fails")) == 2 and lines(log, "again") == []
    assert told.unsaid == {"a": State(fails=False, at=now.now)}  # no body, which would be kept for a minute
    now.now += reports.REST
    for _ in range(2):
        told.catch_up()
    assert lines(log, "again") == ["webhook a works again"]
    tell(told, result_of("b", 200))
    assert lines(log, "again") == ["webhook a works again", "webhook b works again"]


def test_what_is_known_of_endpoints_is_bounded(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "MOST", 2)
    told = Reports()
    tell(told, *[result_of(str(number), 500) for number in range(4)], result_of("0", 500))
    assert len(lines(log, "fails")) == 5  # the first one was forgotten
