"""A delivery that this process has leased, and what came of it."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NamedTuple

from hookline import policy, rotation
from hookline.policy import Outcome, Result, Settlement


class Job(NamedTuple):
    """A delivery that this process has leased, with all that sending it takes."""

    delivery_id: int
    webhook_id: str
    event_id: str
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
    failures: int = 0  # of its lane, in a row
    closed_until: str | None = None  # the lane, for this delivery alone
    opens_at: str | None = None  # the lane, by its rate limit

    @property
    def exclusive(self) -> bool:
        """Is the lane closed until it is settled?"""
        return self.closed_until is not None

    def secrets(self, now: datetime) -> list[str]:
        """Those that sign, newest first."""
        kept = rotation.OldSecrets(self.previous_secret, self.previous_secret_expires_at, self.earlier_secrets).kept(
            now
        )
        return [self.secret, *(secret for secret, _ in reversed(kept))]

    def own_headers(self) -> dict[str, str]:
        return dict(json.loads(self.headers)) if self.headers else {}

    def own_schedule(self) -> tuple[float, ...]:
        """Raises ValueError if it cannot be used."""
        steps = json.loads(self.retry_schedule) if self.retry_schedule else []
        if not isinstance(steps, list) or not policy.is_schedule(steps):
            raise ValueError("not a list of seconds")
        return tuple(steps)


class Settled(NamedTuple):
    job: Job
    result: Result
    settlement: Settlement

    @property
    def is_success(self) -> bool:
        return self.settlement.outcome is Outcome.SUCCEEDED
