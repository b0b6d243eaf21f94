"""How many requests one process may have in flight, in all and to one webhook. Thread-safe: whoever publishes asks.

A lease that is committed takes a slot, or is given back at once where none is left. Until its commit it counts within
its own transaction alone (`events.Uncommitted`): one that is rolled back, or stays open for long, holds no slot.
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
        self._held: Counter[str] = Counter()
        self._in_all = 0  # the sum of these
        self._blocked: dict[str, int] = {}
        self._closed = False
        self._lock = threading.Lock()

    def take(self, webhook_ids: Sequence[str]) -> list[bool]:
        """Take a slot for each of these, as far as there are any; which of them have got one."""
        with self._lock:
            return [self._take(webhook_id) for webhook_id in webhook_ids]

    def _take(self, webhook_id: str) -> bool:
        if self._in_all >= self._limit or self._held[webhook_id] >= self.per_webhook or webhook_id in self._blocked:
            return False
        self._in_all += 1
        self._held[webhook_id] += 1
        return True

    def give_back(self, webhook_ids: Iterable[str]) -> None:
        with self._lock:
            for webhook_id in webhook_ids:
                self._in_all -= 1
                self._held[webhook_id] -= 1
                if not self._held[webhook_id]:
                    del self._held[webhook_id]

    def block(self, webhook_id: str, waiting: int) -> None:
        """A lock keeps so many results of this webhook from being recorded: they hold no slot, and it gets no more."""
        with self._lock:
            self._blocked[webhook_id] = waiting
            if not waiting:
                del self._blocked[webhook_id]

    def close(self) -> None:
        """From now on no slot is free."""
        self._closed = True

    @property
    def _limit(self) -> int:
        return 0 if self._closed else self.total + min(sum(self._blocked.values()), self.total)

    @property
    def free(self) -> int:
        with self._lock:
            return max(self._limit - self._in_all, 0)

    def slots(self) -> Slots:
        """What is left, for who leases."""
        with self._lock:
            held = {**self._held, **dict.fromkeys(self._blocked, self.per_webhook)}
            return Slots(max(self._limit - self._in_all, 0), self.per_webhook, held)


def saturated(slots: Slots) -> list[str]:
    """The webhooks that get no more for now."""
    return [webhook_id for webhook_id, in_flight in slots.in_flight.items() if in_flight >= slots.per_webhook]
