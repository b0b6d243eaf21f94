"""`hookline.connect`: a program's database, by its URL or as Peewee's own object."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peewee import CharField, Database, DatabaseProxy, Model, PostgresqlDatabase, SqliteDatabase

import hookline
import models
from hookline.errors import Conflict, Invalid, NotFound, Unavailable
from tests.conftest import ROOT, SECRET
from tests.databases import Place

FOREIGN_KEYS = {"foreign_keys": 1}


@pytest.fixture(autouse=True)
def unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    """No database is bound before, and this test's is not bound after it."""
    monkeypatch.setattr(models.db, "obj", None)


@pytest.fixture
def own(place: Place) -> Iterator[Database]:
    """A program's own object of a migrated database, as Peewee's manual makes it."""
    db: Database
    if place.url.startswith("sqlite"):
        db = SqliteDatabase(str(place.file), pragmas=FOREIGN_KEYS)
    else:
        db = PostgresqlDatabase(place.url, prefer_psycopg3=True)
    yield db
    db.close()


def event_types(db: Database) -> list[str]:
    with db.connection_context():
        return [row[0] for row in db.execute_sql("SELECT event_type FROM events ORDER BY event_id").fetchall()]


def test_migrating_is_explicit(empty: Place) -> None:
    service = hookline.connect(empty.url)
    for use in (lambda: service.publish("goal", {}), lambda: service.webhooks):
        with pytest.raises(Conflict, match=r"the database is not migrated: call \.migrate\(\)"):
            use()
    assert service.migrate()[0] == "0001_webhooks"
    assert service.migrate() == []
    assert service.publish("goal", {}).deliveries == 0
    service.db.close_all()  # type: ignore[attr-defined]


def test_publishing_on_a_database_that_is_not_migrated_says_so(empty: Place) -> None:
    service = hookline.connect(empty.url)
    if isinstance(service.db, SqliteDatabase):
        empty.file.touch()
    with pytest.raises(Unavailable, match="the database is not migrated: a table or column is missing"):
        hookline.publish("goal", {})
    service.migrate()
    with service.db.connection_context():
        service.db.execute_sql("ALTER TABLE events DROP COLUMN payload")
    with pytest.raises(Unavailable, match="the database is not migrated: a table or column is missing"):
        hookline.publish("goal", {})
    service.db.close_all()  # type: ignore[attr-defined]


def test_postgresql_without_its_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is installed with pip or runs from its tree: the former has no requirements-postgres.txt."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    needed = (ROOT / "requirements-postgres.txt").read_text().splitlines()[-1]
    with pytest.raises(Invalid, match=re.escape(f"pip install '{needed}'")):
        hookline.connect("postgresql://localhost/shop")


def test_only_migrating_makes_the_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "hooks.db"
    service = hookline.connect(f"sqlite:///{file}")
    with pytest.raises(Conflict, match="is not migrated"):
        service.publish("goal", {})
    assert not file.parent.exists()
    service.migrate()
    assert file.stat().st_mode & 0o777 == 0o600
    service.db.close_all()  # type: ignore[attr-defined]


def test_webhooks_are_managed_on_that_database(place: Place) -> None:
    service = hookline.connect(place.url)
    webhook_id = service.webhooks.register("http://example.com/", ["goal"], SECRET, team="ne")
    assert service.webhooks.update(webhook_id, {"description": "home"})["description"] == "home"
    assert service.publish("goal", {"team": "ne"}).deliveries == 1
    assert [webhook["webhook_id"] for webhook in service.webhooks.list()] == [webhook_id]
    assert service.webhooks.unregister(webhook_id)
    with pytest.raises(NotFound):
        service.webhooks.get(webhook_id)
    service.db.close_all()  # type: ignore[attr-defined]


async def test_its_manager_neither_delivers_nor_closes_the_database(own: Database) -> None:
    service = hookline.connect(own)
    with own.connection_context():
        await service.webhooks.startup()
        await service.webhooks.shutdown()
        assert not own.is_closed()


def test_an_event_is_part_of_the_callers_own_transaction(own: Database) -> None:
    class Order(Model):
        status = CharField()

        class Meta:
            database = own

    service = hookline.connect(own)
    service.webhooks.register("http://example.com/", ["*"], SECRET)
    own.create_tables([Order])
    with pytest.raises(ValueError, match="the caller"), own.atomic():
        Order.create(status="paid")
        assert service.publish("order.paid", {"id": 1}).deliveries == 1
        raise ValueError("the caller")
    assert (Order.select().count(), event_types(own)) == (0, [])
    with own.atomic():
        Order.create(status="paid")
        service.publish("order.paid", {"id": 1})
    assert (Order.select().count(), event_types(own)) == (1, ["order.paid"])


def test_publish_uses_the_database_connected_last(tmp_path: Path) -> None:
    first, last = (hookline.connect(f"sqlite:///{tmp_path}/{name}.db") for name in ("first", "last"))
    first.migrate()
    last.migrate()
    hookline.publish("goal", {})
    first.publish("kick_off", {})
    assert (event_types(first.db), event_types(last.db)) == (["kick_off"], ["goal"])
    for service in (first, last):
        service.db.close_all()  # type: ignore[attr-defined]


def test_an_idempotency_key_publishes_once(place: Place) -> None:
    service = hookline.connect(place.url)
    first = service.publish("goal", {}, idempotency_key="key")
    assert service.publish("goal", {}, idempotency_key="key") == first._replace(duplicate=True)
    service.db.close_all()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("database", "sentence"),
    [
        ("data/webhooks.db", "a database URL must be like"),
        (SqliteDatabase("unused.db", pragmas={"foreign_keys": 0}), "does not enforce foreign keys"),
        (SqliteDatabase(None), "connect takes the URL of a database, or an initialized"),
        (DatabaseProxy(), "connect takes the URL of a database, or an initialized"),
        (None, "connect takes the URL of a database, or an initialized"),
    ],
    ids=["path", "no foreign keys", "deferred", "proxy", "nothing"],
)
def test_what_cannot_be_bound_is_refused(
    database: Any, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Invalid, match=sentence):
        hookline.connect(database)
    assert models.db.obj is None
