"""Register and get per second, against bare Starlette (the ceiling) and the SQLAlchemy design (the rival).

All three servers are up at once, on one core, and are loaded in turn, a short round each: other work of the machine
then slows them alike. A figure is the median of the rounds, a ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pyreqwest.client import Client, ClientBuilder

from benchmarks import server
from benchmarks.report import Figure

CONNECTIONS = 32
ROUNDS = 9
SECONDS = 1.0  # of a round
BODY = json.dumps(
    {
        "url": "https://hooks.example.com/sports/ne",
        "events": ["game_started", "score_changed", "game_ended"],
        "secret": "a-secret-of-enough-characters",
        "team": "ne",
    }
).encode()

Request = Callable[[], Awaitable[bytes]]


def run() -> list[Figure]:
    with tempfile.TemporaryDirectory(dir=server.DISK) as name:
        folder = Path(name)
        with (
            server.uvicorn("benchmarks.bare:app", folder / "none.db") as bare,
            server.hookline(server.migrated(folder)) as hookline,
            server.uvicorn("benchmarks.rival:app", folder / "rival.db") as rival,
        ):
            rates = load([bare.url, hookline.url, rival.url])
    return [
        *(figure(claim, rates[claim], 0, "bare Starlette", target) for claim, target in CEILINGS.items()),
        *(figure(claim, rates[claim], 2, "FastAPI + SQLAlchemy", target) for claim, target in RIVALS.items()),
    ]


CEILINGS = {"register": ">= 0.40", "get": ">= 0.60"}
RIVALS = {"register": ">= 4", "get": ">= 1"}


def figure(claim: str, rounds: list[list[float]], other: int, against: str, target: str) -> Figure:
    """`rounds` holds a rate for each server in order: bare, ours, rival."""
    measured = statistics.median(rates[1] for rates in rounds)
    theirs = statistics.median(rates[other] for rates in rounds)
    ratio = statistics.median(rates[1] / rates[other] for rates in rounds)
    return Figure(claim, f"{measured:,.0f}/s", f"{against}: {theirs:,.0f}/s", ratio, target)


def load(urls: list[str]) -> dict[str, list[list[float]]]:
    """Requests per second: by claim, for each round, for each server."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {server.LOAD_CORE})
    try:
        return asyncio.run(measure(urls))
    finally:
        os.sched_setaffinity(0, before)


async def measure(urls: list[str]) -> dict[str, list[list[float]]]:
    async with ClientBuilder().error_for_status().build() as client:
        posts = [register(client, url) for url in urls]
        gets = [look_up(client, url, json.loads(await post())) for url, post in zip(urls, posts, strict=True)]
        return {claim: await in_turn(requests) for claim, requests in (("register", posts), ("get", gets))}


def register(client: Client, url: str) -> Request:
    target = f"{url}/api/v1/webhooks/register"

    async def request() -> bytes:
        built = client.post(target).header("content-type", "application/json").body_bytes(BODY).build()
        return bytes(await (await built.send()).bytes())

    return request


def look_up(client: Client, url: str, webhook: dict[str, Any]) -> Request:
    target = f"{url}/api/v1/webhooks/{webhook['webhook_id']}"

    async def request() -> bytes:
        return bytes(await (await client.get(target).build().send()).bytes())

    return request


async def in_turn(requests: list[Request]) -> list[list[float]]:
    rounds = [[await rate(request) for request in requests] for _ in range(ROUNDS + 1)]
    return rounds[1:]  # the first warms up


async def rate(request: Request) -> float:
    """Answers per second, from CONNECTIONS loops at once."""
    start = time.perf_counter()
    end = start + SECONDS

    async def loop() -> int:
        done = 0
        while time.perf_counter() < end:
            await request()
            done += 1
        return done

    done = sum(await asyncio.gather(*(loop() for _ in range(CONNECTIONS))))
    return done / (time.perf_counter() - start)
