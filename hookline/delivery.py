"""The worker: takes what is due, sends it, and settles it.

    published here  → leased to us → sent at once ─┐
    due in a lane   → claimed      → sent ─────────┴→ settled, in batches, by the group commit

Every delivery comes from a committed row, and every settlement names the state that it leaves. If a worker dies its
leases run out and the sweep opens their lanes: delivery is at least once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from datetime import timedelta

from peewee import Database

from hookline import clock, events, lanes, orphans, policy, recovery, retention, signing
from hookline.database import LOCK_TIMEOUT
from hookline.egress import Client
from hookline.errors import Unavailable
from hookline.events import Wake
from hookline.failures import LOCKED, error_name
from hookline.lanes import Job, Settled
from hookline.policy import Rules
from hookline.storage import Storage
from models import read_time, stored_time

log = logging.getLogger("hookline")

CROWDED = 0.02  # seconds until the next look where others hold the lanes that are due
POLL = 0.5  # seconds between looks for what other processes queued
MARGIN = 1.0  # seconds of a lease that are left for settling
JUMP = 60.0  # seconds that the clock may go back before what waits is looked through
AGAIN = 1.0  # seconds between tries while the database cannot be used


class Worker:
    """Delivers what is in one database. Any number of them may, in any number of processes."""

    def __init__(self, storage: Storage, client: Client, rules: Rules, max_payload: int = 256 * 1024) -> None:
        self.storage, self.client, self.rules = storage, client, rules
        self.max_payload = max_payload
        self.beat = time.monotonic()  # when the loop last went round
        self._jobs: dict[int, asyncio.Task[None]] = {}
        self._held: Counter[str] = Counter()  # deliveries of each webhook that we have, those coming included
        self._lock = threading.Lock()  # of the two counts: whoever publishes changes them
        self._taking: set[asyncio.Task[None]] = set()
        self._settled: list[Settled] = []  # what has come back and is not recorded yet
        self._recording: asyncio.Task[None] | None = None
        self._aside: dict[str, list[Settled]] = {}  # of webhooks that somebody else holds
        self._recording_aside: asyncio.Task[None] | None = None
        self._coming = 0  # deliveries leased to us by a commit whose wake has not reached the loop yet
        self._backlog = False  # is more due than we had slots for?
        self._stopping = False
        self._stop_by = math.inf  # of time.monotonic(): when to give up what somebody else keeps us from recording
        self._problem = ""  # why the last look for deliveries failed
        self._next_sweep = 0.0  # of time.monotonic()
        self._sweeping: asyncio.Task[None] | None = None
        self._orphans: orphans.Positions = {}
        self._rewind = False  # did the clock go back?
        self._offset = time.time() - time.monotonic()  # of the wall clock, to notice that it went back

    @property
    def db(self) -> Database:
        return self.storage.db

    async def start(self) -> None:
        """Begin, on the running event loop. The storage must have been started."""
        self._loop = asyncio.get_running_loop()
        self._awake = asyncio.Event()
        await self.client.start()
        outlet = events.Outlet(self.max_payload, self.rules.lease, self.slots, self.wake)
        events.attach(self.db, outlet)
        self.storage.listen(self._awake.set)
        self._running = self._loop.create_task(self._run())
        self._purging = self._loop.create_task(retention.keep(self.storage, self.rules.retention))

    async def stop(self, grace: float = 5) -> None:
        """Claim nothing more, give what is in flight `grace` seconds, and release the rest for other workers."""
        self._stopping = True
        self._stop_by = time.monotonic() + LOCK_TIMEOUT
        for_others = events.Outlet(self.max_payload, self.rules.lease, wake=lambda wake: self.storage.notify())
        events.attach(self.db, for_others)
        self._awake.set()
        self._purging.cancel()
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)
        await self._running
        while self._taking or self._coming:
            await asyncio.gather(asyncio.sleep(0), *self._taking, return_exceptions=True)
        if self._jobs:
            await asyncio.wait(self._jobs.values(), timeout=grace)
        left = {delivery_id: task for delivery_id, task in self._jobs.items() if not task.done()}
        for task in left.values():
            task.cancel()
        await asyncio.gather(*left.values(), return_exceptions=True)
        if self._recording is not None:
            await self._recording
        if self._recording_aside is not None:
            await self._recording_aside
        await self._release(list(left))
        await self.client.close()

    def slots(self) -> events.Slots:
        """What we can take now. Asked by whoever publishes, in any thread."""
        return events.Slots(self._free, self.rules.share, self._busy)

    def wake(self, wake: Wake) -> None:
        """Called after a commit, in any thread."""
        with self._lock:
            self._coming += len(wake.leased)
            self._held.update(webhook_id for _, webhook_id in wake.leased)
        self._loop.call_soon_threadsafe(self._take, wake)

    @property
    def _free(self) -> int:
        if self._stopping:
            return 0
        aside = sum(map(len, list(self._aside.values())))
        slots = self.rules.concurrency + min(aside, self.rules.concurrency)  # so many hold none: there come no more
        return max(slots - len(self._jobs) - self._coming, 0)

    @property
    def _busy(self) -> list[str]:
        """The webhooks that have half of our slots, and those whose results we cannot record."""
        aside = list(self._aside)
        if len(self._jobs) + self._coming < self.rules.share:
            return aside
        with self._lock:
            return aside + [webhook_id for webhook_id, held in self._held.items() if held >= self.rules.share]

    def _take(self, wake: Wake) -> None:
        if wake.leased:
            task = self._loop.create_task(self._begin_leased(wake))
            self._taking.add(task)
            task.add_done_callback(self._taking.discard)
        else:
            self._awake.set()
            self.storage.notify()

    async def _begin_leased(self, wake: Wake) -> None:
        """Begin what this process has published, from its committed rows; give it back if it stops."""
        try:
            jobs = [] if self._stopping else await self._loaded(wake)
        finally:
            with self._lock:
                self._coming -= len(wake.leased)
                self._held.subtract(webhook_id for _, webhook_id in wake.leased)
        if self._stopping:
            await self._release([delivery_id for delivery_id, _ in wake.leased])
            return
        for job in jobs:
            self._begin(job)

    async def _release(self, delivery_ids: list[int]) -> None:
        try:
            if delivery_ids:
                await self.storage.write(lanes.release, self.db, delivery_ids)
        except Unavailable as exc:
            log.error("%s deliveries wait for their leases to run out: %s", len(delivery_ids), exc)

    async def _loaded(self, wake: Wake) -> list[Job]:
        leased = [(delivery_id, wake.until) for delivery_id, _ in wake.leased]
        while True:
            try:
                return await self.storage.read(lanes.load, self.db, leased, wake.since)
            except Unavailable as exc:  # try as long as they are ours
                if self._stopping or self._is_too_late(wake.since):
                    log.error("%s deliveries wait for their leases to run out: %s", len(leased), exc)
                    return []
                await asyncio.sleep(AGAIN)

    def _is_too_late(self, since: float) -> bool:
        """Would an attempt that began now outlast a lease from then?"""
        return time.monotonic() - since > self.rules.lease - self.rules.timeout - MARGIN

    async def _run(self) -> None:
        while not self._stopping:
            try:
                self._heal()
                wait = await self._step()
                self.beat = time.monotonic()
                self._report("")
            except Unavailable as exc:
                self._report(str(exc))
                wait = POLL
            except Exception:  # whatever it is, the loop must outlive it
                log.exception("looking for deliveries failed")
                wait = POLL
            if wait:
                await self._sleep(wait)

    def _report(self, problem: str) -> None:
        """Log that the database cannot be used, and that it can again: once each, not at every look."""
        if problem and problem != self._problem:
            log.error("cannot look for deliveries: %s", problem)
        elif self._problem and not problem:
            log.info("looking for deliveries again")
        self._problem = problem

    def _heal(self) -> None:
        """Every half lease find the leases that ran out; mend what a clock that went far back would hold up."""
        now = time.monotonic()
        went_back = self._offset - (time.time() - now)
        self._offset -= went_back
        if went_back > JUMP:  # less is no more than a wait
            log.warning("the clock went back by %.0f s", went_back)
            self._rewind, self._next_sweep = True, 0
        if now >= self._next_sweep and (self._sweeping is None or self._sweeping.done()):
            self._next_sweep = now + self.rules.lease / 2
            self._sweeping = self._loop.create_task(self._sweep())

    async def _sweep(self) -> None:
        """In short steps, beside looking for what is due."""
        try:
            if self._rewind:
                await self._bring_forward()
            after: str | None = ""
            while after is not None:
                late, after = await self.storage.scan(recovery.overdue, self.db, after)
                if late:
                    await self.storage.write(recovery.open_lanes, self.db, late)
                    self._awake.set()
            await orphans.sweep(self.storage, self._orphans)
        except Unavailable as exc:
            log.warning("leases that ran out are looked for later: %s", exc)
        except Exception:  # whatever it is, the next one comes
            log.exception("looking for leases that ran out failed")

    async def _bring_forward(self) -> None:
        """What a clock that went back would hold up; all of it again, later, if that fails."""
        self._rewind = False
        try:
            for batch in await self.storage.scan(recovery.far_ahead, self.db, self.rules.lease):
                await self.storage.write(recovery.bring_forward, self.db, self.rules.lease, *batch)
        except BaseException:
            self._rewind = True
            raise
        self._awake.set()

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._awake.wait()
        except TimeoutError:
            pass
        self._awake.clear()

    async def _step(self) -> float:
        """Claim and begin what is due, as far as there are slots; returns how many seconds to wait for more."""
        free = self._free
        if not free:
            self._backlog = True
            return POLL
        busy = self._busy
        due = await self.storage.read(lanes.next_due, self.db, busy)
        now = clock.now()
        self._backlog = bool(busy) or (due is not None and due <= now)
        if due is None or due > now:
            return POLL if due is None else min(POLL, (due - now).total_seconds())
        try:
            jobs = await self.storage.write(lanes.claim, self.db, self.rules, free, dict(self._held), busy)
        except Unavailable as exc:
            if error_name(exc) != LOCKED:
                raise
            return CROWDED
        for job in jobs:
            self._begin(job)
        return 0 if jobs else CROWDED

    def _begin(self, job: Job) -> None:
        if job.delivery_id in self._jobs:  # a lease that ran out on us: the one in flight goes on
            return
        with self._lock:
            self._held[job.webhook_id] += 1
        self._jobs[job.delivery_id] = self._loop.create_task(self._deliver(job))

    async def _deliver(self, job: Job) -> None:
        """One attempt. If this fails the lease runs out and the delivery is made again."""
        try:
            if self._is_too_late(job.leased_at):
                self._end(job)  # too late for us: whoever finds the lease run out sends it
                return
            result = await self.client.post(job.url, job.body, self._headers(job))
            settlement = policy.settle(
                result,
                attempts=job.attempts + 1 - job.attempts_before,
                failures=job.failures,
                schedule=job.own_schedule() or self.rules.retry_schedule,
                now=clock.now(),
            )
        except BaseException as exc:
            self._end(job)
            if not isinstance(exc, Exception):
                raise
            log.exception("delivery %s waits for its lease to run out", job.delivery_id)
        else:
            self._settled.append(Settled(job, result, settlement))
            if self._recording is None:
                self._recording = self._loop.create_task(self._record())

    def _headers(self, job: Job) -> dict[str, str]:
        now = clock.now()
        secrets = [job.secret]
        if job.previous_secret and (expires := read_time(job.previous_secret_expires_at)) and expires > now:
            secrets.append(job.previous_secret)
        signed = signing.headers(
            secrets,
            webhook_id=job.webhook_id,
            event_id=job.event_id,
            event_type=job.event_type,
            event_time=job.event_time,
            timestamp=int(now.timestamp()),
            body=job.body,
        )
        return job.own_headers() | signed if job.headers else signed

    async def _record(self) -> None:
        """Settle what has come back, one batch after the other: the next one gathers while one is committed."""
        while batch := self._settled:
            self._settled = []
            held = [one for one in batch if one.job.webhook_id in self._aside]
            held += await self._settle([one for one in batch if one.job.webhook_id not in self._aside])
            self._end_all(batch, but=held)
            for one in held:
                self._aside.setdefault(one.job.webhook_id, []).append(one)
            if held and self._recording_aside is None:
                self._recording_aside = self._loop.create_task(self._record_aside())
        self._recording = None

    async def _record_aside(self) -> None:
        """Settle what was put aside again and again, each webhook for itself, until nobody else holds it."""
        while self._aside:
            await asyncio.sleep(AGAIN)
            for webhook_id in list(self._aside):
                batch = list(self._aside[webhook_id])
                held = await self._settle(batch, only_free=True)
                held = self._still_ours(held, "somebody else holds their webhook", time.monotonic() > self._stop_by)
                self._end_all(batch, but=held)
                self._aside[webhook_id][: len(batch)] = held  # behind them is what came back meanwhile
                if not self._aside[webhook_id]:
                    del self._aside[webhook_id]
        self._recording_aside = None

    async def _settle(self, batch: list[Settled], only_free: bool = False) -> list[Settled]:
        """Record these as soon as the database can be used; returns those whose webhook somebody else holds."""
        while batch:
            try:
                cutoff = stored_time(clock.now() - timedelta(seconds=self.rules.disable_after))
                return await self.storage.write(lanes.settle, self.db, batch, cutoff, only_free)
            except Unavailable as exc:
                if error_name(exc) != LOCKED:
                    batch = self._still_ours(batch, str(exc), self._stopping)
                    await asyncio.sleep(AGAIN if batch else 0)
                elif only_free:
                    return batch
                else:
                    only_free = True
            except Exception:
                log.exception("%s deliveries wait for their leases to run out", len(batch))
                return []
        return []

    def _still_ours(self, batch: list[Settled], why: str, give_up: bool) -> list[Settled]:
        """Those that may be recorded later: failures while they are leased to us, successes as long as we run."""
        begun = time.monotonic() - self.rules.lease + MARGIN  # leases from before are over
        found = [] if give_up else [one for one in batch if one.is_success or one.job.leased_at > begun]
        if lost := len(batch) - len(found):
            log.error("the results of %s deliveries are lost, they will be made again: %s", lost, why)
        return found

    def _end_all(self, batch: list[Settled], but: list[Settled]) -> None:
        held = {one.job.delivery_id for one in but}
        for one in batch:
            if one.job.delivery_id not in held:
                self._end(one.job)

    def _end(self, job: Job) -> None:
        del self._jobs[job.delivery_id]
        with self._lock:
            self._held[job.webhook_id] -= 1
            if not self._held[job.webhook_id]:
                del self._held[job.webhook_id]
        if self._backlog or job.exclusive:
            self._awake.set()


def problem(worker: Worker | None) -> str | None:
    """What is wrong with this process's worker, None if it beats."""
    if worker is None or time.monotonic() - worker.beat < 30:
        return None
    return "the delivery worker has not looked for work for 30 s"
