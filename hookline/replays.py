"""Replays: deliver again what a webhook missed. Each replay is a row, which workers carry out in short steps.

A replay goes through its events in the order of time. `find` looks at the next 500 or more, outside the writer, until
it has found something; `record` makes that due and moves the cursor, if it is still where `find` saw it. So a process
that is killed loses and repeats nothing, and of two workers at the same step one changes nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import datetime
from typing import Any, NamedTuple

from peewee import Database
from uuid_utils import uuid7

from hookline import clock, deliveries, lanes
from hookline.errors import Conflict, NotFound, Unavailable
from hookline.history import Position
from hookline.missed import WANTED, Window, look, webhook_of
from hookline.store import locks, sql
from hookline.store.storage import Storage
from hookline.store.units import connected, transaction
from hookline.tables import Replay, read_time, stored_time

log = logging.getLogger("hookline")

WINDOWS_IN_A_STEP = 20  # looked at before the cursor moves, while nothing is found
AT_ONCE = 100  # replays that workers carry out in turns
POLL = 1.0  # seconds between looks for replays
BY_DISABLING = "the webhook was disabled"

Row = dict[str, Any]


class Step(NamedTuple):
    """The next step of a replay: `find` makes it, `record` carries it out."""

    replay_id: str
    webhook_id: str
    statuses: str
    cursor: str  # as it was read
    next_cursor: str
    done: bool
    window: Window


def start(db: Database, webhook_id: str, since: datetime, until: datetime | None = None, status: str = "failed") -> Row:
    """Record a replay of the events from `since` on (before `until`, at the latest now), to be carried out by workers.

    `failed`: what failed, was cancelled or was published while the webhook was disabled; `all`: also what arrived.
    Returns it. Raises NotFound, Conflict (the webhook is disabled), Unavailable.
    """
    now = clock.now()
    with transaction(db):
        if not webhook_of(db, webhook_id)["enabled"]:
            raise Conflict("the webhook is disabled: enable it first")
        replay_id = f"rpl_{uuid7()}"
        Replay.insert(
            replay_id=replay_id,
            webhook=webhook_id,
            since=since,
            until=now if until is None else min(until, now),  # so that it comes to an end
            statuses=status,
            cursor=json.dumps((stored_time(since), "")),
            created_at=now,
        ).execute(db)
        return get(db, replay_id)


def get(db: Database, replay_id: str) -> Row:
    """One replay, and how far it is: `deliveries` made due, `position` in the time of events.

    Raises NotFound, Unavailable.
    """
    with connected(db):
        rows = list(Replay.select().where(Replay.replay_id == replay_id).dicts().bind(db).execute())
    if not rows:
        raise NotFound("Replay not found")
    return _shown(rows[0])


def page(
    db: Database,
    *,
    webhook_id: str | None = None,
    state: str | None = None,
    limit: int = 50,
    before: str | None = None,
) -> list[Row]:
    """At most `limit` replays, newest first, from the one behind `before` (its id). Raises Unavailable."""
    query = Replay.select().order_by(Replay.replay_id.desc()).limit(limit)
    if webhook_id is not None:
        query = query.where(Replay.webhook == webhook_id)
    if state is not None:
        query = query.where(Replay.state == state)
    if before is not None:
        query = query.where(Replay.replay_id < before)
    with connected(db):
        return [_shown(row) for row in query.dicts().bind(db).execute()]


def cancel(db: Database, replay_id: str) -> Row:
    """End a replay where it is; what it made due stays so. Raises NotFound, Conflict (it has ended), Unavailable."""
    with transaction(db):
        if not _end(db, replay_id, deliveries.BY_REQUEST):
            raise Conflict(f"this replay is {get(db, replay_id)['state']} already")
        return get(db, replay_id)


async def carry_out(storage: Storage, poll: float = POLL) -> None:
    """Carry out the replays that run, a step of each in turn, until cancelled."""
    while True:
        if not await carry_out_steps(storage):
            await asyncio.sleep(poll)


async def carry_out_steps(storage: Storage) -> bool:
    """Carry out a step of each replay that runs, resting after each as long as it took. Did any of them go on?

    If not there is none, the database cannot be used, or other workers are at the same steps.
    """
    try:
        ids, went_on = await storage.read(running), False
    except Unavailable:  # the worker logs it
        return False
    except Exception:  # whatever it is, the next round comes
        log.exception("looking for replays failed")
        return False
    loop = asyncio.get_running_loop()
    for replay_id in ids:
        began = loop.time()
        try:
            step = await storage.scan(find, replay_id)
            if step is not None:
                went_on |= await storage.write(record, step)
        except Unavailable as exc:
            log.warning("replay %s goes on later: %s", replay_id, exc)
        except Exception:  # whatever it is, the others go on
            log.exception("a step of replay %s failed", replay_id)
        await asyncio.sleep(loop.time() - began)
    return went_on


def running(db: Database) -> list[str]:
    """The ids of the replays to carry out now, oldest first. Raises Unavailable."""
    statement = f"SELECT replay_id FROM replays WHERE state = 'running' ORDER BY replay_id LIMIT {AT_ONCE}"
    with connected(db):
        return [replay_id for (replay_id,) in db.execute_sql(statement).fetchall()]


def find(db: Database, replay_id: str) -> Step | None:
    """The next step of a replay; None if it has ended. Changes nothing. Raises Unavailable."""
    select = Replay.select().where(Replay.replay_id == replay_id, Replay.state == "running")
    with sql.reading(db):
        rows = list(select.dicts().bind(db).execute())
        return _next_step(db, rows[0]) if rows else None


def _next_step(db: Database, replay: Row) -> Step | None:
    after: Position | None = tuple(json.loads(replay["cursor"]))
    window = Window([], [], after)
    try:
        webhook = webhook_of(db, replay["webhook"])
    except NotFound:  # deleted just now, the replay with it
        return None
    for _ in range(WINDOWS_IN_A_STEP):
        assert after is not None
        window = look(db, webhook, WANTED[replay["statuses"]], after, replay["until"])
        after = window.after
        if after is None or window.missing or window.ended:
            break
    return Step(
        replay_id=replay["replay_id"],
        webhook_id=replay["webhook"],
        statuses=replay["statuses"],
        cursor=replay["cursor"],
        next_cursor=json.dumps(after or (stored_time(replay["until"]), "")),
        done=after is None,
        window=window,
    )


def record(db: Database, step: Step) -> bool:
    """Make due what a step found, and move the cursor; False if somebody else has done so, or it has ended.

    One unit of work. What has changed since the look stays as it is. If the webhook is disabled the replay is
    cancelled. Raises Unavailable.
    """
    with transaction(db):
        locks.limit_lock_waits(db)
        sql.plan_anew(db)
        locks.lock_webhooks(db, [step.webhook_id])
        select = f"SELECT enabled FROM webhooks WHERE webhook_id = {sql.param(db, 'webhook_id')}"
        webhook = db.execute_sql(select, {"webhook_id": step.webhook_id}).fetchone()
        if webhook is None:
            return False
        (enabled,) = webhook
        if not enabled:
            _end(db, step.replay_id, BY_DISABLING)
            return False
        if not _move_cursor(db, step):
            return False
        now = stored_time(clock.now())
        restarted = deliveries.restart(db, step.window.ended, WANTED[step.statuses], now)
        inserted = deliveries.insert(db, step.webhook_id, step.window.missing, now)
        if restarted or inserted:
            _count(db, step, len(restarted) + len(inserted))
    return True


def _move_cursor(db: Database, step: Step) -> bool:
    """Move the cursor, if it is where it was read; the row is ours from here on."""
    values: Row = {"cursor": step.next_cursor}
    if step.done:
        values |= {"state": "finished", "finished_at": clock.now()}
    here = (Replay.replay_id == step.replay_id, Replay.state == "running", Replay.cursor == step.cursor)
    return bool(Replay.update(values).where(*here).execute(db))


def _count(db: Database, step: Step, made: int) -> None:
    """Add what was made due to the count, and open the lane; one that rests is opened by the first step alone."""
    add = f"""
        UPDATE replays SET deliveries = deliveries + {made} WHERE replay_id = {sql.param(db, "replay_id")}
        RETURNING deliveries"""
    (total,) = db.execute_sql(add, {"replay_id": step.replay_id}).fetchone()
    lanes.open_lanes(db, [step.webhook_id], now=total == made)


def _end(db: Database, replay_id: str, reason: str) -> bool:
    values = {"state": "cancelled", "finished_at": clock.now(), "reason": reason}
    return bool(Replay.update(values).where(Replay.replay_id == replay_id, Replay.state == "running").execute(db))


def _shown(row: Row) -> Row:
    names = ("state", "since", "until", "deliveries", "created_at", "finished_at", "reason")
    position = read_time(json.loads(row["cursor"])[0])
    ids = {"replay_id": row["replay_id"], "webhook_id": row["webhook"], "status": row["statuses"]}
    return {**ids, **{name: row[name] for name in names}, "position": position}
