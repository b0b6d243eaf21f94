"""Cursors: the position where the next page of a listing begins, as opaque text."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic_core import PydanticCustomError

from hookline.registration import text_problem


def cursor_after(row: Mapping[str, Any], *order: str) -> str:
    """Return the cursor of the page that begins behind a row. `order`: the fields that the listing is sorted by."""
    position = [row[name] for name in order]
    texts = [
        value.replace(tzinfo=None).isoformat() if isinstance(value, datetime) else value  # times are all in UTC
        for value in position
    ]
    return base64.urlsafe_b64encode(json.dumps(texts).encode()).decode()


def time_and_id_in(cursor: Any) -> tuple[datetime, str]:
    moment, row_id = values_in(cursor, str, str)
    try:
        return datetime.fromisoformat(moment + "Z"), row_id
    except ValueError:
        raise not_a_cursor() from None


def text_in(cursor: Any) -> Any:
    return values_in(cursor, str)[0]


def number_in(cursor: Any) -> Any:
    return values_in(cursor, int)[0]


def values_in(cursor: Any, *types: type) -> list[Any]:
    """Return the values that a cursor holds, one of each type. Raises PydanticCustomError, for use in a validator."""
    try:
        values = json.loads(base64.urlsafe_b64decode(cursor))
    except (ValueError, TypeError, RecursionError):
        raise not_a_cursor() from None
    if not isinstance(values, list) or [type(value) for value in values] != list(types):
        raise not_a_cursor()
    for value in values:
        if text_problem(value) if isinstance(value, str) else not 0 <= value < 2**63:
            raise not_a_cursor()
    return values


def not_a_cursor() -> PydanticCustomError:
    return PydanticCustomError("cursor", "Cursor should be a next_cursor of this listing")
