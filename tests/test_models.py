"""Models: stored times."""

from __future__ import annotations

from datetime import datetime

from models import stored_time


def test_stored_times_sort_as_text() -> None:
    moments = [datetime.fromisoformat(f"2026-11-23T14:30:0{n}+00:00") for n in range(3)]
    assert sorted(map(stored_time, moments)) == [stored_time(moment) for moment in moments]
