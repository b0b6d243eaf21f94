"""Moving registrations from the replaced service's JSON file, and back. Of the file's form see `entries`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peewee import Database

from hookline import clock
from hookline.egress import Network
from hookline.errors import Invalid
from hookline.registration_warnings import url_warning
from hookline.store.failures import in_peewees_words
from hookline.store.files import back_up, replace_file
from hookline.store.locks import exclusive
from hookline.store.pool import is_postgres
from hookline.store.units import connected, transaction
from hookline.tables import read_time
from hookline.transfer import entries, imports
from hookline.transfer.imports import WebhookRow
from hookline.transfer.progress import Progress, silent

TIMES = ("created_at", "last_success", "last_failure")
BOTH_CHANGED = "changed both here and in the file"
NEVER_NOTED = "differs from ours, and no import has noted it yet"
ADVISORY_LOCK = 0x696D706F7274  # "import"; one lock of a PostgreSQL database


@dataclass
class Report:
    """The outcome of an import, or, of a dry run, what it would be. Counts are webhooks."""

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

    def add(self, plan: imports.Plan, overwrite: bool) -> None:
        """Add what a plan does. The lines name fields without their values: one may be a secret."""
        self.new, self.updated, self.unchanged = len(plan.new), len(plan.updated), plan.unchanged
        self.conflicts = len({contested.webhook_id for contested in plan.contested})
        outcome = "the file's value is taken" if overwrite else "our value is kept"
        for webhook_id, name, imported in plan.contested:
            why = BOTH_CHANGED if imported else NEVER_NOTED
            self.contested.append(f"{webhook_id}: {name}: {why}: {outcome}")
        self.deleted = len(plan.deleted)
        self.contested += [f"{webhook_id}: deleted here since it was imported: left out" for webhook_id in plan.deleted]


def import_file(  # noqa: PLR0913 - each is an option of the command
    db: Database,
    path: Path,
    *,
    dry_run: bool = False,
    skip_invalid: bool = False,
    overwrite: bool = False,
    allowed: Sequence[Network] = (),
    progress: Progress = silent,
) -> Report:
    """Store every webhook of the file, after a backup of it, in one transaction. How it decides: see `imports.plan`.

    The report warns of addresses that the egress guard refuses, except in the networks `allowed`. Raises Unavailable,
    and Invalid with every problem if entries are wrong (`skip_invalid` leaves those out instead) or if the file is not
    JSON of either form. Nothing is changed then.
    """
    content = read_bytes(path)
    rows, problems, invalid = entries.read(content, progress)
    if problems and not skip_invalid:
        raise Invalid(f"{path}: nothing was imported, {invalid} entries are invalid", problems)
    report = Report(invalid=invalid, problems=problems, warnings=refusals(rows, allowed))
    with connected(db):
        if dry_run:
            plan = imports.plan(db, rows, overwrite=overwrite)
        else:
            report.backup = back_up(path, content)
            # On PostgreSQL two imports at once would both insert what is new; SQLite has one writer.
            with exclusive(db, ADVISORY_LOCK) if is_postgres(db) else nullcontext(), transaction(db), in_peewees_words:
                plan = imports.plan(db, rows, overwrite=overwrite, lock=True)
                imports.write(db, plan, progress)
    report.add(plan, overwrite)
    return report


def refusals(rows: Iterable[WebhookRow], allowed: Sequence[Network]) -> list[str]:
    """A warning for each webhook that the egress guard will refuse. The guard is asked once for each host."""
    answers: dict[str, str | None] = {}
    warnings = []
    for row in rows:
        host = row["url"].split("/", 3)[2]
        if host not in answers:
            answers[host] = url_warning(row["url"], allowed)
        if answers[host]:
            warnings.append(f"{row['webhook_id']}: {answers[host]}")
    return warnings


def read_bytes(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise Invalid(f"{path} cannot be read: it is not a file")  # and may have no end, such as /dev/zero or a pipe
    try:
        return path.read_bytes()
    except OSError as exc:
        raise Invalid(f"{path} cannot be read: {exc.strerror}") from exc


def export_file(db: Database, path: Path) -> int:
    """Write every webhook in the replaced service's form; returns how many. Raises Invalid, Unavailable."""
    with connected(db):
        document = {row["webhook_id"]: exported(row) for row in every_webhook(db)}
    replace_file(path, json.dumps(document, indent=2).encode())
    return len(document)


def every_webhook(db: Database) -> Iterator[WebhookRow]:
    columns = ("webhook_id", *entries.CHECKS)
    cursor = db.execute_sql(f"SELECT {', '.join(columns)} FROM webhooks ORDER BY created_at, webhook_id")
    for row in cursor.fetchall():
        yield dict(zip(columns, row, strict=True))


def exported(row: WebhookRow) -> dict[str, Any]:
    entry = {name: row[name] for name in entries.CHECKS}
    for name in TIMES:
        entry[name] = clock.legacy_time(read_time(entry[name]))
    return {**entry, "events": json.loads(row["events"]), "enabled": bool(row["enabled"])}
