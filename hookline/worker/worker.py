"""The worker: claims what is due, sends it, and has it settled.

    published here  → leased to us → sent at once ─┐
    due in a lane   → claimed      → sent ─────────┴→ settled, in batches, by the group commit

Every delivery comes from a committed row, and every settlement names the state that it leaves. If a worker dies its
leases expire and the sweep of another one makes their lanes due: delivery is at least once.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence

from peewee import Database

from hookline import clock, lanes, replays, retention
from hookline.egress.client import Client
from hookline.egress.names import Busy
from hookline.errors import Unavailable
from hookline.lanes import Wake
from hookline.policy import Rules
from hookline.store.failures import LOCKED, error_name
from hookline.store.pool import LOCK_TIMEOUT
from hookline.store.storage import Storage
from hookline.worker import attempts, claiming, heartbeat
from hookline.worker.capacity import Capacity, saturated
from hookline.worker.jobs import Job, time_left
from hookline.worker.recorder import PAUSE, Recorder
from hookline.worker.sweeper import Sweeper

log = logging.getLogger("hookline")

CROWDED = 0.02  # seconds until the next look where others have locked the lanes that are due
POLL = 0.5  # seconds between looks for what other processes queued
STALLED = 30  # seconds without a round of the loop


class Worker:
    """Delivers what is in one database. Any number of workers may, in any number of processes."""

    def __init__(self, storage: Storage, client: Client, rules: Rules) -> None:
        self.storage, self.client, self.rules = storage, client, rules
        self.beat = time.monotonic()  # when the loop last went round
        self.capacity = Capacity(rules.concurrency, rules.per_webhook)
        self.sweeper = Sweeper(storage, rules, self._wake_loop)
        self._recorder = Recorder(storage, rules, self.capacity, self._end)
        self._jobs: dict[int, asyncio.Task[None]] = {}  # in flight, by delivery_id
        self._taking: set[asyncio.Task[None]] = set()
        self._coming = 0  # commits that leased deliveries to us, and whose wake has not reached the loop yet
        self._lock = threading.Lock()  # of this count: publishers change it
        self._backlog = False  # is more due than we had slots for?
        self._stopping = False
        self._problem = ""  # why the last look for deliveries failed

    @property
    def db(self) -> Database:
        return self.storage.db

    @property
    def in_flight(self) -> int:
        """The number of jobs whose results are not recorded yet, including those blocked by a lock."""
        return len(self._jobs)

    def problem(self) -> str | None:
        """A sentence if the loop of this worker does not go round, else None."""
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
        purge = retention.purge_forever(self.storage, self.rules.retention)
        chores = (purge, replays.carry_out(self.storage), heartbeat.beat_forever(self.storage))
        self._chores = [self._loop.create_task(chore) for chore in chores]

    async def stop(self, grace: float = 5) -> None:
        """Stop, in this order:

        1. Take nothing more: no slot is free, and what is published waits in its lane for other workers.
        2. Cancel the chores (purging, replays, heartbeats) and the sweep.
        3. Wait for the round of the loop, and for leases of commits that are on their way to us.
        4. Give the requests in flight `grace` seconds; cancel the rest.
        5. Record all that has come back, as far as the database and its locks allow within a moment.
        6. Release the leases of what was cancelled, so that other workers send it at once.
        7. Wait for the chores: the heartbeat deletes its row last. Close the client.
        """
        self._stopping = True
        self.capacity.close()
        self._recorder.stop_within(LOCK_TIMEOUT)
        lanes.attach(self.db, lanes.outlet_without_worker(self.rules.max_payload, self.storage.notify))
        self._awake.set()
        for task in self._chores:
            task.cancel()
        await self.sweeper.stop()
        await self._running
        while self._taking or self._coming:
            await asyncio.gather(asyncio.sleep(0), *self._taking, return_exceptions=True)
        if self._jobs:
            await asyncio.wait(self._jobs.values(), timeout=grace)
        cancelled = {delivery_id: task for delivery_id, task in self._jobs.items() if not task.done()}
        for task in cancelled.values():
            task.cancel()
        await asyncio.gather(*cancelled.values(), return_exceptions=True)
        await self._recorder.finish()
        await self._release(list(cancelled))
        await asyncio.gather(*self._chores, return_exceptions=True)
        await self.client.close()

    # The loop: claim what is due in lanes.

    async def _run(self) -> None:
        while not self._stopping:
            try:
                self.sweeper.start_if_due()
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

    async def _step(self) -> float:
        """Claim and begin what is due, as far as there are slots; returns how many seconds to wait for more."""
        slots = self.capacity.slots()
        if not slots.free:
            self._backlog = True
            return POLL
        saturated_ids = saturated(slots)
        due = await self.storage.read(claiming.next_due, saturated_ids)
        now = clock.now()
        self._backlog = bool(saturated_ids) or (due is not None and due <= now)
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
        """Begin these jobs as far as there are slots: meanwhile publishers may have taken some."""
        has_slot = self.capacity.take([job.webhook_id for job in jobs])
        for job, fits in zip(jobs, has_slot, strict=True):
            if fits:
                self._begin(job)
        await self._release([job.delivery_id for job, fits in zip(jobs, has_slot, strict=True) if not fits])

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._awake.wait()
        except TimeoutError:
            pass
        self._awake.clear()

    def _report(self, problem: str) -> None:
        """Log that the database cannot be used, and that it can again: once each, not at every look."""
        if problem and problem != self._problem:
            log.error("cannot look for deliveries: %s", problem)
        elif self._problem and not problem:
            log.info("looking for deliveries again")
        self._problem = problem

    # From publishers in this process: begin what their commits have leased to us.

    def wake(self, wake: Wake) -> None:
        """Take slots for what a commit has leased, as far as there are any, and begin it. From any thread."""
        has_slot = self.capacity.take([webhook_id for _, webhook_id in wake.leased])
        kept = [lease for lease, fits in zip(wake.leased, has_slot, strict=True) if fits]
        surplus = [delivery_id for (delivery_id, _), fits in zip(wake.leased, has_slot, strict=True) if not fits]
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
        """Begin what this process has published, from its committed rows; release the surplus, or all if we stop."""
        jobs: list[Job] = []
        try:
            loaded = [] if self._stopping else await self._load(wake)
            jobs = [] if self._stopping else loaded
        finally:
            unused = Counter(webhook_id for _, webhook_id in wake.leased)
            unused.subtract(job.webhook_id for job in jobs)
            self.capacity.give_back(unused.elements())
        for job in jobs:
            self._begin(job)
        stopped = [delivery_id for delivery_id, _ in wake.leased] if self._stopping else []
        await self._release([*surplus, *stopped])

    async def _load(self, wake: Wake) -> list[Job]:
        """The jobs of these leases; tries until the database can be used, or it is too late for an attempt."""
        leases = [(delivery_id, wake.until) for delivery_id, _ in wake.leased]
        while True:
            try:
                return await self.storage.read(claiming.load, leases, wake.since)
            except Unavailable as exc:
                if self._stopping or self._is_too_late(wake.since):
                    log.error("%s deliveries wait for their leases to expire: %s", len(leases), exc)
                    return []
                await asyncio.sleep(PAUSE)

    async def _release(self, delivery_ids: Sequence[int]) -> None:
        try:
            if delivery_ids:
                await self.storage.write(claiming.release, delivery_ids)
        except Unavailable as exc:
            log.error("%s deliveries wait for their leases to expire: %s", len(delivery_ids), exc)

    # Jobs that have a slot.

    def _begin(self, job: Job) -> None:
        if job.delivery_id in self._jobs:  # our own lease of it has expired: the job in flight goes on
            self.capacity.give_back([job.webhook_id])
            return
        self._jobs[job.delivery_id] = self._loop.create_task(self._deliver(job))

    async def _deliver(self, job: Job) -> None:
        if self._is_too_late(job.leased_at):
            self._end(job)  # the sweep finds its lease expired
            return
        try:
            result = await attempts.attempt(self.client, job)
        except Busy:
            self._end(job)
            await self._release([job.delivery_id])
            return
        except BaseException:  # it was cancelled
            self._end(job)
            raise
        self._recorder.add(job, result)

    def _is_too_late(self, leased_at: float) -> bool:
        """Would an attempt that began now outlast a lease from then?"""
        return time_left(leased_at, self.rules.lease) < self.rules.timeout

    def _end(self, job: Job) -> None:
        del self._jobs[job.delivery_id]
        self.capacity.give_back([job.webhook_id])
        if self._backlog or job.is_exclusive:
            self._awake.set()

    def _wake_loop(self) -> None:
        self._awake.set()
