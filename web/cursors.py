"""Cursors: where the next page of a listing begins, as opaque text."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic_core import PydanticCustomError

from hookline.registration import (
    text_problem,
)


def opened(cursor: Any, *kinds: type) -> list[Any]:
    """What a cursor holds: as many values as kinds, each of its kind."""
    try:
        values = json.loads(base64.urlsafe_b64decode(cursor))
    except (ValueError, TypeError, RecursionError):
        values = None
    if (
        not isinstance(values, list)
        or [type(value) for value in values] != list(kinds)
        or any(text_problem(value) if isinstance(value, str) else not 0 <= value < 2**63 for value in values)
    ):
        raise PydanticCustomError("cursor", "Cursor should be a next_cursor of this listing")
    return values


def opened_place(cursor: Any) -> tuple[datetime, str]:
    moment, name = opened(cursor, str, str)
    try:
        return datetime.fromisoformat(moment + "Z"), name
    except ValueError:
        raise PydanticCustomError("cursor", "Cursor should be a next_cursor of this listing") from None


def opened_text(cursor: Any) -> Any:
    return opened(cursor, str)[0]


def opened_number(cursor: Any) -> Any:
    return opened(cursor, int)[0]


def cursor_after(row: Mapping[str, Any], *names: str) -> str:
    """The cursor of the page behind this row, of the fields that the listing is ordered by."""
    place = [row[name] for name in names]
    texts = [one.replace(tzinfo=None).isoformat() if isinstance(one, datetime) else one for one in place]
    return base64.urlsafe_b64encode(json.dumps(texts).encode()).decode()
