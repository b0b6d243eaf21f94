"""What an import takes over of each webhook: the difference between the file now and the file at the last import.

The table `imports` keeps what the file said of a webhook when its fields were last taken over. A field that has changed
in the file since is taken over, one that has changed here since is kept, and one that has changed on both sides is a
conflict. Counters come over once, with a webhook that is new here. One that was deleted here stays deleted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from json.encoder import encode_basestring_ascii as quoted
from operator import itemgetter
from typing import Any, NamedTuple

from peewee import Database

from hookline import lanes
from hookline.store import locks, sql
from hookline.tables import read_time, stored_time

MERGED = ("url", "events", "secret", "team", "created_at", "enabled")
COUNTERS = ("total_calls", "failed_calls", "last_success", "last_failure")
DEFAULTS = {
    "team": None,
    "total_calls": 0,
    "failed_calls": 0,
    "last_success": None,
    "last_failure": None,
    "enabled": True,
}
DISABLED = ("disabled_at", "disabled_reason", "failing_since")  # what changes with `enabled`
OVERLAP = ("previous_secret", "previous_secret_expires_at", "earlier_secrets")  # what ends with a new secret
REASON = "disabled in the imported file"
COMPLETE = frozenset(MERGED)
BATCH = 2000

Progress = Callable[[str, int, int], None]  # what is done, how many of how many
Row = dict[str, Any]
Entry = dict[str, Any]


class Contested(NamedTuple):
    """A field that differs between the file and the database, of which the file is not known to be the newer.

    `imported`: an earlier import has noted the field, so both sides have changed it since.
    """

    webhook_id: str
    field: str
    imported: bool


@dataclass
class Plan:
    """What an import will write. A row of `updated` has the names of its changed fields in `changed`."""

    new: list[Row] = field(default_factory=list)
    updated: list[Row] = field(default_factory=list)
    noted: list[Row] = field(default_factory=list)  # what the file says, where that is news
    contested: list[Contested] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)  # webhooks that were deleted here since they were imported
    unchanged: int = 0


def plan(db: Database, rows: Iterable[Row], *, overwrite: bool = False, lock: bool = False) -> Plan:
    """Compare the file's rows with the database. Contested fields keep our value, or get the file's with `overwrite`.

    So does a webhook that was imported once and deleted here: it is left out, or comes back with `overwrite`. `lock`:
    for the rest of the transaction nobody else changes the webhooks that the plan may update.
    """
    decided, differing = Plan(), []
    query = "SELECT webhook_id, entry FROM webhooks LEFT JOIN imports USING (webhook_id)"
    notes: dict[str, str | None] = dict(db.execute_sql(query).fetchall())
    deleted = set() if overwrite else deleted_here(db)
    for row in rows:
        if row["webhook_id"] in deleted:
            decided.deleted.append(row["webhook_id"])
        elif row["webhook_id"] not in notes:
            add(row, decided)
        elif note_of(row) == notes[row["webhook_id"]]:
            decided.unchanged += 1
        else:
            differing.append(row)
    ids = [row["webhook_id"] for row in differing]
    if lock:
        locks.lock_webhooks(db, ids)
    here = current(db, ids)
    for row in differing:
        if row["webhook_id"] in here:
            merge(row, here[row["webhook_id"]], overwrite, decided)
        elif overwrite:
            add(row, decided)
        else:  # deleted just now
            decided.deleted.append(row["webhook_id"])
    return decided


def deleted_here(db: Database) -> set[str]:
    """The webhooks that an import has noted and that are no more."""
    here = "SELECT 1 FROM webhooks w WHERE w.webhook_id = i.webhook_id"
    query = f"SELECT webhook_id FROM imports i WHERE NOT EXISTS ({here})"
    return {webhook_id for (webhook_id,) in db.execute_sql(query).fetchall()}


def add(row: Row, decided: Plan) -> None:
    row.setdefault("created_at", row["imported_at"])
    for name, value in DEFAULTS.items():
        row.setdefault(name, value)
    decided.new.append(row)
    decided.noted.append(row)


def merge(row: Row, here: Row, overwrite: bool, decided: Plan) -> None:
    """Decide each field of a webhook that the file and the database have."""
    said, ours, base = entry_of(row), entry_of(here), json.loads(here["entry"] or "{}")
    changed: set[str] = set()
    kept: set[str] = set()
    for name, theirs in said.items():
        if theirs == ours[name] or (name in base and theirs == base[name]):
            continue
        contested = name not in base or ours[name] != base[name]
        if contested:
            decided.contested.append(Contested(row["webhook_id"], name, name in base))
        (kept if contested and not overwrite else changed).add(name)
    # What is kept is not noted, so that the next import tells of it again.
    unsaid = {name: value for name, value in ours.items() if name not in said}
    entry = unsaid | base | {name: value for name, value in said.items() if name not in kept}
    row["note"] = json.dumps({name: entry[name] for name in MERGED if name in entry})
    if row["note"] != here["entry"]:
        decided.noted.append(row)
    if changed:
        decided.updated.append(updated(here, row, changed))
    else:
        decided.unchanged += 1


def updated(here: Row, row: Row, changed: set[str]) -> Row:
    """Our webhook with what has changed in the file, and what follows from that."""
    after = {**here, **{name: row[name] for name in changed}, "changed": changed, "imported_at": row["imported_at"]}
    if "events" in changed:
        after["event_types"] = row["event_types"]
    if "secret" in changed:  # the receiver has the new one already
        after |= dict.fromkeys(OVERLAP)
    if "enabled" in changed:
        disabled = {"disabled_at": row["imported_at"], "disabled_reason": REASON}
        after |= dict.fromkeys(DISABLED) if row["enabled"] else disabled
    return after


def entry_of(row: Row) -> Entry:
    """What a row says of the fields that are merged; of the secret a digest."""
    entry = {name: row[name] for name in MERGED if name in row}
    entry["events"] = row["event_types"]
    entry["secret"] = digest(row)
    return entry


def note_of(row: Row) -> str:
    """`json.dumps(entry_of(row))`, written out: it is made for every webhook of every import."""
    if not row.keys() >= COMPLETE:
        return json.dumps(entry_of(row))
    team = "null" if row["team"] is None else quoted(row["team"])
    return (
        f'{{"url": {quoted(row["url"])}, "events": {row["events"]}, "secret": "{digest(row)}", "team": {team}, '
        f'"created_at": "{row["created_at"]}", "enabled": {"true" if row["enabled"] else "false"}}}'
    )


def digest(row: Row) -> str:
    return sha256(f"{row['webhook_id']}\0{row['secret']}".encode()).hexdigest()[:32]


def current(db: Database, ids: Sequence[str]) -> dict[str, Row]:
    """These webhooks as they are here, each with the `entry` of its last import."""
    columns = ("webhook_id", *MERGED, *OVERLAP, *DISABLED, "entry")
    tables = "webhooks LEFT JOIN imports USING (webhook_id)"
    query = f"SELECT {', '.join(columns)} FROM {tables} WHERE webhook_id IN (SELECT id FROM {sql.rows(db, 'id')})"
    found = {}
    for values in db.execute_sql(query, (sql.ids(ids),)).fetchall():
        row = dict(zip(columns, values, strict=True))
        moment = read_time(row["created_at"])
        row["created_at"] = moment and stored_time(moment)
        row["enabled"] = bool(row["enabled"])
        row["event_types"] = json.loads(row["events"])
        found[row["webhook_id"]] = row
    return found


def write(db: Database, decided: Plan, progress: Progress) -> None:
    """Carry out a plan, inside the transaction in which it was made: in batches of one statement kind."""
    cursor, slot = db.cursor(), db.param
    decided.updated.sort(key=itemgetter("webhook_id"))  # as settling locks them: neither waits for the other
    new = ("webhook_id", *MERGED, *COUNTERS)
    changing = (*MERGED, *OVERLAP, *DISABLED)
    insert = f"INSERT INTO webhooks ({', '.join(new)}, updated_at) VALUES ({', '.join([slot] * (len(new) + 1))})"
    change = f"{', '.join(f'{name} = {slot}' for name in changing)}, updated_at = {slot}"
    update = f"UPDATE webhooks SET {change} WHERE webhook_id = {slot}"
    done, total = 0, len(decided.new) + len(decided.updated)
    for statement, rows, values in (
        (insert, decided.new, itemgetter(*new, "imported_at")),
        (update, decided.updated, itemgetter(*changing, "imported_at", "webhook_id")),
    ):
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            cursor.executemany(statement, list(map(values, batch)))
            progress("written", done := done + len(batch), total)
    subscribe(db, decided)
    note = (
        f"INSERT INTO imports (webhook_id, entry, imported_at) VALUES ({slot}, {slot}, {slot}) "
        "ON CONFLICT (webhook_id) DO UPDATE SET entry = excluded.entry, imported_at = excluded.imported_at"
    )
    decided.noted.sort(key=itemgetter("webhook_id"))
    cursor.executemany(
        note, ((row["webhook_id"], row.get("note") or note_of(row), row["imported_at"]) for row in decided.noted)
    )
    reopened = [row["webhook_id"] for row in decided.updated if row["changed"] & {"enabled", "url"}]
    if reopened:
        lanes.open_lanes(db, reopened, now=True)


def subscribe(db: Database, decided: Plan) -> None:
    """Derive the subscriptions anew where events or team have changed."""
    cursor, slot = db.cursor(), db.param
    changed = [row for row in decided.updated if row["changed"] & {"events", "team"}]
    ids = [(row["webhook_id"],) for row in changed]
    cursor.executemany(f"DELETE FROM subscriptions WHERE webhook_id = {slot}", ids)
    insert = f"INSERT INTO subscriptions (event_type, team, webhook_id) VALUES ({slot}, {slot}, {slot})"
    cursor.executemany(insert, subscriptions_of([*decided.new, *changed]))


def subscriptions_of(rows: Iterable[Row]) -> Iterator[tuple[str, str, str]]:
    """In the order of their webhooks: both indexes then grow at their ends."""
    for row in sorted(rows, key=itemgetter("webhook_id")):
        team, webhook_id = row["team"] or "", row["webhook_id"]
        for event in dict.fromkeys(row["event_types"]):
            yield event, team, webhook_id
