"""Moving registrations from the replaced service's JSON file, and back.

The file is an object of webhook id → entry, or, in its older form, a list of entries with `id`, `event_types`,
`active`, `success_count` and `failure_count`. Reading never guesses: what is not of that shape is listed as a problem.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from peewee import Database

from hookline import clock
from hookline.egress import Network, literal_refusal
from hookline.errors import Invalid
from hookline.registration import MAX_NAME, text_problem, url_shape_problem
from hookline.store.failures import in_peewees_words
from hookline.store.files import back_up, replace_file
from hookline.store.locks import exclusive
from hookline.store.pool import is_postgres
from hookline.store.units import connected, transaction
from hookline.tables import read_time, stored_time
from hookline.transfer import imports
from hookline.transfer.imports import BATCH, Progress, Row

FIELDS = "url events secret team created_at total_calls failed_calls last_success last_failure enabled".split()  # noqa: SIM905
FIELD_SET = frozenset(FIELDS)
OLD_NAMES = {
    "event_types": "events",
    "active": "enabled",
    "success_count": "total_calls",
    "failure_count": "failed_calls",
}
AS_STORED = re.compile(  # but for the Z: so the replaced service wrote it
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T(?:[01][0-9]|2[0-3]):[0-9]{2}:[0-9]{2}\.[0-9]{6}"
)
TIMES = ("created_at", "last_success", "last_failure")
COUNTS = ("total_calls", "failed_calls")
MAX_COUNT = 2**63 - 1
ADVISORY_LOCK = 0x696D706F7274  # "import"; one lock of a PostgreSQL database


@dataclass
class Report:
    """What an import did, or, of a dry run, would do. Counts are webhooks."""

    new: int = 0
    updated: int = 0
    unchanged: int = 0
    invalid: int = 0
    conflicts: int = 0  # those of them with a field that both sides have changed
    deleted: int = 0  # imported once and deleted here since: left out
    backup: Path | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    contested: list[str] = field(default_factory=list)  # each such field or webhook, and what became of it


class Duplicated(dict[str, Any]):
    """A JSON object in which some keys came twice."""

    keys_twice: frozenset[str] = frozenset()


def import_file(
    db: Database,
    path: Path,
    *,
    dry_run: bool = False,
    skip_invalid: bool = False,
    overwrite: bool = False,
    allowed: Sequence[Network] = (),
    progress: Progress | None = None,
) -> Report:
    """Store every webhook of the file, after a backup of it, in one transaction.

    Of a webhook that is here already only what has changed in the file since the last import is taken over. What has
    changed on both sides is reported; our value is kept, or the file's taken with `overwrite`. A webhook that was
    imported once and deleted here since is left out, or comes back with `overwrite`.

    Raises Invalid, with every problem, if something in the file is wrong (unless `skip_invalid`, which leaves those
    entries out; a file that is not JSON of either form is refused all the same). Raises Unavailable. Either changes
    nothing. The report warns of addresses that the egress guard refuses, those in the networks `allowed` aside.
    """
    content = read_bytes(path)
    rows, report = parse(content, progress or silent)
    if report.problems and not skip_invalid:
        raise Invalid(f"{path}: nothing was imported, {report.invalid} entries are invalid", report.problems)
    report.warnings = refusals(rows, allowed)
    with connected(db):
        if dry_run:
            tell(imports.plan(db, rows, overwrite=overwrite), overwrite, report)
            return report
        report.backup = back_up(path, content)
        # On PostgreSQL two imports at once would both insert what is new; SQLite has one writer.
        with exclusive(db, ADVISORY_LOCK) if is_postgres(db) else nullcontext(), transaction(db), in_peewees_words:
            plan = imports.plan(db, rows, overwrite=overwrite, lock=True)
            imports.write(db, plan, progress or silent)
    tell(plan, overwrite, report)
    return report


def tell(plan: imports.Plan, overwrite: bool, report: Report) -> None:
    """Add to the report what a plan does. No value is told: one may be a secret."""
    report.new, report.updated, report.unchanged = len(plan.new), len(plan.updated), plan.unchanged
    report.conflicts = len({contested.webhook_id for contested in plan.contested})
    outcome = "the file's value is taken" if overwrite else "our value is kept"
    for webhook_id, name, imported in plan.contested:
        why = "changed both here and in the file" if imported else "differs from ours, and no import has noted it yet"
        report.contested.append(f"{webhook_id}: {name}: {why}: {outcome}")
    report.deleted = len(plan.deleted)
    report.contested += [f"{webhook_id}: deleted here since it was imported: left out" for webhook_id in plan.deleted]


def refusals(rows: Iterable[Row], allowed: Sequence[Network]) -> list[str]:
    """What the egress guard will say, asked once for each host."""
    answers: dict[str, str | None] = {}
    warnings = []
    for row in rows:
        host = row["url"].split("/", 3)[2]
        if host not in answers:
            answers[host] = literal_refusal(row["url"], allowed)
        if answers[host]:
            warnings.append(f"{row['webhook_id']}: it will not be delivered to: {answers[host]}")
    return warnings


def export_file(db: Database, path: Path, progress: Progress | None = None) -> int:
    """Write every webhook in the replaced service's form; returns how many. Raises Invalid, Unavailable."""
    with connected(db):
        entries = {row["webhook_id"]: exported(row) for row in everything(db)}
    text = json.dumps(entries, indent=2)
    replace_file(path, text.encode())
    if progress is not None:
        progress("exported", len(entries), len(entries))
    return len(entries)


def read_bytes(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise Invalid(f"{path} cannot be read: it is not a file")  # and may have no end, such as /dev/zero or a pipe
    try:
        return path.read_bytes()
    except OSError as exc:
        raise Invalid(f"{path} cannot be read: {exc.strerror}") from exc


def parse(content: bytes, progress: Progress) -> tuple[list[Row], Report]:
    """The rows of a file's valid entries, and a report that lists the problems of the others.

    Raises Invalid if the whole is not JSON of one of the two forms.
    """
    entries = list(entries_of(decode(content)))
    report = Report()
    now = stored_time(clock.now())
    rows: list[Row] = []
    for index, (webhook_id, entry, problems) in enumerate(entries):
        row = {} if problems else read_entry(entry, problems)
        if problems:
            report.invalid += 1
            report.problems += [f"{webhook_id}: {problem}" for problem in problems]
        else:
            row["webhook_id"], row["imported_at"] = webhook_id, now
            rows.append(row)
        if index % BATCH == 0:
            progress("checked", index, len(entries))
    progress("checked", len(entries), len(entries))
    return rows, report


def decode(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=as_dict, parse_constant=no_constant)
    except UnicodeDecodeError as exc:
        raise Invalid(f"not UTF-8 at byte {exc.start}; nothing was imported") from exc
    except json.JSONDecodeError as exc:
        reason = f"not JSON at line {exc.lineno}, column {exc.colno}: {exc.msg}; nothing was imported"
        raise Invalid(reason) from exc
    except (ValueError, RecursionError) as exc:
        raise Invalid(f"not JSON that can be read: {exc}; nothing was imported") from exc


def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    repeated = Duplicated(found)
    repeated.keys_twice = frozenset(name for name in found if names.count(name) > 1)
    return repeated


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def entries_of(document: Any) -> Iterator[tuple[str, Any, list[str]]]:
    """Each entry with its id (or place) and the problems that are already known."""
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
    seen = Counter(webhook_id for webhook_id in ids if isinstance(webhook_id, str))
    repeated = {webhook_id for webhook_id, times in seen.items() if times > 1}
    for index, (webhook_id, entry) in enumerate(zip(ids, document, strict=True)):
        if not isinstance(entry, dict):
            yield f"entry {index}", entry, ["not an object"]
        elif not isinstance(webhook_id, str):
            yield f"entry {index}", entry, ["id is missing or not a string"]
        else:
            yield webhook_id, without_id(entry), id_problems(webhook_id, webhook_id in repeated)


def without_id(entry: dict[str, Any]) -> dict[str, Any]:
    renamed = {OLD_NAMES.get(name, name): value for name, value in entry.items() if name != "id"}
    if isinstance(entry, Duplicated):
        again = Duplicated(renamed)
        again.keys_twice = entry.keys_twice
        return again
    return renamed


def id_problems(webhook_id: str, repeated: bool) -> list[str]:
    if repeated:
        return ["the id comes more than once"]
    if not webhook_id or len(webhook_id) > 255 or "/" in webhook_id:
        return ["the id must have 1 to 255 characters, and no slash"]
    return text_problems("the id", webhook_id)


def read_entry(entry: Any, problems: list[str]) -> Row:
    """What one entry gives, as a row; what is wrong is added to `problems`, by field."""
    if not isinstance(entry, dict):
        problems.append("not an object")
        return {}
    if isinstance(entry, Duplicated):
        problems += [f"{name}: comes more than once" for name in sorted(entry.keys_twice)]
    if not entry.keys() <= FIELD_SET:
        problems += [f"{name}: unknown field, it would be lost" for name in entry if name not in FIELD_SET]
    url: Any = entry.get("url")
    events: Any = entry.get("events")
    secret: Any = entry.get("secret")
    team: Any = entry.get("team")
    if (problem := url_shape_problem(url)) is not None:
        problems.append("url: " + (problem if "url" in entry else "missing"))
    if not isinstance(events, list) or not all([isinstance(event, str) for event in events]):
        problems.append("events: " + ("not a list of strings" if "events" in entry else "missing"))
    elif events and max(map(len, events)) > MAX_NAME:
        problems.append(f"events: one has more than {MAX_NAME} characters")
    if not isinstance(secret, str) or not secret:
        problems.append("secret: " + ("not a string, or empty" if "secret" in entry else "missing"))
    if team is not None and not isinstance(team, str):
        problems.append("team: neither a string nor null")
    elif team and len(team) > MAX_NAME:
        problems.append(f"team: more than {MAX_NAME} characters")
    if problems:
        return {}
    texts = {"secret": secret, "team": team or "", "events": "".join(events)}
    together = "".join(texts.values())
    if not together.isascii() or "\0" in together:
        for name, text in texts.items():
            problems += text_problems(name, text)
    row: Row = entry  # changed in place: a copy of each costs a tenth of an import
    for name, check in CHECKS.items():
        if name in row:
            row[name] = check(row[name], name, problems)
    row["event_types"] = events
    row["events"] = events_text(tuple(events))
    if row.get("created_at", "") is None:
        del row["created_at"]
    return row


def text_problems(name: str, text: str) -> list[str]:
    problem = text_problem(text)
    return [] if problem is None else [f"{name} {problem}"]


def time_of(value: Any, name: str, problems: list[str]) -> str | None:
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value)
        if AS_STORED.fullmatch(value):
            return str(value) + "Z"
        return stored_time(moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment)
    except (TypeError, ValueError, OverflowError):
        problems.append(f"{name}: not an ISO 8601 time")
        return None


def count_of(value: Any, name: str, problems: list[str]) -> int:
    if type(value) is int and 0 <= value <= MAX_COUNT:
        return value
    problems.append(f"{name}: not a whole number from 0 on")
    return 0


def boolean_of(value: Any, name: str, problems: list[str]) -> bool:
    if not isinstance(value, bool):
        problems.append(f"{name}: neither true nor false")
    return bool(value)


CHECKS: dict[str, Callable[[Any, str, list[str]], Any]] = {
    **dict.fromkeys(TIMES, time_of),
    **dict.fromkeys(COUNTS, count_of),
    "enabled": boolean_of,
}


@lru_cache(maxsize=1024)
def events_text(events: tuple[str, ...]) -> str:
    return json.dumps(events)


def everything(db: Database) -> Iterator[Row]:
    columns = ("webhook_id", *FIELDS)
    cursor = db.execute_sql(f"SELECT {', '.join(columns)} FROM webhooks ORDER BY created_at, webhook_id")
    for row in cursor.fetchall():
        yield dict(zip(columns, row, strict=True))


def exported(row: Row) -> dict[str, Any]:
    entry = {name: row[name] for name in FIELDS}
    for name in TIMES:
        entry[name] = clock.legacy_time(read_time(entry[name]))
    return {**entry, "events": json.loads(row["events"]), "enabled": bool(row["enabled"])}


def silent(what: str, done: int, total: int) -> None:
    pass
