"""Records what has come back: in batches, until the database can be used, and those blocked by a lock on their own."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from hookline import clock, policy
from hookline.errors import Unavailable
from hookline.policy import Result, Rules
from hookline.store.failures import LOCKED, error_name
from hookline.store.storage import Storage
from hookline.tables import stored_time
from hookline.worker import settling
from hookline.worker.capacity import Capacity
from hookline.worker.jobs import Job, Settled
from hookline.worker.reports import Reports

log = logging.getLogger("hookline")

AGAIN = 1.0  # seconds between tries while the database cannot be used
MARGIN = 1.0  # seconds of a lease that are left for settling
UNRECORDABLE = "the result of the attempt could not be recorded"


class Recorder:
    """Settles the results of one worker. `end` is told of each job that needs its slot no more."""

    def __init__(self, storage: Storage, rules: Rules, capacity: Capacity, end: Callable[[Job], None]) -> None:
        self.storage, self.rules, self.capacity, self.end = storage, rules, capacity, end
        self.reports = Reports()
        self._results: list[Settled] = []
        self._recording: asyncio.Task[None] | None = None
        self._blocked: dict[str, list[Settled]] = {}  # of webhooks that somebody else holds
        self._recording_blocked: asyncio.Task[None] | None = None
        self._stop_by = math.inf  # of time.monotonic(): when to give up what somebody else keeps us from recording

    def add(self, job: Job, result: Result) -> None:
        """Record this result soon, on the running event loop."""
        self._results.append(Settled(job, result, self._settlement(job, result)))
        if self._recording is None:
            self._recording = asyncio.get_running_loop().create_task(self._record())

    def stop_within(self, seconds: float) -> None:
        """Wait no longer than this for a lock, and for a database that cannot be used not at all."""
        self._stop_by = time.monotonic() + seconds

    async def finish(self) -> None:
        """Wait for all that has come back."""
        if self._recording is not None:
            await self._recording
        if self._recording_blocked is not None:
            await self._recording_blocked

    def _settlement(self, job: Job, result: Result) -> policy.Settlement:
        is_success = policy.outcome_of(result) is policy.Outcome.SUCCEEDED
        return policy.settle(
            result,
            attempts=job.attempts + 1 - job.attempts_before,
            failures=job.failures,
            schedule=() if is_success else self._schedule(job),
            now=clock.now(),
        )

    def _schedule(self, job: Job) -> Sequence[float]:
        try:
            return job.own_schedule() or self.rules.retry_schedule
        except Exception:  # whatever is in the database
            log.warning("webhook %s: its retry schedule cannot be used, the service's own is", job.webhook_id)
            return self.rules.retry_schedule

    async def _record(self) -> None:
        """One batch after the other: the next one gathers while one is committed."""
        while batch := self._results:
            self._results = []
            blocked = [one for one in batch if one.job.webhook_id in self._blocked]
            blocked += await self._settle([one for one in batch if one.job.webhook_id not in self._blocked])
            self._end_all(batch, but=blocked)
            for one in blocked:
                of_webhook = self._blocked.setdefault(one.job.webhook_id, [])
                of_webhook.append(one)
                self.capacity.block(one.job.webhook_id, len(of_webhook))
            if blocked and self._recording_blocked is None:
                self._recording_blocked = asyncio.get_running_loop().create_task(self._record_blocked())
        self._recording = None

    async def _record_blocked(self) -> None:
        """Again and again, each webhook for itself, until nobody else holds it."""
        while self._blocked:
            await asyncio.sleep(AGAIN)
            for webhook_id in list(self._blocked):
                batch = list(self._blocked[webhook_id])
                left = await self._settle(batch, only_free=True)
                left = self._still_ours(left, "somebody else holds their webhook", time.monotonic() > self._stop_by)
                self._blocked[webhook_id][: len(batch)] = left  # behind them is what came back meanwhile
                self.capacity.block(webhook_id, len(self._blocked[webhook_id]))
                self._end_all(batch, but=left)
                if not self._blocked[webhook_id]:
                    del self._blocked[webhook_id]
        self._recording_blocked = None

    async def _settle(self, batch: list[Settled], only_free: bool = False) -> list[Settled]:
        """Record these as soon as the database can be used; returns those whose webhook somebody else holds."""
        while batch:
            try:
                return await self._commit(batch, only_free)
            except Unavailable as exc:
                if error_name(exc) != LOCKED:
                    batch = self._still_ours(batch, str(exc), self._stop_by < math.inf)
                    await asyncio.sleep(AGAIN if batch else 0)
                elif only_free:
                    return batch
                else:
                    only_free = True
            except Exception as exc:
                return await self._settle_each(batch, only_free, type(exc).__name__)
        return []

    async def _commit(self, batch: list[Settled], only_free: bool) -> list[Settled]:
        cutoff = stored_time(clock.now() - timedelta(seconds=self.rules.disable_after))
        outcomes = await self.storage.write(settling.settle, batch, cutoff, only_free)
        left = {one.job.delivery_id for one in outcomes.left}
        self.reports.recorded([one for one in batch if one.job.delivery_id not in left], outcomes)
        return outcomes.left

    async def _settle_each(self, batch: list[Settled], only_free: bool, why: str) -> list[Settled]:
        """One of them cannot be recorded: each alone, and that one as a failure, without what came with its answer."""
        if len(batch) > 1:
            return [left for one in batch for left in await self._settle([one], only_free)]
        job, result, _ = batch[0]
        if result.error == UNRECORDABLE:
            log.error("delivery %s waits for its lease to run out: %s", job.delivery_id, why)
            return []
        log.error("delivery %s: %s: %s", job.delivery_id, UNRECORDABLE, why)
        failure = Result(result.started_at, result.duration_ms, error=UNRECORDABLE)
        return await self._settle([Settled(job, failure, self._settlement(job, failure))], only_free)

    def _still_ours(self, batch: list[Settled], why: str, give_up: bool) -> list[Settled]:
        """Those that may be recorded later: failures while they are leased to us, successes as long as we run."""
        begun = time.monotonic() - self.rules.lease + MARGIN  # leases from before are over
        found = [] if give_up else [one for one in batch if one.is_success or one.job.leased_at > begun]
        if lost := len(batch) - len(found):
            log.error("the results of %s deliveries are lost, they will be made again: %s", lost, why)
        return found

    def _end_all(self, batch: list[Settled], but: list[Settled]) -> None:
        kept = {one.job.delivery_id for one in but}
        for one in batch:
            if one.job.delivery_id not in kept:
                self.end(one.job)
