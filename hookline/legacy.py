"""A webhook as the replaced service showed it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hookline import clock

MASK = "***"


def legacy(webhook: Mapping[str, Any]) -> dict[str, Any]:
    """A webhook in the order and form of the replaced service."""
    return {
        "url": webhook["url"],
        "events": webhook["events"],
        "secret": MASK,
        "team": webhook["team"],
        "created_at": clock.legacy_time(webhook["created_at"]),
        "total_calls": webhook["total_calls"],
        "failed_calls": webhook["failed_calls"],
        "last_success": clock.legacy_time(webhook["last_success"]),
        "last_failure": clock.legacy_time(webhook["last_failure"]),
        "enabled": webhook["enabled"],
        "id": webhook["webhook_id"],
    }
