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
from collections.abc import Sequence

from peewee import Database

from hookline import clock, lanes, replays, retention, rotation, signing
from hookline.egress import Client
from hookline.errors import Unavailable
from hookline.lanes import Wake
from hookline.policy import Result, Rules
from hookline.store.failures import LOCKED, error_name
from hookline.store.pool import LOCK_TIMEOUT
from hookline.store.storage import Storage
from hookline.worker import claiming, clock_jumps, heartbeat, orphans, sweeper
from hookline.worker.capacity import Capacity, saturated
from hookline.worker.jobs import Job
from hookline.worker.recorder import AGAIN, MARGIN, Recorder

log = logging.getLogger("hookline")

CROWDED = 0.02  # seconds until the next look where others hold the lanes that are due
POLL = 0.5  # seconds between looks for what other processes queued
LOOKS = 0.01  # of the time, at most, is spent on looking for what a clock that was ahead has set
STALLED = 30  # seconds without a round of the loop
UNUSABLE = "the delivery could not be made: the webhook's headers or its secret cannot be used"


class Worker:
    """Delivers what is in one database. Any number of them may, in any number of processes."""

    def __init__(self, storage: Storage, client: Client, rules: Rules) -> None:
        self.storage, self.client, self.rules = storage, client, rules
        self.beat = time.monotonic()  # when the loop last went round
        self.capacity = Capacity(rules.concurrency, rules.per_webhook)
        self._jobs: dict[int, asyncio.Task[None]] = {}
        self._taking: set[asyncio.Task[None]] = set()
        self._recorder = Recorder(storage, rules, self.capacity, self._end)
        self._coming = 0  # commits that leased deliveries to us, and whose wake has not reached the loop yet
        self._lock = threading.Lock()  # of this count: whoever publishes changes it
        self._backlog = False  # is more due than we had slots for?
        self._stopping = False
        self._problem = ""  # why the last look for deliveries failed
        self._next_sweep = 0.0  # of time.monotonic()
        self._sweeping: asyncio.Task[None] | None = None
        self._orphans: orphans.Positions = {}
        self._next_look = 0.0  # of time.monotonic(): for what a clock that was ahead has set
        self._offset = time.time() - time.monotonic()  # of the wall clock, to notice that it went back

    @property
    def db(self) -> Database:
        return self.storage.db

    def problem(self) -> str | None:
        """What is wrong with this worker, None if its loop goes round."""
        if time.monotonic() - self.beat < STALLED:
            return None
        return f"the delivery worker has not looked for work for {STALLED} s"

    async def start(self) -> None:
        """Begin, on the running event loop. The storage must have been started."""
        self._loop = asyncio.get_running_loop()
        self._awake = asyncio.Event()
        await self.client.start()
        outlet = lanes.Outlet(self.rules.max_payload, self.rules.lease, self.capacity.slots, self.wake)
        lanes.attach(self.db, outlet)
        self.storage.listen(self._awake.set)
        self._running = self._loop.create_task(self._run())
        purging = retention.keep(self.storage, self.rules.retention)
        beside = (purging, replays.keep(self.storage), heartbeat.keep(self.storage))
        self._beside = [self._loop.create_task(one) for one in beside]

    async def stop(self, grace: float = 5) -> None:
        """Claim nothing more, give what is in flight `grace` seconds, and release the rest for other workers."""
        self._stopping = True
        self.capacity.close()
        self._recorder.stop_within(LOCK_TIMEOUT)
        for_others = lanes.outlet_without_worker(self.rules.max_payload, self.storage.notify)
        lanes.attach(self.db, for_others)
        self._awake.set()
        for task in self._beside:
            task.cancel()
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
        await self._recorder.finish()
        await self._release(list(left))
        await asyncio.gather(*self._beside, return_exceptions=True)
        await self.client.close()

    def wake(self, wake: Wake) -> None:
        """Called after a commit, in any thread: what was leased takes its slots now, as far as there are any."""
        fits = self.capacity.take([webhook_id for _, webhook_id in wake.leased])
        kept = [lease for lease, has_slot in zip(wake.leased, fits, strict=True) if has_slot]
        surplus = [delivery_id for (delivery_id, _), has_slot in zip(wake.leased, fits, strict=True) if not has_slot]
        with self._lock:
            self._coming += 1
        self._loop.call_soon_threadsafe(self._take, wake._replace(leased=kept), surplus)

    def _take(self, wake: Wake, surplus: Sequence[int]) -> None:
        with self._lock:
            self._coming -= 1
        if wake.leased or surplus:
            task = self._loop.create_task(self._begin_leased(wake, surplus))
            self._taking.add(task)
            task.add_done_callback(self._taking.discard)
        else:
            self._awake.set()
            self.storage.notify()

    async def _begin_leased(self, wake: Wake, surplus: Sequence[int]) -> None:
        """Begin what this process has published, from its committed rows; give the surplus back, or all if it stops."""
        jobs: list[Job] = []
        try:
            loaded = [] if self._stopping else await self._loaded(wake)
            jobs = [] if self._stopping else loaded
        finally:
            unused = Counter(webhook_id for _, webhook_id in wake.leased)
            unused.subtract(job.webhook_id for job in jobs)
            self.capacity.give_back(unused.elements())
        for job in jobs:
            self._begin(job)
        stopped = [delivery_id for delivery_id, _ in wake.leased] if self._stopping else []
        await self._release([*surplus, *stopped])

    async def _release(self, delivery_ids: Sequence[int]) -> None:
        try:
            if delivery_ids:
                await self.storage.write(claiming.release, delivery_ids)
        except Unavailable as exc:
            log.error("%s deliveries wait for their leases to run out: %s", len(delivery_ids), exc)

    async def _loaded(self, wake: Wake) -> list[Job]:
        leased = [(delivery_id, wake.until) for delivery_id, _ in wake.leased]
        while True:
            try:
                return await self.storage.read(claiming.load, leased, wake.since)
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
                self._recorder.reports.catch_up()
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
        """Every half lease find the leases that ran out, and what a clock that was ahead would hold up."""
        now = time.monotonic()
        went_back = self._offset - (time.time() - now)
        self._offset -= went_back
        if went_back > clock_jumps.JUMP:  # less is no more than a wait
            log.warning("the clock went back by %.0f s", went_back)
            self._next_look = self._next_sweep = 0
        if now >= self._next_sweep and (self._sweeping is None or self._sweeping.done()):
            self._next_sweep = now + self.rules.lease / 2
            self._sweeping = self._loop.create_task(self._sweep())

    async def _sweep(self) -> None:
        """In short steps, beside looking for what is due."""
        try:
            if time.monotonic() >= self._next_look:
                await self._bring_forward()
            await rotation.erase_all(self.storage)
            after: str | None = ""
            while after is not None:
                late, after = await self.storage.scan(sweeper.overdue, after)
                if late:
                    await self.storage.write(lanes.make_due, late)
                    self._awake.set()
            await orphans.sweep(self.storage, self._orphans)
        except Unavailable as exc:
            log.warning("leases that ran out are looked for later: %s", exc)
        except Exception:  # whatever it is, the next one comes
            log.exception("looking for leases that ran out failed")

    async def _bring_forward(self) -> None:
        """What is due later than it can be, a clock that was ahead has set; all of it again, later, if that fails."""
        began, self._next_look = time.monotonic(), math.inf
        try:
            if await clock_jumps.bring_all_forward(self.storage, self.rules):
                self._awake.set()
        except BaseException:
            self._next_look = 0
            raise
        now = time.monotonic()
        self._next_look = min(self._next_look, now + (now - began) / LOOKS)

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._awake.wait()
        except TimeoutError:
            pass
        self._awake.clear()

    async def _step(self) -> float:
        """Claim and begin what is due, as far as there are slots; returns how many seconds to wait for more."""
        slots = self.capacity.slots()
        busy = saturated(slots)
        if not slots.free:
            self._backlog = True
            return POLL
        due = await self.storage.read(claiming.next_due, busy)
        now = clock.now()
        self._backlog = bool(busy) or (due is not None and due <= now)
        if due is None or due > now:
            return POLL if due is None else min(POLL, (due - now).total_seconds())
        try:
            jobs = await self.storage.write(claiming.claim, self.capacity.slots(), self.rules.lease)
        except Unavailable as exc:
            if error_name(exc) != LOCKED:
                raise
            return CROWDED
        await self._begin_claimed(jobs)
        return 0 if jobs else CROWDED

    async def _begin_claimed(self, jobs: list[Job]) -> None:
        """Begin them as far as there are slots: meanwhile others may have leased, and taken some."""
        fits = self.capacity.take([job.webhook_id for job in jobs])
        for job, has_slot in zip(jobs, fits, strict=True):
            if has_slot:
                self._begin(job)
        await self._release([job.delivery_id for job, has_slot in zip(jobs, fits, strict=True) if not has_slot])

    def _begin(self, job: Job) -> None:
        """Begin one that has a slot."""
        if job.delivery_id in self._jobs:  # a lease that ran out on us: the one in flight goes on
            self.capacity.give_back([job.webhook_id])
            return
        self._jobs[job.delivery_id] = self._loop.create_task(self._deliver(job))

    async def _deliver(self, job: Job) -> None:
        """One attempt. Whatever goes wrong with it is its result, so that it is counted."""
        if self._is_too_late(job.leased_at):
            self._end(job)  # too late for us: whoever finds the lease run out sends it
            return
        try:
            result = await self._attempt(job)
        except BaseException:  # it was stopped
            self._end(job)
            raise
        self._recorder.add(job, result)

    async def _attempt(self, job: Job) -> Result:
        started_at = clock.now()
        try:
            headers = self._headers(job)
        except Exception as exc:  # of what is in the database: nothing was sent
            return Result(started_at, 0, error=f"{UNUSABLE}: {type(exc).__name__}")
        try:
            return await self.client.post(job.url, job.body, headers)
        except Exception as exc:
            return Result(started_at, 0, error=f"the request failed: {type(exc).__name__}")

    def _headers(self, job: Job) -> dict[str, str]:
        now = clock.now()
        signed = signing.headers(
            job.secrets(now),
            webhook_id=job.webhook_id,
            event_id=job.event_id,
            event_type=job.event_type,
            event_time=job.event_time,
            timestamp=int(now.timestamp()),
            body=job.body,
        )
        return job.own_headers() | signed if job.headers else signed

    def _end(self, job: Job) -> None:
        del self._jobs[job.delivery_id]
        self.capacity.give_back([job.webhook_id])
        if self._backlog or job.exclusive:
            self._awake.set()
