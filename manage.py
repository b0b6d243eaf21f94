"""The command line: schema, import and export, the worker, and tools for trying deliveries out.

`python manage.py COMMAND --help` tells each one's options.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import gc
import getpass
import json
import math
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import click
from peewee import Database, PeeweeException

import models
import settings
from hookline import clock, events, lanes, receiving, retention, signing
from hookline.errors import HooklineError, Invalid, visible
from hookline.store import notices, schema
from hookline.store.failures import UNKNOWN, reason
from hookline.store.open import open_database, require_reachable, storage_of
from hookline.transfer import databases, json_file
from hookline.transfer.imports import BATCH
from hookline.transfer.progress import Progress

SHOWN_PROBLEMS = 1000


class Commands(click.Group):
    """Whatever goes wrong is one line: file names and input may hold anything, and stdout may be full."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with in_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with in_one_line():
            return super().invoke(ctx)


@contextmanager
def in_one_line() -> Iterator[None]:
    try:
        yield
    except click.ClickException as exc:
        exc.message = visible(exc.message)  # type: ignore[misc]
        raise
    except OSError as exc:
        if exc.errno == errno.EPIPE:  # whoever read what we print has gone
            raise
        where = f"{exc.filename}: " if exc.filename else ""
        raise click.ClickException(visible(f"{where}{exc.strerror or exc}")) from exc


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Hookline's database, its worker, and tools for trying deliveries out."""


def with_database(command: Callable[..., None], create: bool = False) -> Callable[..., None]:
    """Give the command the database of DATABASE_URL."""

    @with_errors
    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        db = opened(settings.load().database_url, create)
        models.db.initialize(db)
        command(db, *args, **kwargs)

    return run


def opened(url: str, create: bool = False) -> Database:
    db = open_database(url, create=create, long_work=True)
    require_reachable(db)
    return db


def with_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Every error of ours becomes one clear message."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except settings.BadSetting as exc:
            raise click.ClickException(str(exc)) from exc
        except HooklineError as exc:
            show_problems(exc)
            cause = exc.__cause__ if str(exc) == UNKNOWN else None  # here its own words may be shown
            why = f"the database cannot be used: {reason(cause)}" if cause else str(exc)
            raise click.ClickException(why) from exc
        except PeeweeException as exc:
            raise click.ClickException(f"the database refused: {reason(exc)}") from exc

    return run


def show_problems(exc: HooklineError) -> None:
    problems = exc.problems if isinstance(exc, Invalid) else []
    for problem in problems[:SHOWN_PROBLEMS]:
        click.echo(f"  {visible(problem)}", err=True)
    if len(problems) > SHOWN_PROBLEMS:
        click.echo(f"  ... and {len(problems) - SHOWN_PROBLEMS} more", err=True)


@main.group()
def migrate() -> None:
    """Bring the database's schema up to date, or back."""


@migrate.command()
@click.argument("target", required=False)
@functools.partial(with_database, create=True)
def up(db: Database, target: str | None) -> None:
    """Apply what is pending, through TARGET if given. Safe while the service runs."""
    names = schema.up(db, target)
    for name in names:
        click.echo(f"applied {name}")
    if not names:
        click.echo("nothing to apply")


@migrate.command()
@click.argument("target", required=False)
@with_database
def down(db: Database, target: str | None) -> None:
    """Revert the newest migration, or all back through TARGET. Stop the service first."""
    names = schema.down(db, target)
    for name in names:
        click.echo(f"reverted {name}")
    if not names:
        click.echo("nothing to revert")


@migrate.command()
@with_database
def status(db: Database) -> None:
    """List the migrations, applied or pending."""
    for name, applied in schema.status(db):
        click.echo(f"{name}  {applied:applied %Y-%m-%d %H:%M:%S}" if applied else f"{name}  pending")


@migrate.command()
@with_database
def diff(db: Database) -> None:
    """Compare the database with the models; exits 1 if they differ."""
    found = schema.diff(db)
    click.echo(found or "the database matches the models")
    sys.exit(1 if found else 0)


@migrate.command()
@click.argument("name")
@with_database
def create(db: Database, name: str) -> None:
    """Write an empty migration script called NAME."""
    click.echo(schema.create(db, name))


@main.command("import")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--dry-run", is_flag=True, help="Print the report; write nothing, not even the backup.")
@click.option("--skip-invalid", is_flag=True, help="Import the valid entries of a file that has invalid ones.")
@click.option("--overwrite", is_flag=True, help="Where a field has changed both here and in FILE, take that of FILE.")
@with_database
def import_command(db: Database, file: Path, dry_run: bool, skip_invalid: bool, overwrite: bool) -> None:
    """Import the replaced service's webhooks from FILE (its webhooks.json), after a backup beside it.

    All or nothing, and safe to run again: what has changed in FILE since the last import is taken over, and what has
    changed here is kept. A field that has changed on both sides is listed, and kept unless --overwrite.
    """
    schema.require_current(db)
    gc.disable()  # a short process that keeps all it reads: collecting it again and again is a third of the time
    with progress_bar() as progress:
        report = json_file.import_file(
            db,
            file,
            dry_run=dry_run,
            skip_invalid=skip_invalid,
            overwrite=overwrite,
            allowed=settings.load().allowed_networks,
            progress=progress,
        )
    show_problems(Invalid("", report.problems))
    show_problems(Invalid("", report.warnings))
    show_problems(Invalid("", report.contested))
    if report.backup is not None:
        click.echo(f"backup: {visible(report.backup)}")
    more = f", {report.conflicts} with conflicts" if report.conflicts else ""
    more += f", {report.deleted} deleted here" if report.deleted else ""
    click.echo(
        f"{'would import' if dry_run else 'imported'}: {report.new} new, {report.updated} updated, "
        f"{report.unchanged} unchanged, {report.invalid} invalid{more}"
    )


@main.command("export")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@with_database
def export_command(db: Database, file: Path) -> None:
    """Write all webhooks, secrets included, to FILE in the replaced service's form; FILE is replaced whole."""
    schema.require_current(db)
    click.echo(f"exported: {json_file.export_file(db, file)} webhooks to {visible(file)}")


@main.command("copy")
@click.option("--from", "source_url", required=True, help="The database to read.")
@click.option("--to", "target_url", required=True, help="The database to fill, which should be empty.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")
@click.option("--overwrite", is_flag=True, help="Delete all that the target has first.")
@with_errors
def copy_command(source_url: str, target_url: str, dry_run: bool, overwrite: bool) -> None:
    """Copy everything from one database to another, such as from SQLite to PostgreSQL, and compare both.

    Stop the service first: what is written after the copy began is not in it. An interrupted copy goes on when it is
    run again.
    """
    if is_missing(source_url):
        raise Invalid(f"there is no file at --from: {Path(source_url.removeprefix('sqlite:///')).absolute()}")
    source = opened(source_url)
    target = None if is_missing(target_url) else opened(target_url)
    rows, intent = databases.plan(source, target, overwrite)
    if dry_run:
        click.echo("\n".join(f"{name:15} {number:>12,} rows" for name, number in rows.items()))
        click.echo(f"would {intent.value}, and copy these")
        return
    target = target or opened(target_url, create=True)
    click.echo(f"to do: {intent.value}, and copy {sum(rows.values()):,} rows")
    with progress_bar() as progress:
        compared = databases.copy(source, target, overwrite=overwrite, progress=progress)
    for table in compared:
        click.echo(f"{table.table:15} {table.rows:>12,} rows  {table.checksum[:16]}  same")
    click.echo("the copy is whole: set DATABASE_URL to the target, and start")


def is_missing(url: str) -> bool:
    return url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists()


@main.command()
@with_errors
def worker() -> None:
    """Deliver, until it is told to stop (SIGTERM, Ctrl-C). Any number of workers may share one database."""
    from assembly import (  # only here: the web server is not needed otherwise
        database_of,
        quiet_gc,
        running,
        start_logging,
        worker_of,
    )

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


@main.command()
@click.argument("event_type")
@click.argument("data")
@click.option("--idempotency-key", help="Publish it once, however often this is run.")
@with_database
def publish(db: Database, event_type: str, data: str, idempotency_key: str | None) -> None:
    """Publish an event: EVENT_TYPE and its DATA, a JSON object. A running service or worker delivers it."""
    schema.require_current(db)
    lanes.attach(db, lanes.outlet_without_worker(settings.load().max_payload, lambda: notices.send(db)))
    try:
        content = json.loads(data)
    except ValueError as exc:
        raise click.ClickException(f"DATA is not JSON: {exc}") from exc
    except RecursionError as exc:
        raise click.ClickException("DATA is nested too deep") from exc
    published = events.publish_one(db, events.NewEvent(event_type, content, idempotency_key))
    again = ", published before" if published.duplicate else ""
    click.echo(f"{published.event_id}: {published.deliveries} deliveries{again}")


def older_than(context: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    try:
        return settings.load().retention if text is None else settings.duration("--older-than", text)
    except settings.BadSetting as exc:
        raise click.ClickException(str(exc)) from exc


@main.command()
@click.option("--older-than", callback=older_than, help="Such as 30d; RETENTION unless given.")
@click.option("--dry-run", is_flag=True, help="Count what would go; delete nothing.")
@with_database
def purge(db: Database, older_than: float | None, dry_run: bool) -> None:
    """Delete old events with their deliveries and attempts, where all has ended. Workers do so of themselves."""
    schema.require_current(db)
    if older_than is None:
        raise click.ClickException("RETENTION is off: say --older-than")
    cutoff = clock.now() - timedelta(seconds=older_than)
    events_, deliveries = retention.count(db, cutoff)
    if not dry_run:
        with progress_bar() as progress:
            events_, deliveries = retention.purge_all(db, cutoff, lambda done: progress("purged", done, events_))
    click.echo(f"{'would purge' if dry_run else 'purged'}: {events_} events, {deliveries} deliveries")


def secret_given(context: click.Context, parameter: click.Parameter, secret: str | None) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            secret = secret or click.prompt("Secret", hide_input=True)
        except getpass.GetPassWarning as exc:  # there is no terminal to ask on
            raise click.UsageError("give the webhook's secret by WEBHOOK_SECRET or --secret") from exc
    if not signing.is_utf8(secret):
        raise click.BadParameter("it is not UTF-8.")
    return secret


secret_option = click.option(
    "--secret", envvar="WEBHOOK_SECRET", callback=secret_given, help="The webhook's secret (or WEBHOOK_SECRET)."
)


def finite(context: click.Context, parameter: click.Parameter, moment: float | None) -> float | None:
    if moment is not None and not math.isfinite(moment):
        raise click.BadParameter(f"{moment} is no time.")
    return moment


@main.command()
@click.argument("file", type=click.File("rb"), default="-")
@click.option("--header", "headers", multiple=True, help="A header that was received, as 'name: value'. Give each.")
@secret_option
@click.option("--at", type=float, callback=finite, help="When it was received, in unix seconds; now unless given.")
def verify(file: BinaryIO, headers: tuple[str, ...], secret: str, at: float | None) -> None:
    """Does the signature of a delivery hold? If not: why. FILE holds the raw body as it was received."""
    given = {name.strip(): value.strip() for name, _, value in (header.partition(":") for header in headers)}
    problem = signing.problem(given, file.read(), secret, time.time() if at is None else at)
    click.echo(f"it does not hold: {problem}" if problem else "it holds")
    sys.exit(1 if problem else 0)


@main.command()
@click.option("--port", type=click.IntRange(0, 65535), default=8006, show_default=True, help="0: any that is free.")
@click.option("--status", type=click.IntRange(200, 599), default=200, show_default=True, help="What to answer.")
@secret_option
def listen(port: int, status: int, secret: str) -> None:
    """Receive deliveries on 127.0.0.1 and print each, with whether its signature holds. For trying things out."""
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as exc:
        raise click.ClickException(f"port {port} cannot be used: {os.strerror(exc.errno or 0)}") from exc
    click.echo(f"listening on http://127.0.0.1:{listener.getsockname()[1]}; stop with Ctrl-C")
    receiving.run(listener, status, secret, click.echo)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on the terminal for each stage of a long file; nothing where there is no terminal."""
    bars: dict[str, Any] = {}

    def advance(what: str, done: int, total: int) -> None:
        if total < BATCH:
            return
        if what not in bars:
            bars[what] = click.progressbar(length=total, label=what, file=sys.stderr)
        bars[what].update(done - bars[what].pos)
        if done >= total:
            bars[what].render_finish()

    try:
        yield advance
    finally:
        for bar in bars.values():  # also after Ctrl-C or an error: it hides the cursor
            if not bar.finished:
                bar.render_finish()


if __name__ == "__main__":
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 - it may have been closed: nothing to read then
    main()
