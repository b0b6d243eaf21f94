"""`copy`: what it prints, what it refuses, and no secret on the screen."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from hookline import WebhookManager
from hookline.transfer import rows
from tests import databases as places
from tests.conftest import DATA, SECRET, manage
from tests.databases import Place, execute
from tests.transfer.copying import fill, opened, source_and_target


def test_json_to_sqlite_to_postgres_and_back_to_json_is_the_same(tmp_path: Path) -> None:
    with source_and_target("sqlite", "postgres", tmp_path, empty=True) as (source, target):
        file, back = tmp_path / "webhooks.json", tmp_path / "back.json"
        file.write_bytes((DATA / "webhooks.json").read_bytes())
        assert manage(source, "import", str(file)).returncode == 0
        done = manage(source, "copy", "--from", source.url, "--to", target.url)
        assert (done.returncode, done.stderr) == (0, "")
        assert "to do: migrate the target, which has none of our tables, and copy" in done.stdout
        assert done.stdout.count("  same\n") == len(rows.TABLES)
        assert manage(target, "export", str(back)).returncode == 0
        assert json.loads(back.read_text()) == json.loads(file.read_text())
        assert "your-secure-secret" not in done.stdout


@pytest.mark.parametrize("backend", places.BACKENDS)
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path: Path, backend: str) -> None:
    with source_and_target("sqlite", backend, tmp_path, empty=True) as (source, target):
        with opened(source) as (db,):
            fill(db)
        if backend == "sqlite":
            target.file.unlink()
        done = manage(source, "copy", "--from", source.url, "--to", target.url, "--dry-run")
        assert done.returncode == 0, done.stderr
        assert "webhooks                   9 rows" in done.stdout
        assert "copy these" in done.stdout
        if backend == "sqlite":
            assert list(target.folder.iterdir()) == []
        else:
            assert execute(target.url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(0,)]


def test_a_database_is_never_copied_into_itself(tmp_path: Path) -> None:
    with source_and_target("sqlite", "postgres", tmp_path) as (sqlite, postgres), opened(sqlite, postgres) as dbs:
        for db in dbs:
            WebhookManager(db=db).register("http://example.com/", ["a"], SECRET)
        os.link(sqlite.file, tmp_path / "link.db")
        os.symlink(sqlite.file, tmp_path / "symlink.db")
        others = [(sqlite.url, f"sqlite:///{tmp_path}/{name}.db") for name in ("link", "symlink")]
        alias = postgres.url.replace("127.0.0.1", "localhost")
        for source, target in ((sqlite.url, sqlite.url), *others, (postgres.url, postgres.url), (postgres.url, alias)):
            for more in ((), ("--dry-run",)):
                done = manage(sqlite, "copy", "--from", source, "--to", target, "--overwrite", *more)
                assert done.returncode == 1
                assert "same database" in done.stderr
                assert "Traceback" not in done.stderr
        assert [len(WebhookManager(db=db).webhooks) for db in dbs] == [1, 1]


def test_a_source_that_is_not_migrated_is_named(tmp_path: Path) -> None:
    with source_and_target("sqlite", "sqlite", tmp_path) as (source, target):
        source.file.write_bytes((DATA / "webhooks.db").read_bytes())
        done = manage(target, "copy", "--from", source.url, "--to", target.url, "--dry-run")
        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        assert "--from cannot be read: the database needs migrating" in done.stderr


def test_wrong_urls_are_one_line_without_the_password(tmp_path: Path) -> None:
    place = Place(f"sqlite:///{tmp_path}/webhooks.db", tmp_path)
    (tmp_path / "there.db").write_bytes(places.migrated_file())
    there = f"sqlite:///{tmp_path}/there.db"
    wrong: list[tuple[str, str, str]] = [
        ("mysql://user:hush@host/x", there, "database URL must be like"),
        (place.url, there, "no file at --from"),
        (there, "postgresql://user:hush@127.0.0.1:1/x", "cannot be reached"),
        (there, "postgresql://user:hush@[/x", "not a PostgreSQL URL"),
    ]
    for source, target, reason in wrong:
        done: Any = manage(place, "copy", "--from", source, "--to", target)
        assert done.returncode == 1
        assert reason in done.stderr
        assert "hush" not in done.stderr + done.stdout
        assert "Traceback" not in done.stderr
    assert not place.file.exists()


def test_an_id_in_an_error_does_not_drive_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with places.migrated("sqlite", tmp_path / "a") as source, places.migrated("sqlite", tmp_path / "b") as target:
        lax = sqlite3.connect(source.file)
        with lax:
            lax.execute(
                "INSERT INTO webhooks (webhook_id, url, events, secret, created_at) "
                "VALUES (char(27) || '[2J', 'http://example.com/', '[]', 's', 'never')"
            )
        lax.close()
        failed = manage(source, "copy", "--from", source.url, "--to", target.url)
        assert r"webhooks \x1b[2J: created_at is not a time" in failed.stderr
        assert "\x1b" not in failed.stderr + failed.stdout
