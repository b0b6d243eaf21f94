"""The worker, in this process, on a real file and a real receiver: outcomes, retries, lanes, leases and clocks."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from peewee import Database
from standardwebhooks import Webhook as Oracle

from hookline import WebhookManager, clock, deliveries, events, replays, signing
from hookline.egress import names
from hookline.egress.client import Client
from hookline.events import NewEvent
from hookline.store.open import open_database, storage_of
from hookline.worker import claiming
from hookline.worker.worker import Worker
from tests.conftest import SECRET, only_postgres
from tests.databases import Place
from tests.receiver import Answer, Received, Receiver
from tests.working import LOOPBACK, answering, ended, rules, until, working

QUICK = rules(retry_schedule=(0.1, 0.1, 0.1), lease=30, timeout=2, concurrency=16)

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def short_lane_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hookline.policy.LANE_BACKOFF", 0.05)


async def test_an_event_arrives_signed_in_both_schemes(
    db: Database, manager: WebhookManager, receiver: Receiver
) -> None:
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    webhook_id = manager.register(f"{receiver.url}/hook", ["goal"], secret, headers={"X-Own": "mine"})
    async with working(db, QUICK):
        published = manager.send_event("goal", {"n": 1})
        await until(ended(db))
    (got,) = receiver.received
    assert got.data == {"n": 1, "event_type": "goal", "timestamp": got.headers["x-webhook-timestamp"]}
    assert got.headers["x-webhook-event"] == "goal"
    assert got.headers["x-webhook-id"] == webhook_id
    assert got.headers["x-own"] == "mine"
    assert got.headers["webhook-id"] == published.event_id
    assert got.headers["x-webhook-signature"] == signing.legacy_signature(secret, got.body)
    assert Oracle(secret).verify(got.body, got.headers) == got.data


async def test_a_rotation_signs_with_both_secrets_until_the_old_one_expires(
    db: Database, manager: WebhookManager, receiver: Receiver
) -> None:
    old, new = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
    webhook_id = manager.register(f"{receiver.url}/hook", ["goal"], old)
    async with working(db, QUICK):
        manager.rotate(webhook_id, new, 3600)
        manager.send_event("goal", {})
        (first,) = await asyncio.to_thread(receiver.wait_for, 1)
        manager.rotate(webhook_id, new, 0)
        manager.send_event("goal", {})
        _, second = await asyncio.to_thread(receiver.wait_for, 2)
    assert Oracle(old).verify(first.body, first.headers) == Oracle(new).verify(first.body, first.headers)
    assert signing.problem(second.headers, second.body, new, time.time()) is None
    assert "another secret" in str(signing.problem(second.headers, second.body, old, time.time()))


async def test_failures_are_retried_on_the_schedule_and_every_attempt_is_kept(
    db: Database, manager: WebhookManager, receiver: Receiver
) -> None:
    receiver.answers["/flaky"] = answering(500, 302, 404, 201)
    webhook_id = manager.register(f"{receiver.url}/flaky", ["goal"], SECRET)
    async with working(db, QUICK):
        manager.send_event("goal", {})
        ((delivery),) = await until(ended(db))
    assert (delivery["status"], delivery["attempts"]) == ("succeeded", 4)
    log = deliveries.get(db, delivery["delivery_id"])["attempt_log"]
    assert [(attempt["number"], attempt["status_code"]) for attempt in log] == [(1, 500), (2, 302), (3, 404), (4, 201)]
    assert "redirects are not followed" in log[1]["error"]
    assert {request.event_id for request in receiver.received} == {delivery["event_id"]}
    webhook = manager.get(webhook_id)
    assert (webhook["total_calls"], webhook["failed_calls"]) == (4, 3)
    assert webhook["last_success"] > webhook["last_failure"]


async def test_a_delivery_fails_for_good_when_its_schedule_is_used_up(
    db: Database, manager: WebhookManager, receiver: Receiver
) -> None:
    receiver.answers["/down"] = answering(503)
    webhook_id = manager.register(f"{receiver.url}/down", ["goal"], SECRET)
    manager.update(webhook_id, {"retry_schedule": [0.1]})
    async with working(db, QUICK):
        manager.send_event("goal", {})
        (delivery,) = await until(ended(db))
    assert (delivery["status"], delivery["attempts"], delivery["reason"]) == ("failed", 2, "answered 503")


async def test_retry_after_is_honoured(db: Database, manager: WebhookManager, receiver: Receiver) -> None:
    receiver.answers["/busy"] = answering((429, {"Retry-After": "3600"}, b""))
    manager.register(f"{receiver.url}/busy", ["goal"], SECRET)
    async with working(db, QUICK):
        manager.send_event("goal", {})
        (waiting,) = await until(lambda: [row for row in deliveries.page(db) if row["attempts"] == 1])
    assert waiting["waiting_for"].startswith("back-off")
    assert timedelta(minutes=59) < waiting["next_attempt_at"] - clock.now() < timedelta(minutes=61)


async def test_gone_disables_the_webhook_cancels_its_deliveries_and_is_announced(
    db: Database, manager: WebhookManager, receiver: Receiver
) -> None:
    receiver.answers["/gone"] = answering(410)
    webhook_id = manager.register(f"{receiver.url}/gone", ["goal"], SECRET)
    manager.update(webhook_id, {"ordered": True})
    manager.register(f"{receiver.url}/operator", ["hookline.webhook.disabled"], SECRET)
    events.publish_all(db, [NewEvent("goal", {"n": n}) for n in range(3)])
    async with working(db, QUICK):
        (news,) = await asyncio.to_thread(receiver.wait_for, 1, "/operator")
        rows = await until(ended(db, 4))
    assert news.data["webhook_id"] == webhook_id and "410" in news.data["reason"]
    webhook = manager.get(webhook_id)
    assert not webhook["enabled"] and "410" in webhook["disabled_reason"]
    assert len(receiver.at("/gone")) == 1
    statuses = [row["status"] for row in rows if row["webhook_id"] == webhook_id]
    assert sorted(statuses) == ["cancelled", "cancelled", "failed"]
    assert all(row["reason"] for row in rows if row["webhook_id"] == webhook_id)

    receiver.answers["/gone"] = answering(200)
    offered = manager.update(webhook_id, {"enabled": True})
    assert offered["replay"]["deliveries"] == 3
    async with working(db, QUICK):
        replay = replays.start(db, webhook_id, offered["replay"]["since"])
        await until(lambda: len(receiver.at("/gone")) == 4)
        rows = await until(ended(db, 4))
        done = await until(lambda: replays.page(db, state="finished"))
    assert {row["status"] for row in rows} == {"succeeded"}
    assert (done[0]["replay_id"], done[0]["deliveries"]) == (replay["replay_id"], 3)


async def test_failing_for_too_long_disables_a_webhook_until_it_is_enabled(
    db: Database, manager: WebhookManager, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.answers["/down"] = answering(500)
    webhook_id = manager.register(f"{receiver.url}/down", ["goal"], SECRET)
    short = rules(retry_schedule=(0.1,) * 5, lease=30, timeout=2, disable_after=0.3)
    async with working(db, short):
        manager.send_event("goal", {})
        await until(lambda: not manager.get(webhook_id)["enabled"])
        await until(ended(db))
    assert "too long" in manager.get(webhook_id)["disabled_reason"]
    enabled = manager.update(webhook_id, {"enabled": True})
    assert (enabled["enabled"], enabled["disabled_reason"], enabled["replay"]["deliveries"]) == (True, None, 1)


async def test_strict_order_waits_for_the_one_before(db: Database, manager: WebhookManager, receiver: Receiver) -> None:
    receiver.answers["/ordered"] = answering(500, 500, 200)
    webhook_id = manager.register(f"{receiver.url}/ordered", ["goal"], SECRET)
    manager.update(webhook_id, {"ordered": True})
    async with working(db, QUICK):
        for n in range(5):
            manager.send_event("goal", {"n": n})
        await until(ended(db, 5))
    assert [request.data["n"] for request in receiver.received] == [0, 0, 0, 1, 2, 3, 4]


async def test_strict_order_keeps_to_the_retry_schedule(
    db: Database, manager: WebhookManager, receiver: Receiver
) -> None:
    receiver.answers["/ordered"] = answering(500, 200)
    webhook_id = manager.register(f"{receiver.url}/ordered", ["goal"], SECRET)
    manager.update(webhook_id, {"ordered": True, "retry_schedule": [1.0, 60.0]})
    start = time.monotonic()
    async with working(db, QUICK):
        manager.send_event("goal", {})
        ((delivery),) = await until(ended(db))
    assert (delivery["status"], delivery["attempts"]) == ("succeeded", 2)
    assert time.monotonic() - start > 0.9  # a step less its jitter, and not the lane's own back-off


async def test_what_waits_when_strict_order_begins_is_delivered_too(
    db: Database, manager: WebhookManager, receiver: Receiver
) -> None:
    receiver.answers["/ordered"] = answering(500, 200)
    webhook_id = manager.register(f"{receiver.url}/ordered", ["goal"], SECRET)
    async with working(db, rules(retry_schedule=(0.5,), lease=30, timeout=2, concurrency=16)):
        manager.send_event("goal", {})
        await until(lambda: deliveries.page(db)[0]["attempts"] == 1)
        manager.update(webhook_id, {"ordered": True})
        manager.send_test(webhook_id)
        rows = await until(ended(db, 2))
    assert [row["status"] for row in rows] == ["succeeded", "succeeded"]


async def test_a_rate_limit_spaces_deliveries(db: Database, manager: WebhookManager, receiver: Receiver) -> None:
    webhook_id = manager.register(f"{receiver.url}/slow", ["goal"], SECRET)
    manager.update(webhook_id, {"rate_limit": 10.0})
    events.publish_all(db, [NewEvent("goal", {})] * 6)
    async with working(db, QUICK):
        got = await asyncio.to_thread(receiver.wait_for, 6)
    assert got[-1].at - got[0].at > 0.45  # five gaps of a tenth of a second


async def test_an_endpoint_that_hangs_does_not_hold_up_the_others(
    db: Database, manager: WebhookManager, receiver: Receiver
) -> None:
    release = threading.Event()

    def hang(_: Received) -> Answer:
        release.wait(30)
        return 200, {}, b""

    receiver.answers["/hangs"] = hang
    hanging = manager.register(f"{receiver.url}/hangs", ["goal"], SECRET)
    async with working(db, rules(retry_schedule=(60,), lease=30, timeout=10, concurrency=8)):
        for _ in range(20):
            manager.send_event("goal", {})
        await until(lambda: manager.send_event("none", {}))
        healthy = manager.register(f"{receiver.url}/healthy", ["other"], SECRET)
        for _ in range(20):
            manager.send_event("other", {})
        await asyncio.to_thread(receiver.wait_for, 20, "/healthy")
        assert len(receiver.at("/hangs")) == 0  # none of them has been answered
        release.set()
        await asyncio.to_thread(receiver.wait_for, 20, "/hangs")
        await until(ended(db, 40))
    assert manager.get(hanging)["total_calls"] == manager.get(healthy)["total_calls"] == 20


async def test_stopping_releases_what_is_in_flight_for_the_next_worker(
    db: Database, manager: WebhookManager, receiver: Receiver
) -> None:
    release = threading.Event()

    def first_hangs(_: Received) -> Answer:
        release.wait(30)
        return 200, {}, b""

    receiver.answers["/hook"] = first_hangs
    manager.register(f"{receiver.url}/hook", ["goal"], SECRET)
    storage = storage_of(db)
    worker = Worker(storage, Client(allowed=LOOPBACK, timeout=10), rules(lease=60, timeout=10))
    await storage.start()
    await worker.start()
    manager.send_event("goal", {})
    await until(lambda: worker.in_flight)
    await worker.stop(grace=0.1)
    await storage.stop()
    assert deliveries.page(db)[0]["waiting_for"] == "its turn"
    release.set()
    async with working(db, QUICK):
        (delivery,) = await until(ended(db))
    assert delivery["status"] == "succeeded"


async def test_two_workers_send_nothing_twice(
    place: Place, db: Database, manager: WebhookManager, receiver: Receiver
) -> None:
    for n in range(5):
        manager.register(f"{receiver.url}/{n}", ["goal"], SECRET)
    for _ in range(40):
        manager.send_event("goal", {})
    other = open_database(place.url)
    async with working(db, rules(concurrency=8)), working(other, rules(concurrency=8)):
        await until(ended(db, 200))
    sent = [(request.path, request.event_id) for request in receiver.received]
    assert len(sent) == len(set(sent)) == 200


@only_postgres
async def test_a_worker_hears_what_another_process_publishes(
    place: Place, db: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hookline.worker.worker.POLL", 3600)
    other = open_database(place.url)
    manager = WebhookManager(db=other)
    manager.register(f"{receiver.url}/hook", ["goal"], SECRET)
    async with working(db, QUICK):
        for number in range(1, 4):
            await asyncio.to_thread(manager.send_event, "goal", {})
            await asyncio.to_thread(receiver.wait_for, number)
        await until(ended(db, 3))
    other.close_all()  # type: ignore[attr-defined]


async def test_a_deleted_webhook_takes_its_deliveries_with_it_even_in_flight(
    db: Database, manager: WebhookManager, receiver: Receiver
) -> None:
    release = threading.Event()

    def hang(_: Received) -> Answer:
        release.wait(30)
        return 500, {}, b""

    receiver.answers["/hangs"] = hang
    webhook_id = manager.register(f"{receiver.url}/hangs", ["goal"], SECRET)
    manager.register(f"{receiver.url}/other", ["goal"], SECRET)
    async with working(db, QUICK) as worker:
        manager.send_event("goal", {})
        await asyncio.to_thread(receiver.wait_for, 1, "/other")
        assert manager.unregister(webhook_id)
        release.set()
        await until(lambda: not worker.in_flight)
    with db.connection_context():
        assert db.execute_sql("SELECT count(*) FROM lanes").fetchone()[0] == 0
    assert [row["status"] for row in deliveries.page(db)] == ["succeeded"]


async def test_the_worker_outlives_whatever_goes_wrong_in_a_round(
    db: Database, manager: WebhookManager, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.register(f"{receiver.url}/hook", ["goal"], SECRET)
    manager.send_event("goal", {})
    failed = threading.Event()
    claim = claiming.claim

    def fails_once(*arguments: Any) -> Any:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("unforeseen")
        return claim(*arguments)

    monkeypatch.setattr(claiming, "claim", fails_once)
    async with working(db, QUICK):
        await until(ended(db))
    assert failed.is_set() and len(receiver.received) == 1


async def test_the_counters_outlive_the_process(db: Database, manager: WebhookManager, receiver: Receiver) -> None:
    webhook_id = manager.register(f"{receiver.url}/hook", ["goal"], SECRET)
    for total in (1, 2):
        async with working(db, QUICK):
            manager.send_event("goal", {})
            await until(ended(db, total))
        assert manager.get(webhook_id)["total_calls"] == total


async def test_a_manager_of_its_own_delivers_between_startup_and_shutdown(tmp_path: Any, receiver: Receiver) -> None:
    manager = WebhookManager(db_path=tmp_path / "own.db", allowed_networks=["127.0.0.0/8"])
    manager.register(f"{receiver.url}/hook", ["goal"], SECRET)
    await manager.startup()
    await manager.send_event("goal", {"n": 1})
    await asyncio.to_thread(receiver.wait_for, 1)
    await manager.shutdown()


async def test_an_attempt_without_a_thread_for_its_name_is_nobodys_failure(
    db: Database, manager: WebhookManager, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "THREADS", 2)
    monkeypatch.setattr(names, "RESERVED", 1)
    monkeypatch.setattr(names, "QUEUED", 0.05)
    answered = threading.Event()

    def getaddrinfo(*arguments: Any, **options: Any) -> list[Any]:
        answered.wait(30)
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    for number in range(4):
        manager.register(f"http://dead{number}.test/", ["goal"], SECRET)
    manager.register(f"{receiver.url}/healthy", ["goal"], SECRET)
    client = Client(allowed=LOOPBACK, timeout=5, names=names.Names(getaddrinfo))
    async with working(db, QUICK, client):
        manager.send_event("goal", {})
        await until(lambda: receiver.received)
        await asyncio.sleep(0.3)  # several times as long as they wait for a thread
        waiting = deliveries.page(db, status="pending")
        assert [delivery["attempts"] for delivery in waiting] == [0] * 4
        answered.set()
        await until(ended(db, 5))
    assert {delivery["reason"] for delivery in deliveries.page(db, status="failed")} == {"DNS lookup failed"}
