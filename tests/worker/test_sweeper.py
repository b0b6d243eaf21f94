"""The sweeper: clocks that go back, and leases of workers that died."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

import pytest
from peewee import Database

from hookline import WebhookManager, clock, deliveries, lanes
from hookline.worker import clock_jumps
from tests.conftest import SECRET
from tests.outlets import outlet
from tests.receiver import Receiver
from tests.working import answering, ended, rules, until, working


@pytest.fixture(autouse=True)
def short_lane_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hookline.policy.LANE_BACKOFF", 0.05)


async def test_a_small_step_of_the_clock_makes_nothing_due(
    db: Database, manager: WebhookManager, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.answers["/down"] = answering(500, 200)
    manager.register(f"{receiver.url}/down", ["goal"], SECRET)
    async with working(db, rules(retry_schedule=(86400,), lease=3, timeout=1, concurrency=16)) as worker:
        manager.send_event("goal", {})
        await until(lambda: deliveries.page(db)[0]["attempts"] == 1)
        real_now, sweeps = clock.now, worker.sweeper.sweeps
        monkeypatch.setattr(clock, "now", lambda: real_now() - timedelta(seconds=2))
        await until(lambda: worker.sweeper.sweeps > sweeps)
        assert deliveries.page(db)[0]["next_attempt_at"] > clock.now() + timedelta(hours=20)


async def test_a_clock_that_goes_far_back_costs_one_retry(
    db: Database, manager: WebhookManager, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails again meanwhile waits as long as it should."""

    def attempts() -> set[int]:
        return {row["attempts"] for row in deliveries.page(db, limit=200)}

    monkeypatch.setattr(clock_jumps, "ROWS", 2)
    receiver.answers["/down"] = answering(500)
    for _ in range(50):
        manager.register(f"{receiver.url}/down", ["goal"], SECRET)
    real_now = clock.now
    monkeypatch.setattr(clock, "now", lambda: real_now() + timedelta(hours=10))
    async with working(db, rules(retry_schedule=(86400,) * 9, lease=10, timeout=5, concurrency=200)) as worker:
        manager.send_event("goal", {})
        await until(lambda: attempts() == {1})
        monkeypatch.setattr(clock, "now", real_now)
        sweeps = worker.sweeper.sweeps
        await until(lambda: attempts() == {2})
        await until(lambda: worker.sweeper.sweeps > sweeps)
        await asyncio.sleep(0.5)
        assert attempts() == {2}


@pytest.mark.parametrize("jump", [timedelta(days=-2), timedelta(days=2)])
async def test_a_clock_that_jumps_does_not_stall_deliveries(
    db: Database,
    manager: WebhookManager,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    jump: timedelta,
) -> None:
    real_now, real_time = clock.now, time.time
    receiver.answers["/hook"] = answering(500, 200)
    manager.register(f"{receiver.url}/hook", ["goal"], SECRET)
    async with working(db, rules(retry_schedule=(3600,), lease=60, timeout=2)):
        manager.send_event("goal", {})
        await until(lambda: [row for row in deliveries.page(db) if row["attempts"] == 1])
        monkeypatch.setattr(clock, "now", lambda: real_now() + jump)
        monkeypatch.setattr(time, "time", lambda: real_time() + jump.total_seconds())
        (delivery,) = await until(ended(db))
        manager.send_event("goal", {})  # and what is new goes out as ever
        await asyncio.to_thread(receiver.wait_for, 3)
    assert delivery["status"] == "succeeded"


async def test_a_lease_of_a_dead_worker_expires_and_another_one_delivers(
    db: Database, manager: WebhookManager, receiver: Receiver
) -> None:
    manager.register(f"{receiver.url}/hook", ["goal"], SECRET)
    lanes.attach(db, outlet(lanes.Slots(9, 9), lease=1))  # a worker that takes it and does nothing
    manager.send_event("goal", {})
    assert deliveries.page(db)[0]["waiting_for"] == "nothing: it is being made right now"
    async with working(db, rules(lease=1.0, timeout=0.1, concurrency=4)) as worker:
        worker.rules = rules(lease=10, timeout=1, concurrency=4)
        await until(ended(db))
    assert len(receiver.received) == 1
