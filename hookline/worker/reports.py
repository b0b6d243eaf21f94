"""Lines in the log about endpoints: one fails, works again or was disabled, and deliveries were given up.

A line names the webhook, never its URL, its secret, a body or an answer's text.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from hookline.tables import stored_time
from hookline.webhooks import log_disabled
from hookline.worker.jobs import Settled
from hookline.worker.settling import Outcomes

log = logging.getLogger("hookline")

REST = 60.0  # seconds between two lines that say whether a webhook fails
MOST = 10_000  # webhooks of which the last line is known


class State(NamedTuple):
    """The state of an endpoint: does it fail, and how. `at` is of time.monotonic()."""

    fails: bool
    at: float
    failure: str = ""


class Reports:
    """The lines of one worker. Each webhook gets one a minute at most, which tells its state after that minute."""

    def __init__(self) -> None:
        self._said: OrderedDict[str, State] = OrderedDict()  # by webhook
        self.unsaid: dict[str, State] = {}  # by webhook, the latest of those whose state is not the one last said

    def recorded(self, batch: Iterable[Settled], outcomes: Outcomes) -> None:
        """Report what has been committed."""
        for settled in batch:
            webhook_id, fails = settled.job.webhook_id, settled.settlement.counts_as_failure
            if fails or webhook_id in self._said:
                failure = failure_of(settled) if fails else ""
                self._report(webhook_id, State(fails, time.monotonic(), failure))
        for settled in outcomes.failed:
            job = settled.job
            log.warning(
                "delivery %s to webhook %s has failed for good: %s",
                job.delivery_id,
                job.webhook_id,
                failure_of(settled),
            )
        for webhook_id, why in outcomes.disabled.items():
            log_disabled(webhook_id, why)

    def catch_up(self) -> None:
        """Report what could not be reported within the minute."""
        for webhook_id, report in list(self.unsaid.items()):
            self._report(webhook_id, report._replace(at=time.monotonic()))

    def _report(self, webhook_id: str, state: State) -> None:
        said = self._said.get(webhook_id, State(False, state.at - REST))
        self.unsaid.pop(webhook_id, None)
        if state.fails is said.fails:
            if not state.fails and state.at - said.at >= REST:
                self._said.pop(webhook_id, None)
            return
        if state.at - said.at < REST:
            self.unsaid[webhook_id] = state
            return
        self._said[webhook_id] = state
        self._said.move_to_end(webhook_id)
        if state.fails:
            log.warning("webhook %s fails: %s", webhook_id, state.failure)
        else:
            log.warning("webhook %s works again", webhook_id)
        if len(self._said) > MOST:
            oldest, _ = self._said.popitem(last=False)
            self.unsaid.pop(oldest, None)


def failure_of(settled: Settled) -> str:
    """A sentence about a failed attempt."""
    job, result, settlement = settled
    next_at = settlement.next_attempt_at
    then = f"the next one at {stored_time(next_at)[:19]}Z" if next_at else "the last one"
    return f"{result.error} (event type {job.event_type}, attempt {job.attempts + 1}, {then})"
