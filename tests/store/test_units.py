"""Units of work: the errors that failures become."""

from __future__ import annotations

import pytest
from peewee import Database

from hookline import WebhookManager
from hookline.errors import Invalid, NotFound, Unavailable
from hookline.store.pool import is_postgres
from tests.conftest import SECRET, only_postgres
from tests.databases import Place
from tests.store.connections import count, end_connections


@only_postgres
def test_a_lost_commit_is_reported_as_perhaps_stored(
    place: Place, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = db.commit

    def commit_and_lose_the_answer() -> None:
        committed()
        end_connections(place)
        db.execute_sql("SELECT 1")

    monkeypatch.setattr(db, "commit", commit_and_lose_the_answer)
    with pytest.raises(Unavailable, match="it may have been stored, or not"):
        WebhookManager(db=db).register("http://example.com/", ["a"], SECRET)
    with db.connection_context():
        assert count(db) == 1


def test_values_that_cannot_be_stored_are_refused_without_being_shown(db: Database) -> None:
    manager = WebhookManager(db=db)
    for text in ("a\0b", "a\ud800b"):
        with pytest.raises(Invalid, match="description must not contain"):
            manager.register("http://example.com/", ["a"], SECRET, description=text)
    assert manager.send_event("goal", {"team": "a\0b"}).deliveries == 0
    with pytest.raises(Invalid, match="data must not contain lone surrogates"):
        manager.send_event("goal", {"team": "a\ud800b"})
    with (
        pytest.raises(Invalid, match="cannot store one of these values") if is_postgres(db) else pytest.raises(NotFound)
    ):
        manager.get("a\0b")
    webhook_id = manager.register("http://example.com/", ["a"], SECRET)
    for rate in (0, -1.0, 1e-50, 1e9):
        with pytest.raises(Invalid, match=r"rate_limit must be from 0\.0001 to 10000"):
            manager.update(webhook_id, {"rate_limit": rate})
