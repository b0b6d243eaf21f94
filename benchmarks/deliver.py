"""Publishing and delivering: rates against a bare aiohttp loop, the cost of size, hanging endpoints and backlogs."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import uvloop
from peewee import Database

import models
from benchmarks import server
from benchmarks.delivering import DATA
from benchmarks.report import Figure
from hookline import WebhookManager, events, webhooks
from hookline.egress import Client
from hookline.events import NewEvent
from hookline.lanes import Slots
from hookline.policy import DEFAULT
from hookline.store.open import open_database, storage_of
from hookline.store.storage import Storage
from hookline.worker import claiming
from hookline.worker.worker import Worker
from models import stored_time

SECRET = "a-secret-of-enough-characters"
TARGETS = {"1": ">= 0.36", "10": ">= 0.57"}
BACKLOG = 100_000  # deliveries behind the endpoint that hangs
HEALTHY = 300  # events to the healthy endpoint
SIZES = (1_000, 1_000_000)  # webhooks, and pending deliveries
REPEAT = 200


def run() -> list[Figure]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {server.SERVER_CORE})
    try:
        return [*delivered(), *published(), *latencies(), *healthy(), *claims()]
    finally:
        os.sched_setaffinity(0, before)


def delivered() -> Iterator[Figure]:
    """Deliveries per second, published and delivered by one process on one core."""
    with tempfile.TemporaryDirectory(dir=server.DISK) as name, sink() as port:
        database = server.migrated(Path(name))
        command = [sys.executable, "-m", "benchmarks.delivering", f"sqlite:///{database}", str(port)]
        done = subprocess.run(command, cwd=server.ROOT, check=True, capture_output=True, text=True)
    rounds = [json.loads(line) for line in done.stdout.splitlines()][1:]  # the first warms up
    bare = statistics.median(rates["bare"] for rates in rounds)
    for fan_out, target in TARGETS.items():
        rate = statistics.median(rates[fan_out] for rates in rounds)
        ratio = statistics.median(rates[fan_out] / rates["bare"] for rates in rounds)
        yield Figure(f"deliveries, fan-out {fan_out}", f"{rate:,.0f}/s", f"bare aiohttp: {bare:,.0f}/s", ratio, target)


def published() -> Iterator[Figure]:
    """Events per second, durable, nobody delivering, against inserting the same rows with raw SQL."""
    for fan_out, count in ((1, 4000), (10, 1000), (1000, 20)):
        with fresh() as db:
            manager = WebhookManager(db=db)
            for number in range(fan_out):
                manager.register(f"https://example.com/{number}", ["goal"], SECRET)
            ours = count / timed(lambda db=db, count=count: publish_groups(db, count))  # type: ignore[misc]
        floor = count / timed(lambda fan_out=fan_out, count=count: insert_groups(fan_out, count))  # type: ignore[misc]
        against = f"raw executemany: {floor:,.0f}/s"
        yield Figure(f"events, fan-out {fan_out:,}", f"{ours:,.0f}/s", against, ours / floor, ">= 0")


def publish_groups(db: Database, count: int, group: int = 20) -> None:
    for _ in range(count // group):
        events.publish_all(db, [NewEvent("goal", DATA)] * group)


def insert_groups(fan_out: int, count: int, group: int = 20) -> None:
    """The floor: the same rows and indexes, without matching."""
    with tempfile.TemporaryDirectory(dir=server.DISK) as name:
        db = sqlite3.connect(server.migrated(Path(name)), isolation_level=None)
        for pragma in ("journal_mode = wal", "synchronous = full"):
            db.execute(f"PRAGMA {pragma}")
        payload, now = json.dumps(DATA), stored_time(datetime.now(UTC))
        for number in range(count):
            if number % group == 0:
                db.execute("BEGIN IMMEDIATE")
            event_id = f"evt_{number:036}"
            db.execute("INSERT INTO events VALUES (?, 'goal', ?, NULL, ?)", (event_id, payload, now))
            rows = ((f"{webhook:036}", event_id, now, now) for webhook in range(fan_out))
            insert = "INSERT INTO deliveries (webhook_id, event_id, next_attempt_at, created_at) VALUES (?, ?, ?, ?)"
            db.executemany(insert, rows)
            if number % group == group - 1:
                db.execute("COMMIT")
        db.close()


def latencies() -> Iterator[Figure]:
    """The median of publishing one event to 10 matching webhooks, among few and among many."""
    with fresh() as few, fresh() as many:
        works = []
        for db, size in zip((few, many), SIZES, strict=True):
            fill(db, size, matching=10)
            works.append(lambda db=db: events.publish_all(db, [NewEvent("goal", {**DATA, "home_team": "t"})]))
        small, large = medians(works)
    against = f"at {SIZES[0]:,}: {small * 1e3:.2f} ms"
    yield Figure(f"publish at {SIZES[1]:,} webhooks", f"{large * 1e3:.2f} ms", against, large / small, "<= 1.5")


def claims() -> Iterator[Figure]:
    """The median of claiming 100 deliveries of the due lanes, with few and with many pending."""
    with fresh() as few, fresh() as many:
        for db, pending in zip((few, many), SIZES, strict=True):
            fill(db, 10, matching=10)
            backlog(db, pending)
        small, large = medians([partial(claim, few), partial(claim, many)])
    against = f"at {SIZES[0]:,}: {small * 1e3:.2f} ms"
    yield Figure(f"claim at {SIZES[1]:,} pending", f"{large * 1e3:.2f} ms", against, large / small, "<= 1.5")


def claim(db: Database) -> None:
    with db.connection_context(), db.atomic() as transaction:
        assert len(claiming.claim(db, Slots(100, 100), DEFAULT.lease)) == 100
        transaction.rollback()


def healthy() -> Iterator[Figure]:
    """The p95, from publish to arrival settled, of a healthy endpoint beside one that hangs with a backlog."""
    alone, beside = (uvloop.run(healthy_p95(hanging)) for hanging in (False, True))
    against = f"alone: {alone * 1e3:.1f} ms"
    claim = f"healthy p95 beside {BACKLOG:,} behind a hanging endpoint"
    yield Figure(claim, f"{beside * 1e3:.1f} ms", against, beside / alone, "<= 1.5")


async def healthy_p95(hanging: bool) -> float:
    with fresh() as db, sink() as port, sink("hang") as hang_port:
        manager = WebhookManager(db=db)
        good = manager.register(f"http://127.0.0.1:{port}/", ["good"], SECRET)
        if hanging:
            manager.register(f"http://127.0.0.1:{hang_port}/", ["goal"], SECRET)
            backlog(db, BACKLOG)
        storage = storage_of(db)
        worker = Worker(storage, Client(allowed=[ip_network("127.0.0.0/8")], timeout=2), replace(DEFAULT, timeout=2))
        await storage.start()
        await worker.start()
        await asyncio.sleep(1)  # the hanging endpoint has taken the slots it gets
        times = [await round_trip(storage, manager, good) for _ in range(HEALTHY)]
        await worker.stop(grace=0)
        await storage.stop()
    return statistics.quantiles(times, n=20)[-1]


async def round_trip(storage: Storage, manager: WebhookManager, webhook_id: str) -> float:
    """Seconds from publishing one event to its delivery recorded as succeeded."""
    before = (await storage.read(webhooks.get, webhook_id))["total_calls"]
    start = time.perf_counter()
    await storage.write(events.publish_one, NewEvent("good", DATA))
    while (await storage.read(webhooks.get, webhook_id))["total_calls"] == before:
        await asyncio.sleep(0.0005)
    return time.perf_counter() - start


@contextmanager
def sink(*arguments: str, pinned: bool = True) -> Iterator[int]:
    """A receiver on the other core; gives its port."""
    command = [sys.executable, "-m", "benchmarks.sink", *arguments]
    process = subprocess.Popen(command, cwd=server.ROOT, stdout=subprocess.PIPE, text=True)
    if pinned:
        os.sched_setaffinity(process.pid, {server.LOAD_CORE})
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


@contextmanager
def fresh() -> Iterator[Database]:
    """A new database on disk, bound to the models."""
    with tempfile.TemporaryDirectory(dir=server.DISK) as name:
        db = open_database(f"sqlite:///{server.migrated(Path(name))}")
        models.db.initialize(db)
        yield db
        db.close_all()  # type: ignore[attr-defined]


def fill(db: Database, webhooks: int, matching: int) -> None:
    """Insert webhooks of many teams, `matching` of which get the type `goal` of the team `t`."""
    rows = []
    for number in range(webhooks):
        event, team = ("goal", "t") if number < matching else ("goal", f"team{number % 1000}")
        rows.append((str(uuid.UUID(int=number + 1)), event, team, stored_time(datetime.now(UTC))))
    with db.connection_context(), db.atomic():
        slots = ", ".join([db.param] * 3)
        db.cursor().executemany(
            "INSERT INTO webhooks (webhook_id, url, events, secret, team, created_at) "
            f"VALUES ({db.param}, 'https://example.com/', '[\"goal\"]', 'a-secret-of-enough-characters', "
            f"{db.param}, {db.param})",
            [(webhook_id, team, now) for webhook_id, _, team, now in rows],
        )
        subscriptions = sorted((event, team, webhook_id) for webhook_id, event, team, _ in rows)
        db.cursor().executemany(f"INSERT INTO subscriptions VALUES ({slots})", subscriptions)


def backlog(db: Database, pending: int) -> None:
    """Insert this many due deliveries, spread over the webhooks subscribed to `goal`, and their lanes."""
    past = datetime.now(UTC) - timedelta(hours=1)
    with db.connection_context(), db.atomic():
        ids = [row[0] for row in db.execute_sql("SELECT webhook_id FROM subscriptions WHERE event_type = 'goal'")]
        connection, now = db.connection(), stored_time(past)
        each = pending // len(ids)
        payload = json.dumps({**DATA, "event_type": "goal", "timestamp": "2026-11-23T14:30:01"})
        events_ = [(f"evt_{number:036}", payload, now) for number in range(each)]
        connection.executemany("INSERT INTO events VALUES (?, 'goal', ?, NULL, ?)", events_)
        insert = "INSERT INTO deliveries (webhook_id, event_id, next_attempt_at, created_at) VALUES (?, ?, ?, ?)"
        connection.executemany(insert, ((webhook_id, event[0], now, now) for event in events_ for webhook_id in ids))
        lanes = ((webhook_id, now) for webhook_id in ids)
        connection.executemany("INSERT INTO lanes (webhook_id, due_at) VALUES (?, ?)", lanes)


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def medians(works: Sequence[Callable[[], Any]]) -> list[float]:
    """The median time of each, in seconds. They take turns: the machine's speed drifts."""
    rounds = [[timed(work) for work in works] for _ in range(REPEAT)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]
