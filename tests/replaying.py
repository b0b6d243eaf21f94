"""Carrying out replays as a worker does, one step after the other, for tests."""

from __future__ import annotations

from datetime import datetime

from peewee import Database

from hookline import replays
from hookline.store.postgres import write_now


def carry_out(db: Database) -> int:
    """Until none runs; returns how many deliveries they have made due in all, of those that ran."""
    ids = replays.running(db)
    while running := replays.running(db):
        for replay_id in running:
            if (step := replays.find(db, replay_id)) is not None:
                write_now(db, replays.record, step)
    return sum(replays.get(db, replay_id)["deliveries"] for replay_id in ids)


def replayed(db: Database, webhook_id: str, since: datetime) -> int:
    """Ask for a replay of what failed since then and carry it out; returns how many deliveries it made due."""
    replays.start(db, webhook_id, since)
    return carry_out(db)
