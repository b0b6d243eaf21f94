"""Register and get per second, against bare Starlette (the ceiling) and the SQLAlchemy design (the rival)."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from pyreqwest.client import ClientBuilder

from benchmarks import server
from benchmarks.report import Figure

CONNECTIONS = 32
SECONDS = 5
WARM_UP = 1
BODY = json.dumps(
    {
        "url": "https://hooks.example.com/sports/ne",
        "events": ["game_started", "score_changed", "game_ended"],
        "secret": "a-secret-of-enough-characters",
        "team": "ne",
    }
).encode()


def run() -> list[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with server.uvicorn("benchmarks.bare:app", folder / "none.db") as running:
            bare_register, bare_get = load(running.url)
        with server.hookline(server.migrated(folder)) as running:
            register, get = load(running.url)
        with server.uvicorn("benchmarks.rival:app", folder / "rival.db") as running:
            rival_register, rival_get = load(running.url)
    return [
        figure("register", register, "bare Starlette", bare_register, ">= 0.40"),
        figure("get", get, "bare Starlette", bare_get, ">= 0.60"),
        figure("register", register, "FastAPI + SQLAlchemy", rival_register, ">= 4"),
        figure("get", get, "FastAPI + SQLAlchemy", rival_get, ">= 1"),
    ]


def figure(claim: str, measured: float, against: str, other: float, target: str) -> Figure:
    return Figure(claim, f"{measured:,.0f}/s", f"{against}: {other:,.0f}/s", measured / other, target)


def load(url: str) -> tuple[float, float]:
    """Registrations and look-ups per second."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {server.LOAD_CORE})
    try:
        return asyncio.run(measure(url))
    finally:
        os.sched_setaffinity(0, before)


async def measure(url: str) -> tuple[float, float]:
    async with ClientBuilder().error_for_status().build() as client:
        post = f"{url}/api/v1/webhooks/register"

        async def register() -> Any:
            request = client.post(post).header("content-type", "application/json").body_bytes(BODY).build()
            return await (await request.send()).bytes()

        registered = json.loads(bytes(await register()))
        one = f"{url}/api/v1/webhooks/{registered['webhook_id']}"

        async def get() -> Any:
            return await (await client.get(one).build().send()).bytes()

        return await rate(register), await rate(get)


async def rate(request: Any) -> float:
    """Answers per second, from CONNECTIONS loops at once."""
    await repeat(request, WARM_UP)
    start = time.perf_counter()
    done = await repeat(request, SECONDS)
    return done / (time.perf_counter() - start)


async def repeat(request: Any, seconds: float) -> int:
    end = time.perf_counter() + seconds

    async def loop() -> int:
        done = 0
        while time.perf_counter() < end:
            await request()
            done += 1
        return done

    return sum(await asyncio.gather(*(loop() for _ in range(CONNECTIONS))))
