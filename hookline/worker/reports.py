"""What the log tells of endpoints: that one fails, works again or was disabled, and which deliveries were given up.

A line names the webhook, never its URL, its secret, a body or an answer's text.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from hookline.tables import stored_time
from hookline.webhooks import log_disabled

if TYPE_CHECKING:
    from hookline.worker.jobs import Settled
    from hookline.worker.settling import Outcomes

log = logging.getLogger("hookline")

REST = 60.0  # seconds between two lines that say whether a webhook fails
MOST = 10_000  # webhooks of which it is known what was said last


class Said(NamedTuple):
    """The last line about a webhook. `at` is of time.monotonic()."""

    fails: bool
    at: float


class Reports:
    """The lines of one worker. What is said of each webhook at most once a minute is its state after that minute."""

    def __init__(self) -> None:
        self._said: OrderedDict[str, Said] = OrderedDict()
        self._unsaid: dict[str, Settled] = {}  # the last result of webhooks that are otherwise than was said last

    def recorded(self, settled: Iterable[Settled], outcomes: Outcomes) -> None:
        """Tell of what has been committed."""
        for one in settled:
            if not one.is_success or one.job.webhook_id in self._said:
                self._notice(one)
        for one in outcomes.failed:
            log.warning("delivery %s to webhook %s has failed for good: %s", one.job.delivery_id, *_failure(one))
        for webhook_id, why in outcomes.disabled.items():
            log_disabled(webhook_id, why)

    def catch_up(self) -> None:
        """Tell what could not be told yet."""
        for one in list(self._unsaid.values()):
            self._notice(one)

    def _notice(self, one: Settled) -> None:
        webhook_id, fails, now = one.job.webhook_id, not one.is_success, time.monotonic()
        said = self._said.get(webhook_id, Said(False, now - REST))
        self._unsaid.pop(webhook_id, None)
        if fails is said.fails:
            if not fails and now - said.at >= REST:
                self._said.pop(webhook_id, None)
            return
        if now - said.at < REST:
            self._unsaid[webhook_id] = one._replace(job=one.job._replace(body=b""))  # which may be large
            return
        self._said[webhook_id] = Said(fails, now)
        self._said.move_to_end(webhook_id)
        if fails:
            log.warning("webhook %s fails: %s", *_failure(one))
        else:
            log.warning("webhook %s works again", webhook_id)
        if len(self._said) > MOST:
            forgotten, _ = self._said.popitem(last=False)
            self._unsaid.pop(forgotten, None)


def _failure(one: Settled) -> tuple[str, str]:
    """The webhook, and how an attempt failed."""
    job, result, settlement = one
    next_at = settlement.next_attempt_at
    then = f"the next one at {stored_time(next_at)[:19]}Z" if next_at else "the last one"
    return job.webhook_id, f"{result.error} (event type {job.event_type}, attempt {job.attempts + 1}, {then})"
