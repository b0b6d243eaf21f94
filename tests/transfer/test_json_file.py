"""Import and export: nothing lost, nothing changed twice, nothing guessed."""

from __future__ import annotations

import json
import stat
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peewee import Database

from hookline import WebhookManager
from hookline.errors import Invalid, Unavailable
from hookline.store.open import open_database
from hookline.transfer.json_file import Report, export_file, import_file
from tests.conftest import DATA, manage, only_postgres, only_sqlite
from tests.databases import Place

SECRET = "a-secret-that-no-one-may-see"
ENTRY: dict[str, Any] = {
    "url": "http://example.com/hook",
    "events": ["a"],
    "secret": SECRET,
    "team": None,
    "created_at": "2025-10-19T17:00:05.123456",
    "total_calls": 3,
    "failed_calls": 1,
    "last_success": "2025-10-19T17:00:05",
    "last_failure": None,
    "enabled": False,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    copy = tmp_path / "webhooks.json"
    copy.write_bytes((DATA / "webhooks.json").read_bytes())
    return copy


def counts(report: Report) -> tuple[int, int, int, int]:
    return report.new, report.updated, report.unchanged, report.invalid


def stored(db: Database, sql: str = "SELECT * FROM webhooks ORDER BY webhook_id") -> list[Any]:
    with db.connection_context():
        return list(db.execute_sql(sql).fetchall())


def test_the_way_in_and_back_gives_the_same_bytes(db: Database, file: Path) -> None:
    before = file.read_bytes()
    report = import_file(db, file)
    assert counts(report) == (26, 0, 0, 0)
    assert report.backup == file.with_name("webhooks.json.backup")
    assert report.backup.read_bytes() == before
    assert export_file(db, file) == 26
    assert file.read_bytes() == before
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_importing_again_changes_nothing(db: Database, file: Path) -> None:
    import_file(db, file)
    before = stored(db), stored(db, "SELECT * FROM subscriptions")
    assert counts(import_file(db, file)) == (0, 0, 26, 0)
    assert (stored(db), stored(db, "SELECT * FROM subscriptions")) == before
    assert len(list(file.parent.glob("*.backup*"))) == 1


def test_an_entry_that_changed_in_the_file_is_updated(db: Database, file: Path) -> None:
    import_file(db, file)
    document = json.loads(file.read_text())
    first, second, *_ = document
    document[first] |= {"team": None, "events": ["another"]}
    document[second]["enabled"] = False
    file.write_text(json.dumps(document))
    assert counts(import_file(db, file)) == (0, 2, 24, 0)
    assert stored(db, f"SELECT event_type, team FROM subscriptions WHERE webhook_id = '{first}'") == [("another", "")]
    manager = WebhookManager(db=db)
    assert manager.get(first)["team"] is None
    assert not manager.get(second)["enabled"]


def test_an_older_different_backup_is_never_overwritten(db: Database, file: Path) -> None:
    older = file.with_name("webhooks.json.backup")
    older.write_text("older")
    assert import_file(db, file).backup == file.with_name("webhooks.json.backup.1")
    assert older.read_text() == "older"
    assert file.with_name("webhooks.json.backup.1").read_bytes() == file.read_bytes()


def test_a_dry_run_gives_the_same_report_and_writes_nothing(db: Database, file: Path) -> None:
    assert counts(import_file(db, file, dry_run=True)) == (26, 0, 0, 0)
    assert stored(db) == []
    assert not list(file.parent.glob("*.backup*"))


WRONG: list[tuple[str, Any, str]] = [
    ("url", None, "x: url"),
    ("url", "not a url", "x: url"),
    ("url", "http://example.com/\0", "x: url"),
    ("events", "a", "x: events"),
    ("events", [1], "x: events"),
    ("events", ["a\ud800"], "x: events"),
    ("secret", 5, "x: secret"),
    ("secret", "", "x: secret"),
    ("secret", SECRET + "\0", "x: secret"),
    ("team", 5, "x: team"),
    ("team", "\0", "x: team"),
    ("team", "a" * 201, "x: team: more than 200 characters"),
    ("events", ["a" * 201], "x: events: one has more than 200 characters"),
    ("created_at", "yesterday", "x: created_at"),
    ("created_at", 5, "x: created_at"),
    ("last_success", "2025-13-01T00:00:00", "x: last_success"),
    ("last_failure", [], "x: last_failure"),
    ("total_calls", -1, "x: total_calls"),
    ("total_calls", 2**63, "x: total_calls"),
    ("failed_calls", True, "x: failed_calls"),
    ("failed_calls", None, "x: failed_calls"),
    ("enabled", 1, "x: enabled"),
    ("colour", "red", "x: colour"),
]


@pytest.mark.parametrize(("name", "value", "problem"), WRONG)
def test_a_wrong_field_is_named_and_nothing_is_stored(
    db: Database, file: Path, name: str, value: Any, problem: str
) -> None:
    file.write_text(json.dumps({"fine": ENTRY, "x": ENTRY | {name: value}}))
    with pytest.raises(Invalid) as caught:
        import_file(db, file)
    assert len(caught.value.problems) == 1
    assert problem in caught.value.problems[0]
    assert SECRET not in str(caught.value.problems)
    assert stored(db) == []
    report = import_file(db, file, skip_invalid=True)
    assert counts(report) == (1, 0, 0, 1)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "line 1"),
        (b"nope", "line 1"),
        (b'{"x": {"url": "http', "line 1"),
        (b"3", "object"),
        (b"\xff", "UTF-8"),
        (b'{"x": NaN}', "NaN"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_a_file_of_another_form_is_refused_whole(db: Database, file: Path, content: bytes, problem: str) -> None:
    file.write_bytes(content)
    for skip_invalid in (False, True):
        with pytest.raises(Invalid, match=problem):
            import_file(db, file, skip_invalid=skip_invalid)
    assert stored(db) == []
    assert not list(file.parent.glob("*.backup*"))


def test_duplicate_keys_are_refused_at_both_levels(db: Database, file: Path) -> None:
    entry = json.dumps(ENTRY)
    twice = entry.replace('"team": null', '"team": null, "team": "ne"')
    file.write_text(f'{{"x": {entry}, "x": {entry}, "y": {twice}, "z": {entry}, "w": []}}')
    with pytest.raises(Invalid) as caught:
        import_file(db, file)
    assert caught.value.problems == [
        "x: the id comes more than once",
        "y: team: comes more than once",
        "w: not an object",
    ]
    assert counts(import_file(db, file, skip_invalid=True)) == (1, 0, 0, 3)


def test_the_older_list_form_is_read(db: Database, file: Path) -> None:
    old = {
        "id": "x",
        "url": "http://example.com/",
        "event_types": ["a"],
        "secret": SECRET,
        "active": False,
        "success_count": 5,
        "failure_count": 2,
        "created_at": "2024-01-01T00:00:00",
    }
    file.write_text(json.dumps([old, old | {"id": "y", "active": True}]))
    assert counts(import_file(db, file)) == (2, 0, 0, 0)
    shown = WebhookManager(db=db).webhooks["x"]
    assert (shown["enabled"], shown["total_calls"], shown["failed_calls"], shown["events"]) == (False, 5, 2, ["a"])
    file.write_text(json.dumps([old, old, {"url": 1}, 5]))
    with pytest.raises(Invalid) as caught:
        import_file(db, file)
    assert len(caught.value.problems) == 4


@only_postgres
def test_an_import_that_meets_a_lock_says_so_and_changes_nothing(place: Place, file: Path) -> None:
    assert manage(place, "import", str(file)).returncode == 0
    document = json.loads(file.read_text())
    file.write_text(json.dumps({name: entry | {"team": "another"} for name, entry in document.items()}))
    other = open_database(place.url)
    with other.connection_context(), other.atomic():
        other.execute_sql("SELECT 1 FROM webhooks FOR NO KEY UPDATE")
        done = manage(place, "import", str(file))
    other.close_all()  # type: ignore[attr-defined]
    assert (done.returncode, done.stderr) == (1, "Error: the database is busy; nothing was stored, try again\n")
    assert "26 updated" in manage(place, "import", str(file)).stdout


@only_sqlite
def test_an_import_that_fails_while_writing_stores_nothing(db: Database, file: Path) -> None:
    with db.connection_context():
        pages = db.execute_sql("PRAGMA page_count").fetchone()[0]
    small = open_database(f"sqlite:///{db.database}", pragmas={"max_page_count": pages + 1})
    file.write_text(json.dumps({f"id-{n}": ENTRY for n in range(500)}))
    with pytest.raises(Unavailable, match="disk is full"):
        import_file(small, file)
    small.close_all()  # type: ignore[attr-defined]
    assert stored(db) == stored(db, "SELECT * FROM subscriptions") == []


def test_the_command_reports_and_refuses_without_a_traceback(
    backend: str, empty: Place, tmp_path: Path, file: Path
) -> None:
    database = empty
    pending = manage(database, "import", str(file))
    assert (pending.returncode, "migrate up" in pending.stderr) == (1, True)
    assert manage(database, "migrate", "up").returncode == 0
    dry = manage(database, "import", str(file), "--dry-run")
    assert dry.stdout == "would import: 26 new, 0 updated, 0 unchanged, 0 invalid\n"
    assert "imported: 26 new" in manage(database, "import", str(file)).stdout
    assert "exported: 26" in manage(database, "export", str(tmp_path / "out.json")).stdout
    file.write_text(json.dumps({"x": ENTRY | {"url": 5, "team": 5}}))
    refused = manage(database, "import", str(file))
    assert refused.returncode == 1
    assert "x: url" in refused.stderr
    assert "x: team" in refused.stderr
    for path in (tmp_path / "missing.json", tmp_path / "no folder" / "out.json"):
        for command in ("import", "export"):
            done = manage(database, command, str(path))
            assert "Traceback" not in done.stderr
            assert done.returncode == (0 if (command, path.name) == ("export", "missing.json") else 1)
            path.unlink(missing_ok=True)


text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
paths = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
times = st.datetimes(min_value=datetime(1970, 1, 1)).map(datetime.isoformat)
entries = st.fixed_dictionaries(
    {
        "url": paths.map(lambda path: "https://example.com/" + "".join(path.split())),
        "events": st.lists(text, max_size=4),
        "secret": text.filter(bool),
        "team": st.none() | text,
        "created_at": times,
        "total_calls": st.integers(0, 2**63 - 1),
        "failed_calls": st.integers(0, 100),
        "last_success": st.none() | times,
        "last_failure": st.none() | times,
        "enabled": st.booleans(),
    }
)
ids = text.filter(lambda webhook_id: webhook_id and "/" not in webhook_id)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(ids, entries, max_size=5))
def test_import_then_export_gives_back_the_same_content(db: Database, document: dict[str, Any]) -> None:
    with db.connection_context():
        db.execute_sql("DELETE FROM webhooks")
        db.execute_sql("DELETE FROM imports")
    with tempfile.TemporaryDirectory() as folder:
        file, back = Path(folder) / "webhooks.json", Path(folder) / "back.json"
        file.write_text(json.dumps(document))
        import_file(db, file)
        export_file(db, back)
        assert json.loads(back.read_text()) == document
        assert counts(import_file(db, back)) == (0, 0, len(document), 0)
