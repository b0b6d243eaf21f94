"""Record what has come back: in batches, until the database can be used, and results blocked by a lock on their own."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection
from datetime import timedelta

from hookline import clock
from hookline.errors import Unavailable
from hookline.policy import Result, Rules
from hookline.store.failures import LOCKED, error_name
from hookline.store.storage import Storage
from hookline.tables import stored_time
from hookline.worker import attempts, settling
from hookline.worker.capacity import Capacity
from hookline.worker.jobs import Job, Settled, time_left
from hookline.worker.reports import Reports

log = logging.getLogger("hookline")

PAUSE = 1.0  # seconds between tries while the database cannot be used
UNRECORDABLE = "the result of the attempt could not be recorded"


class Recorder:
    """Settles the results of one worker. `end` is called with each job that needs its slot no more."""

    def __init__(self, storage: Storage, rules: Rules, capacity: Capacity, end: Callable[[Job], None]) -> None:
        self.storage, self.rules, self.capacity, self.end = storage, rules, capacity, end
        self.reports = Reports()
        self._results: list[Settled] = []
        self._recording: asyncio.Task[None] | None = None
        self._blocked: dict[str, list[Settled]] = {}  # by webhook, whose row another transaction locks
        self._recording_blocked: asyncio.Task[None] | None = None
        self._stop_by = math.inf  # of time.monotonic(): when to give up results that cannot be recorded

    def add(self, job: Job, result: Result) -> None:
        """Record this result soon, on the running event loop."""
        self._results.append(attempts.decide(job, result, self.rules.retry_schedule))
        if self._recording is None:
            self._recording = asyncio.get_running_loop().create_task(self._record())

    def stop_within(self, seconds: float) -> None:
        """Wait no longer than this for a lock, and for a database that cannot be used not at all."""
        self._stop_by = time.monotonic() + seconds

    async def finish(self) -> None:
        """Wait until all that has come back is recorded or given up."""
        if self._recording is not None:
            await self._recording
        if self._recording_blocked is not None:
            await self._recording_blocked

    async def _record(self) -> None:
        """Record batch after batch: the next one gathers while one is committed."""
        while batch := self._results:
            self._results = []
            blocked = [settled for settled in batch if settled.job.webhook_id in self._blocked]
            blocked += await self._settle([settled for settled in batch if settled.job.webhook_id not in self._blocked])
            self._end_all(batch, but=blocked)
            for settled in blocked:
                of_webhook = self._blocked.setdefault(settled.job.webhook_id, [])
                of_webhook.append(settled)
                self.capacity.block(settled.job.webhook_id, len(of_webhook))
            if blocked and self._recording_blocked is None:
                self._recording_blocked = asyncio.get_running_loop().create_task(self._record_blocked())
        self._recording = None

    async def _record_blocked(self) -> None:
        """Try each blocked webhook on its own, until none is blocked."""
        while self._blocked:
            await asyncio.sleep(PAUSE)
            for webhook_id in list(self._blocked):
                batch = list(self._blocked[webhook_id])
                blocked = await self._settle(batch, skip_blocked=True)
                give_up = time.monotonic() > self._stop_by
                blocked = self._kept(blocked, "another transaction locks their webhook", give_up)
                self._blocked[webhook_id][: len(batch)] = blocked  # behind them is what came back meanwhile
                self.capacity.block(webhook_id, len(self._blocked[webhook_id]))
                self._end_all(batch, but=blocked)
                if not self._blocked[webhook_id]:
                    del self._blocked[webhook_id]
        self._recording_blocked = None

    async def _settle(self, batch: list[Settled], skip_blocked: bool = False) -> list[Settled]:
        """Record these as soon as the database can be used; returns those whose webhook is blocked by a lock."""
        while batch:
            try:
                return await self._commit(batch, skip_blocked)
            except Unavailable as exc:
                if error_name(exc) != LOCKED:
                    batch = self._kept(batch, str(exc), self._stop_by < math.inf)
                    await asyncio.sleep(PAUSE if batch else 0)
                elif skip_blocked:
                    return batch
                else:
                    skip_blocked = True
            except Exception as exc:
                return await self._settle_each(batch, skip_blocked, type(exc).__name__)
        return []

    async def _commit(self, batch: list[Settled], skip_blocked: bool) -> list[Settled]:
        cutoff = stored_time(clock.now() - timedelta(seconds=self.rules.disable_after))
        outcomes = await self.storage.write(settling.settle, batch, cutoff, skip_blocked)
        self.reports.recorded(_without(batch, outcomes.blocked), outcomes)
        return outcomes.blocked

    async def _settle_each(self, batch: list[Settled], skip_blocked: bool, why: str) -> list[Settled]:
        """Settle each alone, as one cannot be recorded: that one as a failure, without what came with its answer."""
        if len(batch) > 1:
            return [blocked for settled in batch for blocked in await self._settle([settled], skip_blocked)]
        job, result, _ = batch[0]
        if result.error == UNRECORDABLE:
            log.error("delivery %s waits for its lease to expire: %s", job.delivery_id, why)
            return []
        log.error("delivery %s: %s: %s", job.delivery_id, UNRECORDABLE, why)
        failure = Result(result.started_at, result.duration_ms, error=UNRECORDABLE)
        return await self._settle([attempts.decide(job, failure, self.rules.retry_schedule)], skip_blocked)

    def _kept(self, batch: list[Settled], why: str, give_up: bool) -> list[Settled]:
        """The results to try again, unless we `give_up`: failures while they are leased to us, successes always."""

        def may_wait(settled: Settled) -> bool:
            return not settled.settlement.counts_as_failure or time_left(settled.job.leased_at, self.rules.lease) > 0

        kept = [] if give_up else [settled for settled in batch if may_wait(settled)]
        if len(kept) < len(batch):
            count = len(batch) - len(kept)
            log.error("the results of %s deliveries are lost, they will be made again: %s", count, why)
        return kept

    def _end_all(self, batch: list[Settled], but: list[Settled]) -> None:
        for settled in _without(batch, but):
            self.end(settled.job)


def _without(batch: Collection[Settled], others: Collection[Settled]) -> list[Settled]:
    delivery_ids = {settled.job.delivery_id for settled in others}
    return [settled for settled in batch if settled.job.delivery_id not in delivery_ids]
