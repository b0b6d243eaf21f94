"""Importing again, step 5 of the documented move: what changed in the file comes over, what was done here stays."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from peewee import Database

from hookline import WebhookManager, clock
from hookline.store.pool import is_postgres
from hookline.transfer import imports
from hookline.transfer.json_file import Report, export_file, import_file
from models import Delivery, Event, Import, Lane, Webhook
from tests.conftest import SECRET, manage
from tests.databases import Place, wait_for_a_waiter

FILED = "the-secret-of-the-file"
NEWER = "a-newer-secret-of-the-file"
ENTRY: dict[str, Any] = {
    "url": "https://example.com/hook",
    "events": ["game_started"],
    "secret": FILED,
    "team": "ne",
    "created_at": "2025-10-19T17:00:05.123456",
    "total_calls": 3,
    "failed_calls": 1,
    "last_success": "2025-10-19T17:00:05",
    "last_failure": None,
    "enabled": True,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "webhooks.json", x=ENTRY, y=ENTRY)


def written(file: Path, **entries: dict[str, Any]) -> Path:
    file.write_text(json.dumps(entries))
    return file


def counts(report: Report) -> tuple[int, int, int, int]:
    return report.new, report.updated, report.unchanged, report.conflicts


def row(db: Database, webhook_id: str = "x") -> dict[str, Any]:
    with db.connection_context():
        return dict(Webhook.select().where(Webhook.webhook_id == webhook_id).dicts().execute(db)[0])


def change(db: Database, **values: Any) -> None:
    with db.connection_context():
        Webhook.update(values).where(Webhook.webhook_id == "x").execute(db)


def test_importing_again_reverts_nothing_that_was_done_since(db: Database, manager: WebhookManager, file: Path) -> None:
    assert counts(import_file(db, file)) == (2, 0, 0, 0)
    manager.rotate("x", SECRET, 3600)
    manager.update("x", {"url": "https://example.com/moved", "events": ["a", "b"], "team": None, "description": "d"})
    change(db, enabled=False, disabled_at=clock.now(), disabled_reason="it answered 410", total_calls=99)
    change(db, failed_calls=9, last_failure=clock.now())
    before = row(db)
    assert counts(import_file(db, file)) == (0, 0, 2, 0)
    assert row(db) == before
    assert manager.get("x")["events"] == ["a", "b"]
    with db.connection_context():
        assert sorted(Import.select(Import.webhook_id).tuples().execute(db)) == [("x",), ("y",)]


def test_what_changed_in_the_file_alone_comes_over_beside_what_changed_here(
    db: Database, manager: WebhookManager, file: Path
) -> None:
    import_file(db, file)
    manager.rotate("x", SECRET, 0)
    written(file, x=ENTRY | {"url": "https://example.com/new", "events": ["c"], "total_calls": 50}, y=ENTRY)
    assert counts(import_file(db, file)) == (0, 1, 1, 0)
    webhook = row(db)
    assert (webhook["url"], webhook["events"], webhook["secret"]) == ("https://example.com/new", '["c"]', SECRET)
    assert [webhook["webhook_id"] for webhook in manager.list(event="c")] == ["x"]
    assert [webhook["webhook_id"] for webhook in manager.list(event="game_started")] == ["y"]
    assert counts(import_file(db, file)) == (0, 0, 2, 0)


def test_a_webhook_that_was_deleted_here_does_not_come_back(db: Database, manager: WebhookManager, file: Path) -> None:
    import_file(db, file)
    manager.unregister("x")
    for dry_run in (True, False):
        report = import_file(db, file, dry_run=dry_run)
        assert (counts(report), report.deleted) == ((0, 0, 1, 0), 1)
        assert report.contested == ["x: deleted here since it was imported: left out"]
    assert [webhook["webhook_id"] for webhook in manager.list()] == ["y"]
    report = import_file(db, file, overwrite=True)
    assert (counts(report), report.deleted) == ((1, 0, 1, 0), 0)
    assert row(db)["total_calls"] == ENTRY["total_calls"]


def test_counters_come_over_once(db: Database, file: Path) -> None:
    import_file(db, file)
    counted = row(db)
    assert (counted["total_calls"], counted["failed_calls"]) == (3, 1)
    more = {"total_calls": 70, "failed_calls": 7, "last_success": "2026-01-01T00:00:00", "last_failure": None}
    written(file, x=ENTRY | more | {"team": "buf"}, y=ENTRY)
    assert counts(import_file(db, file, overwrite=True)) == (0, 1, 1, 0)
    assert row(db) == counted | {"team": "buf", "updated_at": row(db)["updated_at"]}


def test_a_field_that_changed_on_both_sides_is_reported_and_kept(
    db: Database, manager: WebhookManager, file: Path
) -> None:
    import_file(db, file)
    manager.update("x", {"url": "https://example.com/ours"})
    manager.rotate("x", SECRET, 0)
    written(file, x=ENTRY | {"url": "https://example.com/theirs", "secret": NEWER, "team": "buf"}, y=ENTRY)
    told = [f"x: {name}: changed both here and in the file: our value is kept" for name in ("url", "secret")]
    for dry_run in (True, False):
        report = import_file(db, file, dry_run=dry_run)
        assert counts(report) == (0, 1, 1, 1)
        assert report.contested == told
    webhook = row(db)
    assert (webhook["url"], webhook["secret"], webhook["team"]) == ("https://example.com/ours", SECRET, "buf")
    repeated = import_file(db, file)
    assert (counts(repeated), repeated.contested) == ((0, 0, 2, 1), told)


def test_overwrite_takes_the_files_value_where_both_changed_and_only_there(
    db: Database, manager: WebhookManager, file: Path
) -> None:
    import_file(db, file)
    manager.update("x", {"url": "https://example.com/ours", "team": "kept"})
    written(file, x=ENTRY | {"url": "https://example.com/theirs"}, y=ENTRY)
    import_file(db, file)
    dry = import_file(db, file, overwrite=True, dry_run=True)
    assert counts(dry) == (0, 1, 1, 1)
    assert row(db)["url"] == "https://example.com/ours"
    report = import_file(db, file, overwrite=True)
    assert report.contested == ["x: url: changed both here and in the file: the file's value is taken"]
    assert (row(db)["url"], row(db)["team"]) == ("https://example.com/theirs", "kept")
    assert counts(import_file(db, file)) == (0, 0, 2, 0)


def test_the_same_change_on_both_sides_is_no_conflict(db: Database, manager: WebhookManager, file: Path) -> None:
    import_file(db, file)
    manager.update("x", {"url": "https://example.com/same"})
    written(file, x=ENTRY | {"url": "https://example.com/same"}, y=ENTRY)
    assert counts(import_file(db, file)) == (0, 0, 2, 0)
    written(file, x=ENTRY | {"url": "https://example.com/later"}, y=ENTRY)
    assert counts(import_file(db, file)) == (0, 1, 1, 0)


def test_a_webhook_that_no_import_has_noted_keeps_what_it_has(
    db: Database, manager: WebhookManager, file: Path
) -> None:
    webhook_id = manager.register("https://example.com/ours", ["a"], SECRET, team="ne")
    export_file(db, file)
    entry = json.loads(file.read_text())[webhook_id]
    written(file, **{webhook_id: entry | {"url": "https://example.com/theirs", "total_calls": 12}})
    for _ in range(2):
        report = import_file(db, file)
        assert counts(report) == (0, 0, 1, 1)
        assert report.contested == [
            f"{webhook_id}: url: differs from ours, and no import has noted it yet: our value is kept"
        ]
    # Fields that agreed have been noted, so that a later change in the file is recognized.
    written(file, **{webhook_id: entry | {"team": "buf"}})
    assert counts(import_file(db, file)) == (0, 1, 0, 0)
    assert manager.get(webhook_id)["team"] == "buf"
    written(file, **{webhook_id: entry | {"url": "https://example.com/theirs", "team": "buf"}})
    import_file(db, file, overwrite=True)
    assert manager.get(webhook_id)["url"] == "https://example.com/theirs"
    assert manager.get(webhook_id)["total_calls"] == 0


def test_a_webhook_disabled_in_the_file_says_why_and_its_lane_is_looked_at(
    db: Database, manager: WebhookManager, file: Path
) -> None:
    import_file(db, file)
    later = clock.now() + timedelta(hours=1)
    with db.connection_context():
        Event.insert(event_id="evt_1", event_type="a", payload="{}", created_at=clock.now()).execute(db)
        Delivery.insert(webhook="x", event="evt_1", next_attempt_at=later, created_at=clock.now()).execute(db)
        Lane.insert(webhook="x", due_at=later, open_at=later).execute(db)
    written(file, x=ENTRY | {"enabled": False}, y=ENTRY)
    assert counts(import_file(db, file)) == (0, 1, 1, 0)
    webhook = row(db)
    assert (webhook["enabled"], webhook["disabled_reason"]) == (False, "disabled in the imported file")
    assert webhook["disabled_at"] == webhook["updated_at"]
    with db.connection_context():
        assert Lane.get().due_at <= clock.now()
    change(db, failing_since=clock.now())
    written(file, x=ENTRY, y=ENTRY)
    assert counts(import_file(db, file)) == (0, 1, 1, 0)
    webhook = row(db)
    assert webhook["enabled"] is True
    assert (webhook["disabled_at"], webhook["disabled_reason"], webhook["failing_since"]) == (None, None, None)


def test_a_secret_of_the_file_is_taken_at_once_without_an_overlap(
    db: Database, manager: WebhookManager, file: Path
) -> None:
    import_file(db, file)
    manager.rotate("x", SECRET, 3600)
    change(db, earlier_secrets="[]")
    written(file, x=ENTRY | {"secret": NEWER}, y=ENTRY)
    import_file(db, file, overwrite=True)
    webhook = row(db)
    assert webhook["secret"] == NEWER
    overlap = ("previous_secret", "previous_secret_expires_at", "earlier_secrets")
    assert [webhook[name] for name in overlap] == [None, None, None]


def test_what_an_import_notes_holds_no_secret(db: Database, file: Path) -> None:
    import_file(db, file)
    with db.connection_context():
        notes = {row.webhook_id: json.loads(row.entry) for row in Import.select().bind(db).execute()}
    assert {name: notes["x"][name] for name in ("url", "events", "team", "enabled")} == {
        name: ENTRY[name] for name in ("url", "events", "team", "enabled")
    }
    assert FILED not in json.dumps(notes)
    assert notes["x"]["secret"] != notes["y"]["secret"]


def test_an_entry_that_leaves_fields_out_says_nothing_of_them(
    db: Database, manager: WebhookManager, file: Path
) -> None:
    short = {"url": "https://example.com/hook", "events": ["a"], "secret": FILED}
    written(file, x=short)
    assert counts(import_file(db, file)) == (1, 0, 0, 0)
    manager.update("x", {"enabled": False, "team": "ne"})
    assert counts(import_file(db, file)) == (0, 0, 1, 0)
    written(file, x=short | {"team": None, "enabled": True})
    assert counts(import_file(db, file)) == (0, 0, 1, 0)
    written(file, x=short | {"team": "buf", "enabled": True})
    assert counts(import_file(db, file)) == (0, 0, 1, 1)
    assert manager.get("x")["team"] == "ne"


@pytest.mark.parametrize("team", [None, "", 'a "quoted" \\ team', "größer 🏈\x1b"])
@pytest.mark.parametrize("enabled", [True, False])
def test_the_text_of_a_note_is_its_json(team: str | None, enabled: bool) -> None:
    row: dict[str, Any] = {
        "webhook_id": "x",
        "url": 'https://example.com/"\u2028',
        "events": json.dumps(["ä", '"']),
        "event_types": ["ä", '"'],
        "secret": SECRET,
        "team": team,
        "created_at": "2025-10-19T17:00:05.123456Z",
        "enabled": enabled,
    }
    assert imports.note_text(row) == json.dumps(imports.note_of(row))


def test_ids_of_strangers_do_not_drive_the_terminal(place: Place, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\u202eid"
    shown = r"\x1b]0;owned\x07\x1b[2J\u202eid"
    file = tmp_path / "webhooks.json"
    file.write_text(json.dumps({evil: ENTRY | {"url": "http://127.0.0.1/"}, evil + "2": ENTRY | {"colour": 1}}))
    refused = manage(place, "import", str(file))
    assert f"  {shown}2: colour: unknown field" in refused.stderr
    taken = manage(place, "import", str(file), "--skip-invalid")
    assert f"  {shown}: it will not be delivered to" in taken.stderr
    assert "\x1b" not in refused.stderr + taken.stderr + taken.stdout


def test_the_command_lists_conflicts_and_overwrites_when_told(place: Place, db: Database, file: Path) -> None:
    assert manage(place, "import", str(file)).returncode == 0
    WebhookManager(db=db).update("x", {"team": "ours"})
    written(file, x=ENTRY | {"team": "theirs"}, y=ENTRY)
    done = manage(place, "import", str(file))
    assert done.returncode == 0
    assert "  x: team: changed both here and in the file: our value is kept\n" in done.stderr
    assert "imported: 0 new, 0 updated, 2 unchanged, 0 invalid, 1 with conflicts\n" in done.stdout
    assert row(db)["team"] == "ours"
    done = manage(place, "import", str(file), "--overwrite")
    assert "imported: 0 new, 1 updated, 1 unchanged, 0 invalid, 1 with conflicts\n" in done.stdout
    assert row(db)["team"] == "theirs"


def test_a_second_import_waits_for_the_first_and_finds_nothing_new(place: Place, db: Database, file: Path) -> None:
    holds, goes_on = threading.Event(), threading.Event()

    def hold(what: str, done: int, total: int) -> None:
        if what == "written":
            holds.set()
            assert goes_on.wait(20)

    with ThreadPoolExecutor() as threads:
        first = threads.submit(import_file, db, file, progress=hold)
        assert holds.wait(20)
        second = threads.submit(import_file, db, file)
        if is_postgres(db):
            wait_for_a_waiter(place.url)
        goes_on.set()
        assert first.result(20).new > 0
        report = second.result(20)
    assert (report.new, report.unchanged) == (0, first.result().new)
