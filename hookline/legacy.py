"""Webhooks as the replaced service showed them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peewee import Database

from hookline import clock, webhooks
from hookline.registration import MASK


def shown(webhook: Mapping[str, Any]) -> dict[str, Any]:
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


def everything(db: Database) -> list[dict[str, Any]]:
    """Every webhook in that form, oldest first. Raises Unavailable."""
    return [shown(webhook) for webhook in webhooks.everything(db)]
