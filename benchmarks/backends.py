"""SQLite and PostgreSQL in one run, on the same cores: register, publish, deliver; and the cost of size on PostgreSQL.

Nothing is pinned to a core: PostgreSQL's own processes need theirs from the same two.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

from peewee import Database
from pyreqwest.client import Client, ClientBuilder

import models
from benchmarks import deliver, http, server
from benchmarks.delivering import DATA
from benchmarks.filling import SUBSCRIPTIONS, WEBHOOKS, remember
from benchmarks.report import Figure
from hookline import WebhookManager, clock, events, lanes, policy, retention
from hookline.events import NewEvent
from hookline.lanes import Outlet, Slots, Wake
from hookline.policy import Result
from hookline.store.open import open_database, storage_of
from hookline.store.units import unit
from hookline.worker import claiming, settling
from hookline.worker.jobs import Settled
from models import stored_time
from tests import databases
from tests.databases import Postgres, execute, named

SECRET = "a-secret-of-enough-characters"
TARGET = ">= 0.4"  # of SQLite's rate, for delivering with one worker
BACKENDS = ("SQLite", "PostgreSQL")
WORKERS = (1, 2, 4)
BACKLOG = 6000  # deliveries, to 10 endpoints
SIZES = (1_000, 1_000_000)  # webhooks
COPIED = 1_000_000  # deliveries, ten of each event
PURGED = 100_000  # deliveries, ten of each event
PUBLISHED = 2000  # events, one after the other, while nothing is purged
HISTORY = 10_000_000  # deliveries that have ended
BYTES_OF_HISTORY = 700  # on the disk, for each, with its part of its event and all indexes
TURNS = 3  # of both backends, one after the other: the machine's speed drifts


def run() -> Iterator[Figure]:
    with postgres() as pg, tempfile.TemporaryDirectory(dir=server.DISK) as name:
        urls = [f"sqlite:///{server.migrated(Path(name))}", database(pg, "small")]
        yield from requests(urls)
        yield from in_process(pg, Path(name))
        yield from by_workers(pg, Path(name))
        yield from copies(pg, Path(name))
        yield from purges(pg, Path(name))
        yield from sizes(pg)
        yield from histories(pg, Path(name))


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A durable server with the memory that a small machine would give it."""
    started = Postgres(("shared_buffers=512MB", "max_wal_size=4GB"), parent=server.DISK).start()
    try:
        yield started
    finally:
        started.stop()


def database(pg: Postgres, name: str) -> str:
    execute(pg.url, f"CREATE DATABASE {name}")
    url = named(pg.url, name)
    databases.migrate(url)
    return url


def versus(claim: str, rounds: list[list[float]], target: str = ">= 0") -> Figure:
    """Compare the medians of rounds, each a rate for SQLite and a rate for PostgreSQL."""
    sqlite, pg = (statistics.median(rates) for rates in zip(*rounds, strict=True))
    ratio = statistics.median(rates[1] / rates[0] for rates in rounds)
    return Figure(f"PostgreSQL: {claim}", f"{pg:,.0f}/s", f"SQLite: {sqlite:,.0f}/s", ratio, target)


def requests(urls: list[str]) -> Iterator[Figure]:
    """Webhooks registered, and events published to nobody, per second over HTTP."""
    with ExitStack() as stack:
        running = [stack.enter_context(server.hookline(url, pinned=False)).url for url in urls]
        for claim, rounds in asyncio.run(load(running)).items():
            yield versus(claim, rounds)


async def load(urls: list[str]) -> dict[str, list[list[float]]]:
    async with ClientBuilder().error_for_status().build() as client:
        return {
            "register": await http.in_turn([http.register(client, url) for url in urls]),
            "publish": await http.in_turn([publish(client, url) for url in urls]),
        }


def publish(client: Client, url: str) -> http.Request:
    body = json.dumps({"event_type": "nobody", "data": DATA}).encode()

    async def request() -> bytes:
        built = client.post(f"{url}/api/v1/events").header("content-type", "application/json").body_bytes(body).build()
        return bytes(await (await built.send()).bytes())

    return request


def both(pg: Postgres, folder: Path, name: str) -> list[str]:
    """A new database of each backend: SQLite's comes first."""
    return [f"sqlite:///{server.migrated(folder / name)}", database(pg, name)]


def in_process(pg: Postgres, folder: Path) -> Iterator[Figure]:
    """Deliveries per second, published and delivered by one process."""
    turns: dict[str, list[list[float]]] = {fan_out: [] for fan_out in deliver.TARGETS}
    with deliver.sink(pinned=False) as port:
        for turn in range(TURNS):
            figures = [delivering(url, port) for url in both(pg, folder, f"in_process_{turn}")]
            for fan_out, rates in turns.items():
                rates.append([figure[fan_out] for figure in figures])
    for fan_out, rates in turns.items():
        yield versus(f"deliveries of one process, fan-out {fan_out}", rates, TARGET)


def delivering(url: str, port: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.delivering", url, str(port)]
    done = subprocess.run(command, cwd=server.ROOT, check=True, capture_output=True, text=True)
    rounds = [json.loads(line) for line in done.stdout.splitlines()][1:]
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}


def by_workers(pg: Postgres, folder: Path) -> Iterator[Figure]:
    """Deliveries per second of a backlog, by `manage.py worker` processes."""
    for workers in WORKERS:
        names = [f"backlog_{workers}_{turn}" for turn in range(TURNS)]
        rates = [[drained(url, workers) for url in both(pg, folder, name)] for name in names]
        claim = f"deliveries of {workers} worker{'s' * (workers > 1)}"
        yield versus(claim, rates, TARGET if workers == 1 else ">= 0")


def drained(url: str, workers: int) -> float:
    """Deliveries per second, from the commit of the whole backlog to the last one recorded."""
    with ExitStack() as stack:
        db = stack.enter_context(opened(url))
        port = stack.enter_context(deliver.sink(pinned=False))
        manager = WebhookManager(db=db)
        for number in range(10):
            manager.register(f"http://127.0.0.1:{port}/{number}", ["goal"], SECRET)
        for _ in range(workers):
            stack.enter_context(worker(url))
        with unit(db):
            for _ in range(BACKLOG // 1000):
                events.publish_all(db, [NewEvent("goal", DATA)] * 100)
        start = time.perf_counter()
        with db.connection_context():
            while recorded(db) < BACKLOG:
                time.sleep(0.01)
        return BACKLOG / (time.perf_counter() - start)


def recorded(db: Database) -> int:
    return int(db.execute_sql("SELECT sum(total_calls) FROM webhooks").fetchone()[0])


@contextmanager
def worker(url: str) -> Iterator[None]:
    env = {**os.environ, "DATABASE_URL": url, "ALLOWED_NETWORKS": "127.0.0.0/8"}
    command = [sys.executable, str(server.ROOT / "manage.py"), "worker"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.terminate()
        process.communicate(timeout=20)


@contextmanager
def opened(url: str) -> Iterator[Database]:
    db = open_database(url)
    models.db.initialize(db)
    yield db
    db.close_all()  # type: ignore[attr-defined]


def copies(pg: Postgres, folder: Path) -> Iterator[Figure]:
    """`manage.py copy` from SQLite to PostgreSQL and back, both read again and compared."""
    source, target = both(pg, folder, "copy")
    back = f"sqlite:///{folder}/back.db"
    with opened(source) as db:
        deliver.fill(db, 1000, matching=10)
        remember(db, COPIED, clock.now())
    there_s, back_s = (deliver.timed(partial(copied, *urls)) for urls in ((source, target), (target, back)))
    rows = COPIED + COPIED // 10 + 2 * 1000
    measured, against = f"{there_s:.0f} s, {rows / there_s:,.0f} rows/s", f"back: {back_s:.0f} s"
    yield Figure(f"copy of {rows:,} rows to PostgreSQL", measured, against, there_s / back_s, ">= 0")


def copied(source: str, target: str) -> None:
    command = [sys.executable, str(server.ROOT / "manage.py"), "copy", "--from", source, "--to", target]
    subprocess.run(command, cwd=server.ROOT, check=True, capture_output=True)


def purges(pg: Postgres, folder: Path) -> Iterator[Figure]:
    """The p95 of publishing, one event after the other, while the worker of the same process purges."""
    for backend, url in zip(BACKENDS, both(pg, folder, "purge"), strict=True):
        with opened(url) as db:
            deliver.fill(db, 1000, matching=10)
            remember(db, PURGED, clock.now() - timedelta(days=31))
            alone, beside, took = asyncio.run(published_beside_a_purge(db))
            yield Figure(
                f"{backend}: publish p95 beside a purge of {PURGED / took:,.0f} deliveries/s",
                f"{beside * 1e3:.1f} ms",
                f"alone: {alone * 1e3:.1f} ms",
                beside / alone,
                ">= 0",
            )


async def published_beside_a_purge(db: Database) -> tuple[float, float, float]:
    """The p95s alone and beside it, and how long the purge took, in seconds."""
    storage = storage_of(db)
    await storage.start()

    async def publish() -> float:
        start = time.perf_counter()
        await storage.write(events.publish_one, NewEvent("nobody", DATA))
        return time.perf_counter() - start

    def left(db: Database) -> int:
        return int(db.execute_sql("SELECT count(*) FROM events WHERE event_type = 'goal'").fetchone()[0])

    alone = [await publish() for _ in range(PUBLISHED)]
    start = time.perf_counter()
    purging = asyncio.ensure_future(retention.purge_forever(storage, 30 * 86400, first=0))
    beside: list[float] = []
    while await storage.scan(left):
        beside += [await publish() for _ in range(20)]
    took = time.perf_counter() - start
    purging.cancel()
    await storage.stop()
    return statistics.quantiles(alone, n=20)[-1], statistics.quantiles(beside, n=20)[-1], took


def sizes(pg: Postgres) -> Iterator[Figure]:
    """The cost of publishing an event to 10 webhooks and settling its deliveries, among few webhooks and many."""
    with ExitStack() as stack:
        dbs = []
        for size in SIZES:
            url = database(pg, f"webhooks_{size}")
            execute(url, WEBHOOKS.format(size=size))
            execute(url, SUBSCRIPTIONS)
            execute(url, "VACUUM ANALYZE")
            dbs.append(stack.enter_context(opened(url)))
        yield flat(f"PostgreSQL: publish and settle at {SIZES[1]:,} webhooks", f"at {SIZES[0]:,}", dbs)


def histories(pg: Postgres, folder: Path) -> Iterator[Figure]:
    """The cost of such a cycle with an empty log and with a long log, as long as the disk holds."""
    rows = min(HISTORY, shutil.disk_usage(folder).free // 3 // BYTES_OF_HISTORY)
    empties, longs = both(pg, folder, "empty"), both(pg, folder, "history")
    for backend, *urls in zip(BACKENDS, empties, longs, strict=True):
        with opened(urls[0]) as empty, opened(urls[1]) as long:
            for db in (empty, long):
                deliver.fill(db, 1000, matching=10)
            remember(long, rows, clock.now())
            yield flat(f"{backend}: publish and settle with {rows:,} deliveries", "with none", [empty, long])


def flat(claim: str, other: str, dbs: list[Database]) -> Figure:
    """The cost of a cycle in the second database, against the first."""
    works = [cycle(db) for db in dbs]
    deliver.medians(works)  # connections, statements and pages are warm then
    before, after = deliver.medians(works)
    return Figure(claim, f"{after * 1e3:.2f} ms", f"{other}: {before * 1e3:.2f} ms", after / before, "<= 1.5")


def cycle(db: Database) -> Callable[[], None]:
    """Publishes one event to 10 webhooks, loads its deliveries and settles them."""
    woken: list[Wake] = []
    lanes.attach(db, Outlet(lanes.MAX_PAYLOAD, 60, lambda: Slots(1000, 1000), woken.append))
    return lambda: once(db, woken)


def once(db: Database, woken: list[Wake]) -> None:
    events.publish_all(db, [NewEvent("goal", {**DATA, "home_team": "t"})])
    wake = woken.pop()
    with db.connection_context():
        jobs = claiming.load(db, [(delivery_id, wake.until) for delivery_id, _ in wake.leased], wake.since)
    assert len(jobs) == 10
    now = clock.now()
    result = Result(now, 5, 200, None, "ok")
    settlement = policy.settle(result, attempts=1, failures=0, schedule=(5,), now=now)
    with unit(db):
        settling.settle(db, [Settled(job, result, settlement) for job in jobs], stored_time(now))
