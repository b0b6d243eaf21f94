"""The entries of the replaced service's JSON file, checked and turned into rows.

The file is an object of webhook id → entry, or, in its older form, a list of entries with `id`, `event_types`,
`active`, `success_count` and `failure_count`. Reading never guesses: an entry of another shape is listed as a problem.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

from hookline import clock
from hookline.errors import Invalid
from hookline.registration import MAX_NAME, text_problem, url_shape_problem
from hookline.tables import stored_time
from hookline.transfer.imports import BATCH, WebhookRow
from hookline.transfer.progress import Progress

REQUIRED = ("url", "events", "secret")
OLD_NAMES = {
    "event_types": "events",
    "active": "enabled",
    "success_count": "total_calls",
    "failure_count": "failed_calls",
}
AS_STORED = re.compile(  # but for the Z: so the replaced service wrote it
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T(?:[01][0-9]|2[0-3]):[0-9]{2}:[0-9]{2}\.[0-9]{6}"
)
MAX_COUNT = 2**63 - 1


class Entries(NamedTuple):
    """The rows of the valid entries, and the problems of the `invalid` others, each with the entry's id."""

    rows: list[WebhookRow]
    problems: list[str]
    invalid: int


class Duplicated(dict[str, Any]):
    """A JSON object in which some keys came twice."""

    keys_twice: frozenset[str] = frozenset()


def read(content: bytes, progress: Progress) -> Entries:
    """Check every entry of a file. Raises Invalid if the whole is not JSON of one of the two forms."""
    entries = list(entries_of(decode(content)))
    now = stored_time(clock.now())
    rows: list[WebhookRow] = []
    listed: list[str] = []
    for index, (webhook_id, entry, problems) in enumerate(entries):
        row = {} if problems else row_of(entry, problems)
        if problems:
            listed += [f"{webhook_id}: {problem}" for problem in problems]
        else:
            row["webhook_id"], row["imported_at"] = webhook_id, now
            rows.append(row)
        if index % BATCH == 0:
            progress("checked", index, len(entries))
    progress("checked", len(entries), len(entries))
    return Entries(rows, listed, invalid=len(entries) - len(rows))


def decode(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=as_dict, parse_constant=refuse_constant)
    except UnicodeDecodeError as exc:
        raise Invalid(f"not UTF-8 at byte {exc.start}; nothing was imported") from exc
    except json.JSONDecodeError as exc:
        reason = f"not JSON at line {exc.lineno}, column {exc.colno}: {exc.msg}; nothing was imported"
        raise Invalid(reason) from exc
    except (ValueError, RecursionError) as exc:
        raise Invalid(f"not JSON that can be read: {exc}; nothing was imported") from exc


def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    times = Counter(name for name, _ in pairs)
    return duplicated(values, frozenset(name for name in times if times[name] > 1))


def duplicated(values: dict[str, Any], keys_twice: frozenset[str]) -> Duplicated:
    entry = Duplicated(values)
    entry.keys_twice = keys_twice
    return entry


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def entries_of(document: Any) -> Iterator[tuple[str, Any, list[str]]]:
    """Each entry with its id (or its position in a list) and the problems known so far."""
    if isinstance(document, dict):
        repeated = document.keys_twice if isinstance(document, Duplicated) else ()
        for webhook_id, entry in document.items():
            yield webhook_id, entry, id_problems(webhook_id, webhook_id in repeated)
    elif isinstance(document, list):
        yield from entries_of_list(document)
    else:
        raise Invalid("not an object of webhooks by id, nor a list of webhooks; nothing was imported")


def entries_of_list(document: list[Any]) -> Iterator[tuple[str, Any, list[str]]]:
    ids = [entry.get("id") if isinstance(entry, dict) else None for entry in document]
    times = Counter(webhook_id for webhook_id in ids if isinstance(webhook_id, str))
    for index, (webhook_id, entry) in enumerate(zip(ids, document, strict=True)):
        if not isinstance(entry, dict):
            yield f"entry {index}", entry, ["not an object"]
        elif not isinstance(webhook_id, str):
            yield f"entry {index}", entry, ["id is missing or not a string"]
        else:
            yield webhook_id, without_id(entry), id_problems(webhook_id, times[webhook_id] > 1)


def without_id(entry: dict[str, Any]) -> dict[str, Any]:
    renamed = {OLD_NAMES.get(name, name): value for name, value in entry.items() if name != "id"}
    return duplicated(renamed, entry.keys_twice) if isinstance(entry, Duplicated) else renamed


def id_problems(webhook_id: str, repeated: bool) -> list[str]:
    if repeated:
        return ["the id comes more than once"]
    if not webhook_id or len(webhook_id) > 255 or "/" in webhook_id:
        return ["the id must have 1 to 255 characters, and no slash"]
    problem = text_problem(webhook_id)
    return [] if problem is None else [f"the id {problem}"]


def row_of(entry: Any, problems: list[str]) -> WebhookRow:
    """Make the entry a row, in place: a copy of each costs a tenth of an import. Adds what is wrong to `problems`."""
    if not isinstance(entry, dict):
        problems.append("not an object")
        return {}
    if isinstance(entry, Duplicated):
        problems += [f"{name}: comes more than once" for name in sorted(entry.keys_twice)]
    if not entry.keys() <= CHECKS.keys():
        problems += [f"{name}: unknown field, it would be lost" for name in entry if name not in CHECKS]
    for name, check in CHECKS.items():
        if name in entry:
            try:
                entry[name] = check(entry[name])
            except Invalid as exc:
                problems.append(f"{name}: {exc}")
        elif name in REQUIRED:
            problems.append(f"{name}: missing")
    if problems:
        return {}
    entry["event_types"] = entry["events"]
    entry["events"] = events_text(tuple(entry["events"]))
    if entry.get("created_at", "") is None:
        del entry["created_at"]
    return entry


# A check takes a field's value from the file and returns the one to store. Raises Invalid.


def url_of(url: Any) -> str:
    if (problem := url_shape_problem(url)) is not None:
        raise Invalid(problem)
    return str(url)


def events_of(events: Any) -> list[str]:
    if not isinstance(events, list) or not all([isinstance(event, str) for event in events]):
        raise Invalid("not a list of strings")
    if events and max(map(len, events)) > MAX_NAME:
        raise Invalid(f"one has more than {MAX_NAME} characters")
    storable("".join(events))
    return events


def secret_of(secret: Any) -> str:
    if not isinstance(secret, str) or not secret:
        raise Invalid("not a string, or empty")
    return storable(secret)


def team_of(team: Any) -> str | None:
    if team is None:
        return None
    if not isinstance(team, str):
        raise Invalid("neither a string nor null")
    if len(team) > MAX_NAME:
        raise Invalid(f"more than {MAX_NAME} characters")
    return storable(team)


def storable(text: str) -> str:
    if (problem := text_problem(text)) is not None:
        raise Invalid(problem)
    return text


def time_of(value: Any) -> str | None:
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value)
        if AS_STORED.fullmatch(value):
            return str(value) + "Z"
        return stored_time(moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment)
    except (TypeError, ValueError, OverflowError):
        raise Invalid("not an ISO 8601 time") from None


def count_of(value: Any) -> int:
    if type(value) is int and 0 <= value <= MAX_COUNT:
        return value
    raise Invalid("not a whole number from 0 on")


def boolean_of(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Invalid("neither true nor false")
    return value


CHECKS: dict[str, Callable[[Any], Any]] = {  # every field of an entry
    "url": url_of,
    "events": events_of,
    "secret": secret_of,
    "team": team_of,
    "created_at": time_of,
    "total_calls": count_of,
    "failed_calls": count_of,
    "last_success": time_of,
    "last_failure": time_of,
    "enabled": boolean_of,
}


@lru_cache(maxsize=1024)
def events_text(events: tuple[str, ...]) -> str:
    return json.dumps(events)
