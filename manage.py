"""The command line: migrate, import, export. `python manage.py COMMAND --help` tells each one's options."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from peewee import Database

import models
import settings
from hookline import schema, transfer
from hookline.errors import HooklineError, Invalid
from hookline.storage import open_database

SHOWN_PROBLEMS = 1000
CACHE = -256 * 1024  # KiB: a migration or an import writes more pages than the service keeps, each only once then


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Hookline's database: its schema, and the way in from and out to the replaced service's JSON file."""


def with_database(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command the database of DATABASE_URL; every error of ours becomes one clear message."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            db = open_database(settings.load().database_url, cache_size=CACHE)
            models.db.initialize(db)
            command(db, *args, **kwargs)
        except settings.BadSetting as exc:
            raise click.ClickException(str(exc)) from exc
        except HooklineError as exc:
            show_problems(exc)
            raise click.ClickException(str(exc)) from exc

    return run


def show_problems(exc: HooklineError) -> None:
    problems = exc.problems if isinstance(exc, Invalid) else []
    for problem in problems[:SHOWN_PROBLEMS]:
        click.echo(f"  {problem}", err=True)
    if len(problems) > SHOWN_PROBLEMS:
        click.echo(f"  ... and {len(problems) - SHOWN_PROBLEMS} more", err=True)


@main.group()
def migrate() -> None:
    """Bring the database's schema up to date, or back."""


@migrate.command()
@click.argument("target", required=False)
@with_database
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
@with_database
def import_command(db: Database, file: Path, dry_run: bool, skip_invalid: bool) -> None:
    """Import the replaced service's webhooks from FILE (its webhooks.json), after a backup beside it.

    All or nothing, and safe to run again: entries that changed in the file are updated, the others left alone.
    """
    schema.require_current(db)
    gc.disable()  # a short process that keeps all it reads: collecting it again and again is a third of the time
    with progress_bar() as progress:
        report = transfer.import_file(db, file, dry_run=dry_run, skip_invalid=skip_invalid, progress=progress)
    show_problems(Invalid("", report.problems))
    if report.backup is not None:
        click.echo(f"backup: {report.backup}")
    click.echo(
        f"{'would import' if dry_run else 'imported'}: {report.new} new, {report.updated} updated, "
        f"{report.unchanged} unchanged, {report.invalid} invalid"
    )


@main.command("export")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@with_database
def export_command(db: Database, file: Path) -> None:
    """Write all webhooks, secrets included, to FILE in the replaced service's form; FILE is replaced whole."""
    schema.require_current(db)
    click.echo(f"exported: {transfer.export_file(db, file)} webhooks to {file}")


@contextmanager
def progress_bar() -> Iterator[transfer.Progress]:
    """A bar on the terminal for each stage of a long file; nothing where there is no terminal."""
    bars: dict[str, Any] = {}

    def advance(what: str, done: int, total: int) -> None:
        if total < transfer.BATCH:
            return
        if what not in bars:
            bars[what] = click.progressbar(length=total, label=what, file=sys.stderr)
        bars[what].update(done - bars[what].pos)
        if done >= total:
            bars[what].render_finish()

    yield advance


if __name__ == "__main__":
    main()
