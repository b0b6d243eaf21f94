"""Three-way merge of an import: the file now, the file at the last import, and the webhooks here.

The table `imports` notes what the file had for a webhook when its fields were last taken over. A field that has changed
in the file since is taken over, one that has changed here since is kept, and one that has changed on both sides is a
conflict. Counters come over once, with a webhook that is new here. A webhook that was deleted here stays deleted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from json.encoder import encode_basestring_ascii as quoted
from operator import itemgetter
from typing import Any, NamedTuple

from peewee import Database

from hookline import lanes
from hookline.store import locks, sql
from hookline.tables import read_time, stored_time
from hookline.transfer.progress import Progress

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
DISABLED = ("disabled_at", "disabled_reason", "failing_since")  # change with `enabled`
OVERLAP = ("previous_secret", "previous_secret_expires_at", "earlier_secrets")  # end with a new secret
REASON = "disabled in the imported file"
COMPLETE = frozenset(MERGED)
BATCH = 2000

WebhookRow = dict[str, Any]  # a webhook's columns, and `event_types`, the list that `events` encodes
Note = dict[str, Any]  # what the file had for a webhook: its merged fields, with a digest of the secret


class Contested(NamedTuple):
    """A field that differs between the file and the database, of which the file is not known to be the newer.

    `imported`: an earlier import has noted the field, so both sides have changed it since.
    """

    webhook_id: str
    field: str
    imported: bool


@dataclass
class Plan:
    """The writes of an import. A row of `updated` has the names of its changed fields in `changed`."""

    new: list[WebhookRow] = field(default_factory=list)
    updated: list[WebhookRow] = field(default_factory=list)
    noted: list[WebhookRow] = field(default_factory=list)  # rows whose note is new or has changed
    contested: list[Contested] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)  # webhooks that were deleted here since they were imported
    unchanged: int = 0


def plan(db: Database, rows: Iterable[WebhookRow], *, overwrite: bool = False, lock: bool = False) -> Plan:
    """Compare the file's rows with the database. Contested fields keep our value, or get the file's with `overwrite`.

    A webhook that was imported once and deleted here is left out, or comes back with `overwrite`. With `lock` nobody
    else changes the webhooks that the plan may update, for the rest of the transaction.
    """
    planned = Plan()
    differing: list[WebhookRow] = []
    query = "SELECT webhook_id, entry FROM webhooks LEFT JOIN imports USING (webhook_id)"
    notes: dict[str, str | None] = dict(db.execute_sql(query).fetchall())
    deleted = set() if overwrite else deleted_here(db)
    for row in rows:
        if row["webhook_id"] in deleted:
            planned.deleted.append(row["webhook_id"])
        elif row["webhook_id"] not in notes:
            add(row, planned)
        elif note_text(row) == notes[row["webhook_id"]]:
            planned.unchanged += 1
        else:
            differing.append(row)
    ids = [row["webhook_id"] for row in differing]
    if lock:
        locks.lock_webhooks(db, ids)
    ours = read_webhooks(db, ids)
    for row in differing:
        if row["webhook_id"] in ours:
            merge(row, ours[row["webhook_id"]], overwrite, planned)
        elif overwrite:
            add(row, planned)
        else:  # deleted just now
            planned.deleted.append(row["webhook_id"])
    return planned


def deleted_here(db: Database) -> set[str]:
    """The webhooks that an import has noted and that are no more."""
    webhook = "SELECT 1 FROM webhooks w WHERE w.webhook_id = i.webhook_id"
    query = f"SELECT webhook_id FROM imports i WHERE NOT EXISTS ({webhook})"
    return {webhook_id for (webhook_id,) in db.execute_sql(query).fetchall()}


def add(row: WebhookRow, planned: Plan) -> None:
    row.setdefault("created_at", row["imported_at"])
    for name, value in DEFAULTS.items():
        row.setdefault(name, value)
    planned.new.append(row)
    planned.noted.append(row)


def merge(row: WebhookRow, ours: WebhookRow, overwrite: bool, planned: Plan) -> None:
    """Decide each field of a webhook that the file and the database have."""
    theirs, current, last = note_of(row), note_of(ours), json.loads(ours["entry"] or "{}")
    changed: set[str] = set()
    kept: set[str] = set()
    for name, value in theirs.items():
        if value == current[name] or (name in last and value == last[name]):
            continue
        contested = name not in last or current[name] != last[name]
        if contested:
            planned.contested.append(Contested(row["webhook_id"], name, imported=name in last))
        (kept if contested and not overwrite else changed).add(name)
    # A field that is kept is not noted, so that the next import reports it again.
    absent = {name: value for name, value in current.items() if name not in theirs}
    note = absent | last | {name: value for name, value in theirs.items() if name not in kept}
    row["note"] = json.dumps({name: note[name] for name in MERGED if name in note})
    if row["note"] != ours["entry"]:
        planned.noted.append(row)
    if changed:
        planned.updated.append(updated(ours, row, changed))
    else:
        planned.unchanged += 1


def updated(ours: WebhookRow, row: WebhookRow, changed: set[str]) -> WebhookRow:
    """Our webhook with the fields that have changed in the file, and the consequences of each."""
    after = {**ours, **{name: row[name] for name in changed}, "changed": changed, "imported_at": row["imported_at"]}
    if "events" in changed:
        after["event_types"] = row["event_types"]
    if "secret" in changed:  # the receiver has the new one already
        after |= dict.fromkeys(OVERLAP)
    if "enabled" in changed:
        disabled = {"disabled_at": row["imported_at"], "disabled_reason": REASON}
        after |= dict.fromkeys(DISABLED) if row["enabled"] else disabled
    return after


def note_of(row: WebhookRow) -> Note:
    note = {name: row[name] for name in MERGED if name in row}
    note["events"] = row["event_types"]
    note["secret"] = digest(row)
    return note


def note_text(row: WebhookRow) -> str:
    """`json.dumps(note_of(row))`, written out: it is made for every webhook of every import."""
    if not row.keys() >= COMPLETE:
        return json.dumps(note_of(row))
    team = "null" if row["team"] is None else quoted(row["team"])
    return (
        f'{{"url": {quoted(row["url"])}, "events": {row["events"]}, "secret": "{digest(row)}", "team": {team}, '
        f'"created_at": "{row["created_at"]}", "enabled": {"true" if row["enabled"] else "false"}}}'
    )


def digest(row: WebhookRow) -> str:
    return sha256(f"{row['webhook_id']}\0{row['secret']}".encode()).hexdigest()[:32]


def read_webhooks(db: Database, ids: Sequence[str]) -> dict[str, WebhookRow]:
    """These webhooks as they are here, by id, each with the note of its last import in `entry`."""
    columns = ("webhook_id", *MERGED, *OVERLAP, *DISABLED, "entry")
    tables = "webhooks LEFT JOIN imports USING (webhook_id)"
    chosen = f"webhook_id IN (SELECT webhook_id FROM {sql.values(db, 'chosen', 'webhook_id')})"
    query = f"SELECT {', '.join(columns)} FROM {tables} WHERE {chosen}"
    webhooks = {}
    for values in db.execute_sql(query, {"chosen": sql.encoded_ids(ids)}).fetchall():
        row = dict(zip(columns, values, strict=True))
        moment = read_time(row["created_at"])
        row["created_at"] = moment and stored_time(moment)
        row["enabled"] = bool(row["enabled"])
        row["event_types"] = json.loads(row["events"])
        webhooks[row["webhook_id"]] = row
    return webhooks


def write(db: Database, planned: Plan, progress: Progress) -> None:
    """Carry out a plan, inside the transaction in which it was made, in batches of one kind of statement."""
    cursor = db.cursor()
    planned.updated.sort(key=itemgetter("webhook_id"))  # as settling locks them: neither waits for the other
    done, total = 0, len(planned.new) + len(planned.updated)
    for statement, rows in ((insert_sql(db), planned.new), (update_sql(db), planned.updated)):
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            cursor.executemany(statement, batch)
            progress("written", done := done + len(batch), total)
    write_subscriptions(db, planned)
    planned.noted.sort(key=itemgetter("webhook_id"))
    cursor.executemany(note_sql(db), map(noted, planned.noted))
    reopened = [row["webhook_id"] for row in planned.updated if row["changed"] & {"enabled", "url"}]
    if reopened:
        lanes.open_lanes(db, reopened, now=True)


def insert_sql(db: Database) -> str:
    columns = ("webhook_id", *MERGED, *COUNTERS)
    values = ", ".join(sql.param(db, name) for name in (*columns, "imported_at"))
    return f"INSERT INTO webhooks ({', '.join(columns)}, updated_at) VALUES ({values})"


def update_sql(db: Database) -> str:
    changes = ", ".join(f"{name} = {sql.param(db, name)}" for name in (*MERGED, *OVERLAP, *DISABLED))
    updated_at, webhook_id = sql.param(db, "imported_at"), sql.param(db, "webhook_id")
    return f"UPDATE webhooks SET {changes}, updated_at = {updated_at} WHERE webhook_id = {webhook_id}"


def noted(row: WebhookRow) -> dict[str, str]:
    note = row["note"] if "note" in row else note_text(row)
    return {"webhook_id": row["webhook_id"], "note": note, "imported_at": row["imported_at"]}


def note_sql(db: Database) -> str:
    values = ", ".join(sql.param(db, name) for name in ("webhook_id", "note", "imported_at"))
    return (
        f"INSERT INTO imports (webhook_id, entry, imported_at) VALUES ({values}) "
        "ON CONFLICT (webhook_id) DO UPDATE SET entry = excluded.entry, imported_at = excluded.imported_at"
    )


def write_subscriptions(db: Database, planned: Plan) -> None:
    """Derive the subscriptions anew where events or team have changed."""
    cursor = db.cursor()
    changed = [row for row in planned.updated if row["changed"] & {"events", "team"}]
    cursor.executemany(f"DELETE FROM subscriptions WHERE webhook_id = {sql.param(db, 'webhook_id')}", changed)
    values = ", ".join(sql.param(db, name) for name in ("event_type", "team", "webhook_id"))
    insert = f"INSERT INTO subscriptions (event_type, team, webhook_id) VALUES ({values})"
    cursor.executemany(insert, subscriptions_of([*planned.new, *changed]))


def subscriptions_of(rows: Iterable[WebhookRow]) -> Iterator[dict[str, str]]:
    """The subscriptions in the order of their webhooks: both indexes then grow at their ends."""
    for row in sorted(rows, key=itemgetter("webhook_id")):
        team, webhook_id = row["team"] or "", row["webhook_id"]
        for event_type in dict.fromkeys(row["event_types"]):
            yield {"event_type": event_type, "team": team, "webhook_id": webhook_id}
