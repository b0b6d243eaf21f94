"""Sweep: find what would otherwise be sent never or too late, or stay for ever; in short steps, to hold up no writer.

Every half lease: leases that have expired, secrets that have expired, and rows of deleted parents. At the start, when
the clock has gone back, and now and then: times that a clock which was ahead has set.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from hookline import clock, lanes, rotation
from hookline.errors import Unavailable
from hookline.policy import Rules
from hookline.store.storage import Storage
from hookline.worker import clock_jumps, expired_leases, orphans

log = logging.getLogger("hookline")

LOOKS = 0.01  # of the time, at most, is spent on looking for what a clock that was ahead has set


class Sweeper:
    """The sweeps of one worker. `wake` is called when lanes have become due."""

    def __init__(self, storage: Storage, rules: Rules, wake: Callable[[], None]) -> None:
        self.storage, self.rules, self.wake = storage, rules, wake
        self.sweeps = 0  # that have ended
        self._sweeping: asyncio.Task[None] | None = None
        self._next_sweep = 0.0  # of time.monotonic()
        self._next_look = 0.0  # of time.monotonic(): for what a clock that was ahead has set
        self._offset = clock.now().timestamp() - time.monotonic()  # of the clock, to notice that it went back
        self._orphans: orphans.Positions = {}

    def start_if_due(self) -> None:
        """Start a sweep beside the caller if the last one began half a lease ago, or the clock has gone back since."""
        now = time.monotonic()
        went_back = self._offset - (clock.now().timestamp() - now)
        self._offset -= went_back
        if went_back > clock_jumps.JUMP:  # less is no more than a wait
            log.warning("the clock went back by %.0f s", went_back)
            self._next_look = self._next_sweep = 0
        if now >= self._next_sweep and (self._sweeping is None or self._sweeping.done()):
            self._next_sweep = now + self.rules.lease / 2
            self._sweeping = asyncio.get_running_loop().create_task(self._sweep())

    async def stop(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)

    async def _sweep(self) -> None:
        try:
            if time.monotonic() >= self._next_look:
                await self._bring_forward()
            await rotation.erase_all(self.storage)
            await self._reopen_lanes()
            await orphans.sweep(self.storage, self._orphans)
        except Unavailable as exc:
            log.warning("expired leases are looked for later: %s", exc)
        except Exception:  # whatever it is, the next sweep comes
            log.exception("looking for expired leases failed")
        self.sweeps += 1

    async def _bring_forward(self) -> None:
        """Look through all times, and look again later, or in the next sweep if this fails."""
        began, self._next_look = time.monotonic(), math.inf
        try:
            if await clock_jumps.bring_all_forward(self.storage, self.rules):
                self.wake()
        except BaseException:
            self._next_look = 0
            raise
        now = time.monotonic()
        self._next_look = min(self._next_look, now + (now - began) / LOOKS)

    async def _reopen_lanes(self) -> None:
        """Make the lanes due whose leases have expired."""
        after: str | None = ""
        while after is not None:
            webhook_ids, after = await self.storage.scan(expired_leases.overdue, after)
            if webhook_ids:
                await self.storage.write(lanes.make_due, webhook_ids)
                self.wake()
