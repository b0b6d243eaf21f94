"""Bounds on the requests that one process has in flight, in all and to one webhook. Thread-safe: publishers ask.

A lease takes a slot when it is committed, or is given back at once if none is left. Until its commit it counts within
its own transaction alone (see events.py): one that is rolled back, or stays open for long, holds no slot.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence

from hookline.lanes import Slots


class Capacity:
    """`total` slots, of which one webhook may have `per_webhook`."""

    def __init__(self, total: int, per_webhook: int) -> None:
        self.total, self.per_webhook = total, per_webhook
        self._in_flight: Counter[str] = Counter()  # by webhook
        self._in_all = 0  # the sum of these
        self._blocked: dict[str, int] = {}
        self._closed = False
        self._lock = threading.Lock()

    def take(self, webhook_ids: Sequence[str]) -> list[bool]:
        """Take a slot for each of these webhooks as far as there are any; returns which of them have got one."""
        with self._lock:
            return [self._take(webhook_id) for webhook_id in webhook_ids]

    def _take(self, webhook_id: str) -> bool:
        is_saturated = self._in_flight[webhook_id] >= self.per_webhook or webhook_id in self._blocked
        if self._in_all >= self._limit or is_saturated:
            return False
        self._in_all += 1
        self._in_flight[webhook_id] += 1
        return True

    def give_back(self, webhook_ids: Iterable[str]) -> None:
        """Free a slot of each of these webhooks."""
        with self._lock:
            for webhook_id in webhook_ids:
                self._in_all -= 1
                self._in_flight[webhook_id] -= 1
                if not self._in_flight[webhook_id]:
                    del self._in_flight[webhook_id]

    def block(self, webhook_id: str, results: int) -> None:
        """Give this webhook no slot while a lock keeps `results` of it from being recorded; these hold none. 0 ends it.

        Blocked results may double `total` at most.
        """
        with self._lock:
            self._blocked[webhook_id] = results
            if not results:
                del self._blocked[webhook_id]

    def close(self) -> None:
        """Have no free slot from now on."""
        self._closed = True

    @property
    def _limit(self) -> int:
        return 0 if self._closed else self.total + min(sum(self._blocked.values()), self.total)

    @property
    def free(self) -> int:
        with self._lock:
            return max(self._limit - self._in_all, 0)

    def slots(self) -> Slots:
        """The free slots, and those of each webhook; one that is blocked counts as saturated."""
        with self._lock:
            in_flight = {**self._in_flight, **dict.fromkeys(self._blocked, self.per_webhook)}
            return Slots(max(self._limit - self._in_all, 0), self.per_webhook, in_flight)


def saturated(slots: Slots) -> list[str]:
    """The webhooks that get no more slots for now."""
    return [webhook_id for webhook_id, in_flight in slots.in_flight.items() if in_flight >= slots.per_webhook]
