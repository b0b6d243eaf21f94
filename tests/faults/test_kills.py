"""Processes killed under load: what was acknowledged arrives, and without a crash nothing is sent twice."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from tests.conftest import running
from tests.databases import Place
from tests.faults.load import EVENT, LOOPBACK, QUICK, Load, every, killed_at_last, wait_until_none_is_pending, worker
from tests.receiver import OK, Answer, Received, Receiver

ROUNDS = 10


def test_every_acknowledged_event_arrives_whenever_the_server_is_killed(place: Place, receiver: Receiver) -> None:
    acknowledged: list[str] = []
    refused: list[int] = []
    for round_number in range(ROUNDS):
        with killed_at_last(place, **QUICK) as server:
            if not round_number:
                assert server.register(url=f"{receiver.url}/hook").status_code == 201
            with Load(server, acknowledged, refused):
                time.sleep(random.uniform(0.1, 0.5))  # the moment of the kill is what varies
                server.stop(signal.SIGKILL)
    with running(place, **QUICK) as server:
        wait_until_none_is_pending(server)
        made = every(server, "/api/v1/deliveries")
        (webhook,) = server.client.get("/api/v1/webhooks").json()["data"]
    assert len(acknowledged) > ROUNDS
    assert refused == []
    assert set(acknowledged) <= {one.event_id for one in receiver.received}
    assert set(acknowledged) <= {one["event_id"] for one in made}
    assert {one["status"] for one in made} == {"succeeded"}
    assert webhook["total_calls"] == sum(one["attempts"] for one in made)


def test_a_worker_killed_holding_a_lease_is_replaced_when_it_has_run_out(place: Place, receiver: Receiver) -> None:
    asked, release = threading.Event(), threading.Event()
    came: list[float] = []

    def first_hangs(_: Received) -> Answer:
        came.append(time.monotonic())
        asked.set()
        release.wait(20)
        return OK

    receiver.answers["/hook"] = first_hangs
    settings = QUICK | {"LEASE": "4s", "DELIVERY_TIMEOUT": "2s"}
    with running(place, RUN_WORKER="false", **LOOPBACK) as server:
        server.register(url=f"{receiver.url}/hook")
        with worker(place, **settings) as first:
            event_id = server.client.post("/api/v1/events", json=EVENT).json()["event_id"]
            assert asked.wait(15)
            first.kill()
            first.wait(10)
        (waiting,) = server.client.get("/api/v1/deliveries").json()["data"]
        assert (waiting["status"], waiting["attempts"]) == ("pending", 0)  # what it did is not known
        assert waiting["waiting_for"].startswith("nothing")  # as far as anyone can know it is under way
        release.set()
        with worker(place, **settings):
            wait_until_none_is_pending(server)
        (listed,) = server.client.get("/api/v1/deliveries").json()["data"]
        delivery = server.client.get(f"/api/v1/deliveries/{listed['delivery_id']}").json()
    assert (delivery["status"], delivery["event_id"]) == ("succeeded", event_id)
    assert [(one["number"], one["status_code"]) for one in delivery["attempt_log"]] == [(1, 200)]
    assert [one.event_id for one in receiver.received] == [event_id] * 2
    assert came[1] - came[0] > 1  # not before the lease of 4 s, which began before the first request, had run out


def test_two_workers_make_each_delivery_once(place: Place, receiver: Receiver) -> None:
    lock, under_way, most = threading.Lock(), [0], [0]

    def takes_a_while(_: Received) -> Answer:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        threading.Event().wait(0.02)
        with lock:
            under_way[0] -= 1
        return OK

    receiver.answers["/hook"] = takes_a_while
    settings = LOOPBACK | {"WORKER_CONCURRENCY": "8"}  # one webhook may have half of them
    with running(place, RUN_WORKER="false", **LOOPBACK) as server:
        server.register(url=f"{receiver.url}/hook")
        with worker(place, **settings), worker(place, **settings):
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda _: server.client.post("/api/v1/events", json=EVENT), range(300)))
            wait_until_none_is_pending(server)
        made = every(server, "/api/v1/deliveries")
        (webhook,) = server.client.get("/api/v1/webhooks").json()["data"]
    published = [answer.json()["event_id"] for answer in answers]
    assert len(set(published)) == 300
    assert sorted(one.event_id for one in receiver.received) == sorted(published)
    assert {(one["status"], one["attempts"]) for one in made} == {("succeeded", 1)}
    assert (webhook["total_calls"], webhook["failed_calls"]) == (300, 0)
    assert most[0] > 4  # more than one worker makes at once: both of them were at it


def test_a_server_told_to_stop_under_load_loses_nothing(place: Place, receiver: Receiver) -> None:
    held: list[str] = []
    release = threading.Event()

    def hangs(request: Received) -> Answer:
        held.append(request.event_id)
        release.wait(60)
        return OK

    receiver.answers["/hangs"] = hangs
    settings = LOOPBACK | {"LEASE": "10m", "DELIVERY_TIMEOUT": "60s"}  # nobody can wait for these
    try:
        with killed_at_last(place, **settings) as server:
            server.register(url=f"{receiver.url}/hook")
            server.register(url=f"{receiver.url}/hangs")
            with Load(server) as load:
                receiver.wait_for(20, "/hook")
                server.process.terminate()
            assert server.process.wait(15) in (0, -signal.SIGTERM)
        cut_off = set(held)
    finally:
        release.set()
    with running(place, **settings) as server:
        wait_until_none_is_pending(server)
        made = every(server, "/api/v1/deliveries")
        webhooks = server.client.get("/api/v1/webhooks").json()["data"]
    acknowledged = set(load.acknowledged)
    assert len(acknowledged) >= 20
    assert set(load.refused) <= {503}
    assert acknowledged <= {one.event_id for one in receiver.at("/hook")}
    sent = Counter(one.event_id for one in receiver.at("/hangs"))
    assert acknowledged <= set(sent)
    assert cut_off
    assert all(sent[event_id] > 1 for event_id in cut_off)  # given back, and made again
    assert {one["status"] for one in made} == {"succeeded"}
    assert sum(one["total_calls"] for one in webhooks) == sum(one["attempts"] for one in made)


def test_the_counters_of_a_webhook_agree_with_its_log_after_a_kill(place: Place, receiver: Receiver) -> None:
    seen: set[str] = set()

    def fails_at_first(request: Received) -> Answer:
        if request.event_id in seen:
            return OK
        seen.add(request.event_id)
        return 500, {}, b"not now"

    receiver.answers["/fails"] = fails_at_first
    with killed_at_last(place, **QUICK) as server:
        server.register(url=f"{receiver.url}/hook")
        server.register(url=f"{receiver.url}/fails")
        for _ in range(6):
            assert server.client.post("/api/v1/events", json=EVENT).status_code == 202
        receiver.wait_for(4, "/fails")  # in the middle of the retries
    with running(place, **QUICK) as server:
        wait_until_none_is_pending(server)
        server.client.post("/api/v1/events", json=EVENT)  # the last success of both
        wait_until_none_is_pending(server)
        for webhook in server.client.get("/api/v1/webhooks").json()["data"]:
            listed = every(server, "/api/v1/deliveries", webhook_id=webhook["webhook_id"])
            logs = [server.client.get(f"/api/v1/deliveries/{one['delivery_id']}").json() for one in listed]
            attempts = [attempt for one in logs for attempt in one["attempt_log"]]
            failures = [one["started_at"] for one in attempts if one["error"]]
            successes = [one["started_at"] for one in attempts if not one["error"]]
            assert len(listed) == len(successes) == 7
            assert len(attempts) == sum(one["attempts"] for one in logs)
            assert (webhook["total_calls"], webhook["failed_calls"]) == (len(attempts), len(failures))
            assert webhook["last_success"] == max(successes)
            assert webhook["last_failure"] == max(failures, default=None)
            assert bool(failures) == webhook["url"].endswith("/fails")
