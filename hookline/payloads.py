"""Payloads: the JSON text of an event, as it is signed and sent, and what JSON is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hookline.errors import Invalid, TooLarge

MAX_DEPTH = 64  # levels of arrays and objects inside each other, in any JSON that we take
TOO_DEEP = f"nested deeper than {MAX_DEPTH}"


def payload_of(event_type: str, data: Any, timestamp: str | None, limit: int) -> str:
    """The data, then `event_type` and `timestamp`, as compact ASCII JSON of at most `limit` bytes.

    Raises Invalid, TooLarge.
    """
    if not isinstance(data, Mapping) or not all(isinstance(name, str) for name in data):
        raise Invalid("data must be an object")
    body = {**data, "event_type": event_type, "timestamp": timestamp}
    try:
        payload = json.dumps(body, separators=(",", ":"), allow_nan=False)
    except RecursionError as exc:
        raise Invalid(f"data is {TOO_DEEP}") from exc
    except (TypeError, ValueError) as exc:
        raise Invalid(f"data is not JSON: {exc}") from exc
    if len(payload) > limit:
        raise TooLarge(f"the payload has {len(payload)} bytes, more than MAX_PAYLOAD, {limit}")
    if payload.count("{") + payload.count("[") > MAX_DEPTH and is_too_deep(body):
        raise Invalid(f"data is {TOO_DEEP}")
    if "\\ud" in payload and has_lone_surrogate(body):
        raise Invalid("data must not contain lone surrogates")
    return payload


def is_too_deep(value: Any) -> bool:
    """Are there more than MAX_DEPTH arrays and objects inside each other?"""
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        children = [child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent)]
        level = [child for child in children if isinstance(child, dict | list | tuple)]
        if not level:
            return False
    return True


def has_lone_surrogate(value: Any) -> bool:
    """Is there text in this JSON that is not Unicode, so that no answer could show it?"""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def is_same_json(first: str, second: str) -> bool:
    """Do these texts hold the same, whatever the order of their keys? 1, 1.0 and true are three values."""
    if first == second:
        return True
    texts = [json.dumps(json.loads(text), sort_keys=True) for text in (first, second)]
    return texts[0] == texts[1]
