"""Many processes on one PostgreSQL: some killed, their connections ended, the server itself stopped and killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import databases
from tests.conftest import Server, only_postgres, running
from tests.databases import Place, Postgres, execute, named
from tests.faults.load import QUICK, Load, every, killed_at_last, wait_until_none_is_pending, worker
from tests.receiver import Receiver
from tests.working import wait_until

WEBS, WORKERS = 2, 4
PATIENT = QUICK | {"LEASE": "30s", "DELIVERY_TIMEOUT": "10s", "DATABASE_POOL": "2"}  # a slow machine sends once, too
WEB_ONLY = QUICK | {"RUN_WORKER": "false", "DATABASE_POOL": "4"}
SMALL = QUICK | {"DATABASE_POOL": "4"}
ENDPOINTS = 5
OTHERS = "datname = current_database() AND pid <> pg_backend_pid()"


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[tuple[Postgres, Place]]:
    """A PostgreSQL that the test may stop and kill, durable as by default, with a migrated database."""
    if reason := databases.why_not("postgres"):
        pytest.skip(reason)
    server = Postgres().start()
    try:
        execute(server.url, "CREATE DATABASE hookline")
        place = Place(named(server.url, "hookline"), tmp_path)
        databases.migrate(place.url)
        yield server, place
    finally:
        server.stop()


def register_endpoints(server: Server, receiver: Receiver) -> None:
    for number in range(ENDPOINTS):
        assert server.register(url=f"{receiver.url}/{number}").status_code == 201


def made(server: Server) -> list[dict[str, Any]]:
    return every(server, "/api/v1/deliveries")


def arrived(receiver: Receiver) -> Counter[tuple[str, str]]:
    return Counter((one.path, one.event_id) for one in receiver.received)


def require_all_arrived(acknowledged: list[str], receiver: Receiver, server: Server) -> None:
    """Every acknowledged event arrived everywhere, and the log and the counters say the same."""
    paths = [f"/{number}" for number in range(ENDPOINTS)]
    log = made(server)
    assert [(one["status"], one["reason"], one["attempts"]) for one in log if one["status"] != "succeeded"] == []
    assert {(path, event_id) for event_id in acknowledged for path in paths} <= set(arrived(receiver))
    webhooks = server.client.get("/api/v1/webhooks").json()["data"]
    assert sum(one["total_calls"] for one in webhooks) == sum(one["attempts"] for one in log)


@only_postgres
def test_four_workers_and_two_web_processes_send_nothing_twice(place: Place, receiver: Receiver) -> None:
    acknowledged: list[str] = []
    with ExitStack() as stack:
        webs = [stack.enter_context(running(place, **WEB_ONLY)) for _ in range(WEBS)]
        register_endpoints(webs[0], receiver)
        for _ in range(WORKERS):
            stack.enter_context(worker(place, **PATIENT))
        loads = [stack.enter_context(Load(web, acknowledged)) for web in webs]
        receiver.wait_for(1000, timeout=60)
        connections = execute(place.url, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
        for load in loads:
            load.stop()
        wait_until_none_is_pending(webs[0])
        require_all_arrived(acknowledged, receiver, webs[0])
        assert connections[0][0] <= WEBS * 4 + WORKERS * (2 + 1) + 1  # the pools, who listens, and this one
        assert {one["attempts"] for one in made(webs[0])} == {1}
    assert set(arrived(receiver).values()) == {1}
    assert [load.refused for load in loads] == [[], []]


@only_postgres
def test_one_worker_and_one_web_process_killed_under_load_lose_nothing(place: Place, receiver: Receiver) -> None:
    acknowledged: list[str] = []
    with ExitStack() as stack:
        webs = [stack.enter_context(killed_at_last(place, **WEB_ONLY)) for _ in range(WEBS)]
        register_endpoints(webs[0], receiver)
        workers = [stack.enter_context(worker(place, **SMALL)) for _ in range(WORKERS)]
        loads = [stack.enter_context(Load(web, acknowledged)) for web in webs]
        receiver.wait_for(300, timeout=60)
        doomed = [webs[1].process, random.choice(workers)]
        for process in random.sample(doomed, 2):
            time.sleep(random.uniform(0, 0.3))  # the moment of the kill is what varies
            process.kill()
        before = len(receiver.received)
        receiver.wait_for(before + 500, timeout=60)  # the others go on
        for load in loads:
            load.stop()
        wait_until_none_is_pending(webs[0])
        require_all_arrived(acknowledged, receiver, webs[0])
    assert loads[0].refused == []


@only_postgres
def test_connections_ended_again_and_again_under_load_lose_nothing(place: Place, receiver: Receiver) -> None:
    acknowledged: list[str] = []
    with running(place, **SMALL) as server, worker(place, **SMALL):
        register_endpoints(server, receiver)
        with Load(server, acknowledged) as load:
            for _ in range(8):
                time.sleep(random.uniform(0.05, 0.3))  # the moment is what varies
                execute(place.url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OTHERS}")
            before = len(load.acknowledged)
            wait_until(lambda: len(load.acknowledged) > before + 20)
        wait_until_none_is_pending(server)
        require_all_arrived(acknowledged, receiver, server)
    assert set(load.refused) <= {503}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_postgres_stopped_and_started_again_under_load_loses_nothing(
    own_server: tuple[Postgres, Place], receiver: Receiver, how: signal.Signals
) -> None:
    postgres, place = own_server
    acknowledged: list[str] = []
    with running(place, **SMALL) as first, running(place, **WEB_ONLY) as second, worker(place, **SMALL):
        register_endpoints(first, receiver)
        with Load(first, acknowledged) as one, Load(second, acknowledged) as other:
            receiver.wait_for(300, timeout=60)
            postgres.halt(how)
            wait_until(lambda: len(one.refused) > 3 and len(other.refused) > 3)
            assert first.client.get("/ready").status_code == 503
            postgres.run()
            before = len(acknowledged)
            wait_until(lambda: len(acknowledged) > before + 50)
        wait_until_none_is_pending(first)
        require_all_arrived(acknowledged, receiver, first)
        assert first.client.get("/ready").status_code == 200
    assert set(one.refused + other.refused) == {503}


def test_ready_says_that_the_database_takes_no_writes_or_does_not_answer(own_server: tuple[Postgres, Place]) -> None:
    postgres, place = own_server
    with running(place, **SMALL) as server:
        execute(place.url, "ALTER DATABASE hookline SET default_transaction_read_only = on")
        execute(place.url, f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {OTHERS}")
        wait_until(lambda: server.client.get("/ready").status_code == 503)
        assert server.client.get("/ready").json() == {"detail": "the database is read-only"}
        assert server.register().status_code == 503
        execute(postgres.url, "ALTER DATABASE hookline RESET default_transaction_read_only")
        execute(place.url, f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {OTHERS}")
        wait_until(lambda: server.client.get("/ready").status_code == 200)
        frozen = [pid for (pid,) in execute(postgres.url, "SELECT pid FROM pg_stat_activity")] + [postgres.process.pid]
        try:
            for pid in frozen:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            answer = server.client.get("/ready")
            assert (answer.status_code, answer.json()["detail"]) == (503, "the database does not answer within 5 s")
            assert server.client.get("/health").status_code == 200
        finally:
            for pid in frozen:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        wait_until(lambda: server.client.get("/ready").status_code == 200)
        assert server.register().status_code == 201
