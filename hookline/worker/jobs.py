"""Jobs: deliveries that this process has leased, with all that sending them takes, and what came of them."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Any, NamedTuple

from hookline import policy, rotation
from hookline.policy import Result, Settlement

RESERVE = 1.0  # seconds of a lease that are left for recording


class LaneClaim(NamedTuple):
    """The state of a lane at the claim of a job."""

    failures: int = 0  # in a row
    closed_until: str | None = None  # for this job alone
    opens_at: str | None = None  # by its rate limit


PUBLISHED = LaneClaim()  # of jobs that were leased when they were published, without a lane


class Job(NamedTuple):
    """A delivery that this process has leased. Its fields up to `ordered` are the columns that `claiming` selects."""

    webhook_id: str
    event_id: str
    delivery_id: int
    attempts: int
    attempts_before: int
    url: str
    secret: str
    previous_secret: str | None
    previous_secret_expires_at: Any
    earlier_secrets: str | None
    headers: str | None
    retry_schedule: str | None
    rate_limit: float | None
    ordered: bool
    event_type: str
    body: bytes
    event_time: str  # the `timestamp` in the body
    leased_at: float  # of time.monotonic()
    lane: LaneClaim = PUBLISHED

    @property
    def is_exclusive(self) -> bool:
        """Is the lane closed until this job is settled?"""
        return self.lane.closed_until is not None

    def secrets(self, now: datetime) -> list[str]:
        """The secrets that sign, newest first."""
        old = rotation.OldSecrets(self.previous_secret, self.previous_secret_expires_at, self.earlier_secrets)
        kept = old.kept(now)
        return [self.secret, *(secret for secret, _ in reversed(kept))]

    def own_headers(self) -> dict[str, str]:
        return dict(json.loads(self.headers)) if self.headers else {}

    def own_schedule(self) -> tuple[float, ...]:
        """The webhook's retry schedule, empty if it has none. Raises ValueError if it cannot be used."""
        steps = json.loads(self.retry_schedule) if self.retry_schedule else []
        if not isinstance(steps, list) or not policy.is_schedule(steps):
            raise ValueError("not a list of seconds")
        return tuple(steps)


class Settled(NamedTuple):
    """A job after its attempt: the result, and the decision that follows from it."""

    job: Job
    result: Result
    settlement: Settlement


def time_left(leased_at: float, lease: float) -> float:
    """Seconds that may pass until a lease from then (of time.monotonic()) must be recorded."""
    return leased_at + lease - RESERVE - time.monotonic()
