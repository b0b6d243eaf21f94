"""Databases opened by their URL: what a connection is set to, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from peewee import Database

from hookline.errors import Invalid
from hookline.store.open import open_database, require_reachable
from hookline.store.storage import Storage
from tests.conftest import only_postgres, only_sqlite
from tests.databases import Place, Postgres, execute, named


@only_sqlite
async def test_every_pooled_connection_is_durable_and_checked(db: Database, storage: Storage) -> None:
    def pragmas(db: Database) -> dict[str, Any]:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        return {name: db.execute_sql(f"PRAGMA {name}").fetchone()[0] for name in names}

    expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
    for found in (await storage.read(pragmas), await storage.scan(pragmas), await storage.write(pragmas)):
        assert found == expected


@pytest.mark.postgres
def test_connections_to_postgres_are_set_up_against_the_servers_defaults() -> None:
    defaults = {
        "synchronous_commit": "off",
        "timezone": "Asia/Tokyo",
        "datestyle": "German",
        "default_transaction_isolation": "serializable",
        "client_encoding": "latin1",
    }
    server = Postgres(("fsync=off", *(f"{name}={value}" for name, value in defaults.items()))).start()
    try:
        db = open_database(server.url)
        with db.connection_context():
            names = [*defaults, "statement_timeout", "lock_timeout", "application_name"]
            found = {name: db.execute_sql(f"SHOW {name}").fetchone()[0] for name in names}
        db.close_all()  # type: ignore[attr-defined]
        assert found == {
            "synchronous_commit": "on",
            "timezone": "UTC",
            "datestyle": "ISO, DMY",
            "default_transaction_isolation": "read committed",
            "client_encoding": "UTF8",
            "statement_timeout": "30s",
            "lock_timeout": "10s",
            "application_name": "hookline",
        }
        execute(server.url, "CREATE DATABASE ascii ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
        ascii_only = open_database(named(server.url, "ascii"))
        with pytest.raises(Invalid, match="encoding is SQL_ASCII"):
            require_reachable(ascii_only)
        ascii_only.close_all()  # type: ignore[attr-defined]
    finally:
        server.stop()


@only_postgres
def test_parts_left_out_of_a_url_come_from_libpqs_environment(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    name = place.url.rpartition("/")[2].partition("?")[0]
    monkeypatch.setenv("PGDATABASE", name)
    db = open_database(named(place.url, "").replace("/?", "?"))
    with db.connection_context():
        assert db.execute_sql("SELECT current_database()").fetchone() == (name,)
    db.close_all()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:hu@sh@127.0.0.1/name",
        "postgresql://user:hu/sh@127.0.0.1/name",
        "postgresql://user:hu%sh@127.0.0.1/name",
    ],
)
def test_a_password_that_is_not_percent_encoded_is_refused_and_not_printed(url: str) -> None:
    with pytest.raises(Invalid, match=r"percent-encoded|not a PostgreSQL URL") as refused:
        require_reachable(open_database(url))
    assert "sh" not in str(refused.value).replace("such", "")
