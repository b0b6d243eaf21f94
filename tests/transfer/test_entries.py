"""Entries of the JSON file: a time is stored canonically, or refused by id and field."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peewee import Database

from hookline import WebhookManager
from hookline.errors import Invalid
from hookline.transfer.entries import time_of
from hookline.transfer.json_file import import_file
from models import read_time, stored_time

DATES = ["2025-01-01", "20250101", "2025-W01-1", "2025W011", "2025-W01", "0900-01-01", "2025-02-30", "0000-01-01", ""]
SEPARATORS = ["T", "t", " ", "_", "\u2028", ""]
CLOCKS = [
    "00:00:00.123456",
    "00:00:00,123456",
    "000000.123456",
    "000000.12345678",
    "00:00:00.1234567",
    "00:00:00.123",
    "00:00:00",
    "00:00",
    "24:00:00.000000",
    "23:59:60.000000",
    "\u0660\u0660:00:00.123456",
    "",
]
ZONES = ["", "Z", "z", "+00:00", "-05:30", "+0100", "+23:59:59.999999", "+24:00"]
SPELLINGS = ["".join(parts) for parts in product(DATES, SEPARATORS, CLOCKS, ZONES)]


def parsed(text: str) -> str | None:
    """The time as the standard library reads it, in the form that is stored; None if it is no time."""
    try:
        moment = datetime.fromisoformat(text)
        return stored_time(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    except (ValueError, OverflowError):
        return None


def stored(value: Any) -> str | None:
    """The time as an import stores it; None if it is refused."""
    try:
        return time_of(value)
    except Invalid as exc:
        assert str(exc) == "not an ISO 8601 time"
        return None


def test_every_spelling_of_a_time_is_stored_canonically_or_refused() -> None:
    count = 0
    for text in SPELLINGS:
        time = stored(text)
        assert time == parsed(text), text
        if time is not None:
            count += 1
            moment = read_time(time)
            assert moment is not None
            assert stored_time(moment) == time
    assert count > 500


@given(st.datetimes(), st.none() | st.integers(-1439, 1439))
def test_every_moment_is_stored_canonically(moment: datetime, minutes: int | None) -> None:
    zone = None if minutes is None else timezone(timedelta(minutes=minutes))
    text = moment.replace(tzinfo=zone).isoformat()
    assert stored(text) == parsed(text)


@given(st.text(max_size=40) | st.integers() | st.floats() | st.binary() | st.booleans())
def test_any_other_value_is_no_time(value: Any) -> None:
    time = stored(value)
    assert time is None or time == parsed(value)


def test_pages_lose_no_webhook_whose_time_was_spelt_another_way(
    db: Database, manager: WebhookManager, tmp_path: Path
) -> None:
    spellings = [
        "2025-W01-1T00:00:00.123456",
        "2025-01-01T00:00:00,123456",
        "2025-01-01T000000.12345678",
        "2025-01-01T00:00:00.123456",
        "2025-01-02T00:00:00+05:30",
        "20250103T0000",
        "0900-01-01T00:00:00.000001",
    ]
    entry = {"url": "https://example.com/", "events": ["a"], "secret": "s" * 16}
    document = {f"id-{n}": entry | {"created_at": text, "last_failure": text} for n, text in enumerate(spellings)}
    file = tmp_path / "webhooks.json"
    file.write_text(json.dumps(document))
    import_file(db, file)
    seen: list[str] = []
    after = None
    while page := manager.list(limit=1, after=after):
        seen.append(page[0]["webhook_id"])
        after = (page[0]["created_at"], page[0]["webhook_id"])
        assert stored_time(page[0]["last_failure"]) == stored_time(page[0]["created_at"])
    assert sorted(seen) == sorted(document)
    file.write_text(json.dumps({"x": entry | {"created_at": "0001-01-01T00:00:00+05:00"}}))
    with pytest.raises(Invalid) as caught:
        import_file(db, file)
    assert caught.value.problems == ["x: created_at: not an ISO 8601 time"]
