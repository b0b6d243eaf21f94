"""Bounds on requests in flight: nothing passes them, however it is published, and nothing undone holds any."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import Any

import pytest
from peewee import Database

from hookline import WebhookManager, deliveries, events, lanes
from hookline.events import NewEvent
from hookline.lanes import Slots
from hookline.store.open import open_database
from hookline.worker.capacity import Capacity, saturated
from hookline.worker.worker import Worker
from tests.conftest import SECRET
from tests.databases import Place
from tests.outlets import outlet
from tests.receiver import OK, Answer, Received, Receiver
from tests.working import rules, until, working

RULES = rules(concurrency=8, lease=60, timeout=30)


class Gate:
    """An endpoint that answers once it is opened, and counts how many requests it has at the same time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_open = False
        self._now: Counter[str] = Counter()
        self.most = 0
        self.most_of: Counter[str] = Counter()  # of each path

    def __call__(self, request: Received) -> Answer:
        with self._changed:
            self._now[request.path] += 1
            self.most = max(self.most, self._now.total())
            self.most_of[request.path] = max(self.most_of[request.path], self._now[request.path])
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_open, 30)
            self._now[request.path] -= 1
        return OK

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._now.total() >= count, 20), f"{self._now.total()} of {count}"

    def open(self) -> None:
        with self._changed:
            self._is_open = True
            self._changed.notify_all()


@pytest.fixture
def gate(receiver: Receiver) -> Gate:
    gate = Gate()
    receiver.answers |= {f"/{number}": gate for number in range(4)}
    return gate


@pytest.fixture
def webhooks(manager: WebhookManager, receiver: Receiver) -> list[str]:
    """Four that want everything."""
    return [manager.register(f"{receiver.url}/{number}", ["goal"], SECRET) for number in range(4)]


async def all_done(worker: Worker, gate: Gate, receiver: Receiver, count: int) -> None:
    """Let so many deliveries through, none of them twice, until all slots are free."""
    gate.open()
    await asyncio.to_thread(receiver.wait_for, count)
    await until(lambda: worker.capacity.free == RULES.concurrency)
    assert deliveries.page(worker.db, status="pending", limit=1) == []
    sent = [(request.path, request.event_id) for request in receiver.received]
    assert len(sent) == len(set(sent)) == count


async def test_after_a_write_that_fails_no_more_are_in_flight_than_allowed(
    db: Database, webhooks: list[str], gate: Gate, receiver: Receiver
) -> None:
    def fail(db: Database) -> None:
        raise ZeroDivisionError

    async with working(db, RULES) as worker:
        writes: list[Any] = [
            worker.storage.write(events.publish_one, NewEvent("goal", {"n": number})) for number in range(40)
        ]
        answers = await asyncio.gather(*writes[:20], worker.storage.write(fail), *writes[20:], return_exceptions=True)
        assert [type(answer) for answer in answers if isinstance(answer, Exception)] == [ZeroDivisionError]
        await asyncio.to_thread(gate.wait_for, RULES.concurrency)
        await all_done(worker, gate, receiver, 160)
    assert gate.most == RULES.concurrency


async def test_many_events_in_one_transaction_keep_within_the_slots(
    db: Database, manager: WebhookManager, webhooks: list[str], gate: Gate, receiver: Receiver
) -> None:
    def application() -> None:
        with db.connection_context(), db.atomic():
            for number in range(100):
                manager.send_event("goal", {"n": number})

    async with working(db, RULES) as worker:
        await asyncio.to_thread(application)
        await asyncio.to_thread(gate.wait_for, RULES.concurrency)
        await all_done(worker, gate, receiver, 400)
    assert gate.most == RULES.concurrency
    assert max(gate.most_of.values()) <= RULES.per_webhook


@pytest.mark.parametrize("savepoint", [False, True])
async def test_what_is_rolled_back_holds_no_slot(
    db: Database, manager: WebhookManager, webhooks: list[str], gate: Gate, receiver: Receiver, savepoint: bool
) -> None:
    def application() -> None:
        with db.connection_context(), db.atomic() as transaction:
            with db.atomic() as part:
                for number in range(50):
                    manager.send_event("goal", {"n": number})
                if savepoint:
                    part.rollback()
            if not savepoint:
                transaction.rollback()

    async with working(db, RULES) as worker:
        await asyncio.to_thread(application)
        for _ in range(2):
            await asyncio.to_thread(manager.send_event, "goal", {"kept": True})
        await asyncio.to_thread(gate.wait_for, RULES.concurrency)  # all at once
        await all_done(worker, gate, receiver, 8)


async def test_a_transaction_that_stays_open_keeps_no_slot_from_others(
    place: Place, db: Database, manager: WebhookManager, webhooks: list[str], gate: Gate, receiver: Receiver
) -> None:
    """On SQLite there is one writer: there it is what was waiting that goes on."""
    published, finish = threading.Event(), threading.Event()

    def application() -> None:
        with db.connection_context(), db.atomic():
            for number in range(50):
                manager.send_event("goal", {"n": number})
            published.set()
            assert finish.wait(30)

    async with working(db, RULES) as worker:
        transaction = asyncio.ensure_future(asyncio.to_thread(application))
        await asyncio.to_thread(published.wait, 30)
        assert worker.capacity.free == RULES.concurrency
        if db.for_update:
            other = open_database(place.url)
            await asyncio.to_thread(WebhookManager(db=other).send_event, "goal", {})
            await asyncio.to_thread(gate.wait_for, 4)
            other.close_all()  # type: ignore[attr-defined]
        finish.set()
        await transaction
        await asyncio.to_thread(gate.wait_for, RULES.concurrency)
        await all_done(worker, gate, receiver, 204 if db.for_update else 200)
    assert gate.most == RULES.concurrency


async def test_one_webhook_never_has_more_than_its_share(
    db: Database, manager: WebhookManager, receiver: Receiver, gate: Gate
) -> None:
    """In flight, coming and claimed together, whoever publishes meanwhile, and how."""
    manager.register(f"{receiver.url}/0", ["goal"], SECRET)
    events.publish_all(db, [NewEvent("goal", {"n": number}) for number in range(20)])  # in its lane: to be claimed

    def application(number: int) -> None:
        for _ in range(5):
            manager.send_event("goal", {"of": number})
            events.publish_all(db, [NewEvent("goal", {"of": number})] * 3)

    async with working(db, RULES) as worker:
        threads = [asyncio.to_thread(application, number) for number in range(3)]
        written = [
            worker.storage.write_together(events.publish_all, NewEvent("goal", {"n": number})) for number in range(20)
        ]
        await asyncio.gather(*threads, *written)
        await asyncio.to_thread(gate.wait_for, RULES.per_webhook)
        await all_done(worker, gate, receiver, 100)
    assert gate.most == RULES.per_webhook


def test_an_event_takes_of_each_webhook_what_is_left_of_its_share(db: Database, manager: WebhookManager) -> None:
    ids = [manager.register("http://example.com/", ["goal"], SECRET) for _ in range(3)]
    woken: list[lanes.Leased] = []
    in_flight = {ids[0]: 3, ids[1]: 5}
    lanes.attach(db, outlet(Slots(100, 4, in_flight), wake=lambda wake: woken.extend(wake.leased)))
    events.publish_all(db, [NewEvent("goal", {})] * 6)
    assert Counter(webhook_id for _, webhook_id in woken) == {ids[0]: 1, ids[2]: 4}


def test_a_transaction_counts_what_it_has_leased_itself(db: Database, manager: WebhookManager) -> None:
    manager.register("http://example.com/", ["goal"], SECRET)
    woken: list[lanes.Leased] = []
    lanes.attach(db, outlet(Slots(3, 3), wake=lambda wake: woken.extend(wake.leased)))
    with db.connection_context(), db.atomic() as transaction:
        for _ in range(5):
            manager.send_event("goal", {})
        transaction.commit()
        assert len(woken) == 3
        with db.connection_context():
            db.execute_sql("DELETE FROM lanes")  # or what is new would wait behind what is due
        manager.send_event("goal", {})
    assert len(woken) == 4


def test_slots_are_taken_and_given_back() -> None:
    capacity = Capacity(4, 2)
    assert capacity.take(["a", "a", "a", "b", "c", "d"]) == [True, True, False, True, True, False]
    slots = capacity.slots()
    assert (slots, saturated(slots)) == (Slots(0, 2, {"a": 2, "b": 1, "c": 1}), ["a"])
    capacity.give_back(["a", "b"])
    slots = capacity.slots()
    assert (slots, saturated(slots)) == (Slots(2, 2, {"a": 1, "c": 1}), [])


def test_a_blocked_webhook_gets_no_slots_and_its_results_hold_none() -> None:
    capacity = Capacity(4, 2)
    capacity.take(["a", "a", "b", "b"])
    capacity.block("a", 2)
    assert (capacity.free, saturated(capacity.slots())) == (2, ["a", "b"])
    assert capacity.take(["a", "c", "c"]) == [False, True, True]
    capacity.block("a", 0)
    capacity.give_back(["a", "a"])
    assert (capacity.free, saturated(capacity.slots())) == (0, ["b", "c"])


def test_a_capacity_that_is_closed_has_no_slot() -> None:
    capacity = Capacity(4, 2)
    capacity.close()
    assert (capacity.free, capacity.take(["a"])) == (0, [False])
