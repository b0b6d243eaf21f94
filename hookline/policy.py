"""Decide what follows from an attempt: pure functions of what the endpoint did, the schedule and the time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Any, NamedTuple

JITTER = 0.1  # of a step of the schedule, either way
LANE_BACKOFF = 5.0  # seconds after the first failure of an endpoint, doubled for each more in a row
MAX_LANE_BACKOFF = 300.0  # seconds
MAX_REST = 24 * 3600.0  # seconds
MAX_RETRY_AFTER = 24 * 3600.0  # seconds that an endpoint may ask us to wait
MAX_STEP = 365 * 24 * 3600.0  # seconds of a step of the schedule


@dataclass(frozen=True)
class Rules:
    """The operator's choices. Times are in seconds."""

    retry_schedule: tuple[float, ...]  # the wait before each retry
    disable_after: float  # of failures alone
    lease: float
    timeout: float  # of a request
    concurrency: int  # requests in flight
    retention: float | None  # of what has ended; None: for ever
    max_payload: int  # bytes of an event

    @property
    def per_webhook(self) -> int:
        """Requests that one webhook may have in flight."""
        return max(self.concurrency // 2, 1)


DEFAULT = Rules(  # for programs that use the library; the service takes its own from settings.py, which has the same
    retry_schedule=(5, 30, 120, 600, 1800, 7200, 18000, 36000, 50400, 72000, 86400),
    disable_after=5 * 86400,
    lease=60,
    timeout=15,
    concurrency=256,
    retention=30 * 86400,
    max_payload=256 * 1024,
)


class Result(NamedTuple):
    """The result of one attempt: an answer with a `status_code`, or an `error` without one."""

    started_at: datetime
    duration_ms: int
    status_code: int | None = None
    error: str | None = None
    response: str | None = None
    retry_after: float | None = None  # seconds


class Outcome(Enum):
    SUCCEEDED = "succeeded"
    FAILED = "failed"  # may be tried again
    GONE = "gone"  # the endpoint says that it is no more


class Settlement(NamedTuple):
    """The whole decision after an attempt: whoever has it asks for no outcome."""

    status: str  # of the delivery: succeeded, pending or failed
    next_attempt_at: datetime | None
    lane_opens_at: datetime | None  # None: at once
    is_asked: bool  # by the endpoint, that the lane opens no earlier
    counts_as_failure: bool  # of the endpoint
    disables: bool  # the webhook, at once


SUCCEEDED = Settlement("succeeded", None, None, is_asked=False, counts_as_failure=False, disables=False)


def outcome_of(result: Result) -> Outcome:
    """2xx succeeds, 410 is gone, and all else, redirects included, is a failure."""
    if result.status_code is not None and 200 <= result.status_code < 300 and result.error is None:
        return Outcome.SUCCEEDED
    return Outcome.GONE if result.status_code == 410 else Outcome.FAILED


def settle(
    result: Result,
    *,
    attempts: int,
    failures: int,
    schedule: Sequence[float],
    now: datetime,
    spread: float | None = None,
) -> Settlement:
    """Decide after attempt number `attempts` of a delivery (from 1), which has `len(schedule)` retries.

    `failures`: how many attempts in a row the endpoint had failed before. `spread` in -1..1 sets the jitter, else it
    is random.
    """
    outcome = outcome_of(result)
    if outcome is Outcome.SUCCEEDED:
        return SUCCEEDED
    asked = min(result.retry_after, MAX_RETRY_AFTER) if result.retry_after else 0.0
    lane_opens_at = now + timedelta(seconds=max(asked, lane_backoff(failures + 1)))
    status, next_attempt_at = "failed", None
    if outcome is Outcome.FAILED and attempts <= len(schedule):
        jitter = random.uniform(-1, 1) if spread is None else spread
        wait = max(min(schedule[attempts - 1], MAX_STEP) * (1 + JITTER * jitter), asked)
        status, next_attempt_at = "pending", now + timedelta(seconds=wait)
        if not asked:
            lane_opens_at = min(lane_opens_at, next_attempt_at)
    return Settlement(
        status,
        next_attempt_at,
        lane_opens_at,
        is_asked=bool(asked),
        counts_as_failure=True,
        disables=outcome is Outcome.GONE,
    )


def is_schedule(steps: Sequence[object]) -> bool:
    """Tell whether these can be the seconds before each retry."""
    return all(isinstance(step, int | float) and 0 <= step <= MAX_STEP for step in steps)


def lane_backoff(failures: int) -> float:
    """Seconds that a lane rests after this many failures in a row."""
    return min(LANE_BACKOFF * 2.0 ** min(failures - 1, 16), MAX_LANE_BACKOFF)


def lane_rest(sent: int, rate_limit: float) -> timedelta:
    """The rest of a rate-limited lane after so many deliveries: a day at most."""
    return timedelta(seconds=min(sent / rate_limit, MAX_REST))


def rest_after(rest: float, failures: int, before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Seconds that a lane, which would rest for `rest` more, still rests after a change of its webhook's settings.

    The settings are `rate_limit`, `ordered` and `retry_schedule`. A rest that the change does not concern goes on.
    """
    if before["ordered"] and not after["ordered"]:
        return 0.0
    old, new = before["rate_limit"], after["rate_limit"]
    if old is not None and (new is None or new > old):
        if not failures:
            rest = rest * old / new if new else 0.0
        elif rest <= 1 / old:  # else it is not the rate limit's
            rest = min(rest, lane_backoff(failures))
    schedule = after["retry_schedule"]
    if after["ordered"] and schedule and schedule != before["retry_schedule"]:
        rest = min(rest, max(schedule) * (1 + JITTER))
    return rest


def lane_budget(failures: int, ordered: bool, rate_limit: float | None, free: int) -> int:
    """The deliveries that a lane may send at once: half of the free slots; 1 while it fails or keeps order."""
    if failures or ordered:
        return 1
    share = max(free // 2, 1)
    return min(share, burst(rate_limit)) if rate_limit else share


def burst(rate_limit: float) -> int:
    """The number of deliveries that a rate-limited lane sends before it rests: a tenth of a second's worth."""
    return max(1, round(rate_limit / 10))
