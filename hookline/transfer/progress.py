"""Progress of long work, reported to a caller that shows it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what is done, rows done, rows in all


def silent(what: str, done: int, total: int) -> None:
    """Show nothing."""
