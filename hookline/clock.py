"""The clock: the one place that asks for the time, so that tests can set it."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> datetime:
    """The present moment, in UTC."""
    return datetime.now(UTC)


def legacy_time(moment: datetime | None) -> str | None:
    """The time as `datetime.utcnow().isoformat()` of the replaced service: no zone, no fraction when it is zero."""
    return moment.replace(tzinfo=None).isoformat() if moment else None
