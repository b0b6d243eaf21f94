"""A look-up and a page, over HTTP, at 1,000, 100,000 and 1,000,000 webhooks."""

from __future__ import annotations

import http.client
import random
import sqlite3
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks import server
from benchmarks.report import Figure

SIZES = (1_000, 100_000, 1_000_000)
LOOK_UPS, PAGES = 3_000, 600


def run() -> list[Figure]:
    look_ups, pages = zip(*(measure(size) for size in SIZES), strict=True)
    return [*figures("look-up", look_ups), *figures("page of 50", pages)]


def figures(claim: str, medians: tuple[float, ...]) -> Iterator[Figure]:
    for size, median in zip(SIZES[1:], medians[1:], strict=True):
        against = f"at {SIZES[0]:,}: {medians[0] * 1e3:.2f} ms"
        yield Figure(f"{claim} at {size:,}", f"{median * 1e3:.2f} ms", against, median / medians[0], "<= 1.5")


def measure(size: int) -> tuple[float, float]:
    """The median seconds of a look-up and of a page, of random webhooks and from random positions on."""
    with tempfile.TemporaryDirectory(dir=server.DISK) as name:
        database = server.migrated(Path(name))
        ids = fill(database, size)
        with server.hookline(database) as running:
            client = http.client.HTTPConnection(urlsplit(running.url).netloc)
            chosen = random.Random(1).choices(ids, k=LOOK_UPS)
            look_up = median_of(client, [f"/api/v1/webhooks/{webhook_id}" for webhook_id in chosen])
            page = median_of(client, [f"/api/v1/webhooks?limit=50&cursor={cursor(size)}" for _ in range(PAGES)])
            client.close()
    return look_up, page


def cursor(size: int) -> str:
    from web.cursors import cursor_after

    return cursor_after(
        {"created_at": created_at(random.randrange(size)), "webhook_id": ""}, "created_at", "webhook_id"
    )


def median_of(client: http.client.HTTPConnection, paths: list[str]) -> float:
    times = []
    for path in paths:
        start = time.perf_counter()
        client.request("GET", path)
        answer = client.getresponse()
        answer.read()
        times.append(time.perf_counter() - start)
        assert answer.status == 200
    return statistics.median(times)


def fill(database: Path, size: int) -> list[str]:
    ids = [str(uuid.uuid4()) for _ in range(size)]
    columns = "webhook_id, url, events, secret, team, created_at, enabled, total_calls, failed_calls"
    db = sqlite3.connect(database)
    with db:
        db.executemany(
            f"INSERT INTO webhooks ({columns}) VALUES (?, ?, ?, ?, ?, ?, 1, 0, 0)",
            (
                (webhook_id, f"https://example.com/{n}", '["game_started"]', "x" * 20, f"t{n % 32}", stamp(n))
                for n, webhook_id in enumerate(ids)
            ),
        )
        rows = sorted(("game_started", f"t{n % 32}", webhook_id) for n, webhook_id in enumerate(ids))
        db.executemany("INSERT INTO subscriptions (event_type, team, webhook_id) VALUES (?, ?, ?)", rows)
    db.close()
    return ids


def created_at(number: int) -> datetime:
    return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number)


def stamp(number: int) -> str:
    return created_at(number).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
