"""`worker`, `publish` and `purge`: deliver events, publish one, delete old ones."""

from __future__ import annotations

import json
import signal
from datetime import timedelta
from typing import TYPE_CHECKING

import click

import settings
from commands.database import with_database, with_errors
from commands.terminal import progress_bar

if TYPE_CHECKING:
    from peewee import Database


@click.command()
@with_errors
def worker() -> None:
    """Deliver, until it is told to stop (SIGTERM, Ctrl-C). Any number of workers may share one database."""
    import asyncio

    from assembly import database_of, quiet_gc, running, start_logging, worker_of
    from hookline.store.open import storage_of

    config = settings.load()
    db = database_of(config)
    start_logging(config.log_level)

    async def work() -> None:
        stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        storage = storage_of(db, config.database_pool)
        async with running(storage, worker_of(config, storage)):
            quiet_gc()
            click.echo("Hookline delivers")
            await stopped.wait()

    asyncio.run(work())


@click.command()
@click.argument("event_type")
@click.argument("data")
@click.option("--idempotency-key", help="Publish it once, however often this is run.")
@with_database
def publish(db: Database, event_type: str, data: str, idempotency_key: str | None) -> None:
    """Publish an event: EVENT_TYPE and its DATA, a JSON object. A running service or worker delivers it."""
    from hookline import events, lanes
    from hookline.store import notices, schema

    schema.require_current(db)
    lanes.attach(db, lanes.outlet_without_worker(settings.load().max_payload, lambda: notices.send(db)))
    try:
        content = json.loads(data)
    except ValueError as exc:
        raise click.ClickException(f"DATA is not JSON: {exc}") from exc
    except RecursionError as exc:
        raise click.ClickException("DATA is nested too deep") from exc
    published = events.publish_one(db, events.NewEvent(event_type, content, idempotency_key))
    before = ", published before" if published.duplicate else ""
    click.echo(f"{published.event_id}: {published.deliveries} deliveries{before}")


def older_than(context: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    """Seconds of the option, or of RETENTION without it; None if that is off."""
    try:
        return settings.load().retention if text is None else settings.duration("--older-than", text)
    except settings.BadSetting as exc:
        raise click.ClickException(str(exc)) from exc


@click.command()
@click.option("--older-than", callback=older_than, help="Such as 30d; RETENTION unless given.")
@click.option("--dry-run", is_flag=True, help="Count what would go; delete nothing.")
@with_database
def purge(db: Database, older_than: float | None, dry_run: bool) -> None:
    """Delete old events with their deliveries and attempts, where all has ended. Workers do so of themselves."""
    from hookline import clock, retention
    from hookline.store import schema

    schema.require_current(db)
    if older_than is None:
        raise click.ClickException("RETENTION is off: say --older-than")
    cutoff = clock.now() - timedelta(seconds=older_than)
    events, deliveries = total, _ = retention.count(db, cutoff)
    if not dry_run:
        with progress_bar() as progress:
            progress("purged", 0, total)  # the first batch may wait for a lock
            events, deliveries = retention.purge_all(db, cutoff, lambda done: progress("purged", done, total))
    click.echo(f"{'would purge' if dry_run else 'purged'}: {events} events, {deliveries} deliveries")
