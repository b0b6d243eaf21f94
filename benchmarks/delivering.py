"""One process that publishes and delivers, on one core, and a bare aiohttp loop to the same sink, round by round.

`python -m benchmarks.delivering DATABASE_URL SINK_PORT`: prints a line of JSON for each round.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import sys
import time
from dataclasses import replace
from typing import Any

import aiohttp
import uvloop
from peewee import Database

import models
from assembly import quiet_gc
from hookline import WebhookManager, events
from hookline.egress import Client
from hookline.events import NewEvent
from hookline.policy import DEFAULT
from hookline.store.open import open_database, storage_of
from hookline.store.storage import Storage
from hookline.worker.worker import Worker

ROUNDS = 11
BARE = 1500  # posts in a round
EVENTS = {1: 1500, 10: 150}  # published in a round, by fan-out
CONCURRENCY = 256
WINDOW = {1: 120, 10: 240}  # deliveries in flight: a webhook may have half of the slots
DATA = {
    "game_id": "401547417",
    "home_team": "ne",
    "away_team": "buf",
    "score": {"home": 7, "away": 0},
    "status": "live",
}


async def bare(url: str) -> float:
    """Posts per second of a loop that does nothing else."""
    body = json.dumps({**DATA, "event_type": "score_changed", "timestamp": "2026-11-23T14:30:01.221962"}).encode()
    headers = {"Content-Type": "application/json", "X-Webhook-Event": "score_changed"}
    left = iter(range(BARE))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def post() -> None:
            for _ in left:
                async with session.post(url, data=body, headers=headers) as answer:
                    await answer.read()

        start = time.perf_counter()
        await asyncio.gather(*(post() for _ in range(64)))
        return BARE / (time.perf_counter() - start)


def succeeded(db: Database) -> int:
    return int(db.execute_sql("SELECT coalesce(sum(total_calls - failed_calls), 0) FROM webhooks").fetchone()[0])


async def ours(storage: Storage, fan_out: int) -> float:
    """Deliveries per second, from the first publish to the last one recorded as succeeded.

    At most WINDOW are in flight: more would wait in lanes, which is the slower way.
    """
    before = await storage.read(succeeded)
    total, begun, recorded = EVENTS[fan_out] * fan_out, 0, 0
    publishing: set[asyncio.Task[Any]] = set()
    start = time.perf_counter()
    while recorded < total:
        while begun < total and begun - recorded + fan_out <= WINDOW[fan_out]:
            task = asyncio.ensure_future(storage.write_together(events.publish_all, NewEvent(f"fan_{fan_out}", DATA)))
            publishing.add(task)
            task.add_done_callback(publishing.discard)
            begun += fan_out
        await asyncio.sleep(0.002)  # a look has its cost, too
        recorded = await storage.read(succeeded) - before
    return total / (time.perf_counter() - start)


async def main() -> None:
    db = open_database(sys.argv[1])
    url = f"http://127.0.0.1:{sys.argv[2]}/"
    models.db.initialize(db)
    manager = WebhookManager(db=db)
    for fan_out in EVENTS:
        for number in range(fan_out):
            manager.register(f"{url}{fan_out}/{number}", [f"fan_{fan_out}"], "a-secret-of-enough-characters")
    storage = storage_of(db)
    client = Client(allowed=[ipaddress.ip_network("127.0.0.0/8")])
    worker = Worker(storage, client, replace(DEFAULT, concurrency=CONCURRENCY))
    await storage.start()
    await worker.start()
    quiet_gc()
    for _ in range(ROUNDS + 1):
        figures = {"bare": await bare(url), **{str(fan_out): await ours(storage, fan_out) for fan_out in EVENTS}}
        print(json.dumps(figures), flush=True)
    await worker.stop()
    await storage.stop()


if __name__ == "__main__":
    uvloop.run(main())
