"""`import`, `export` and `copy`: webhooks from and to the replaced service's file, and whole databases."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

import click

import settings
from commands.database import opened, with_database, with_errors
from commands.terminal import progress_bar, show_problems
from hookline.errors import Invalid, visible

if TYPE_CHECKING:
    from peewee import Database

    from hookline.transfer.json_file import Report


@click.command("import")
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
    from hookline.store import schema
    from hookline.transfer import json_file

    schema.require_current(db)
    gc.disable()  # a short process that keeps all it reads: collecting it over and over takes a third of the time
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
    show_report(report, "would import" if dry_run else "imported")


def show_report(report: Report, verb: str) -> None:
    for problems in (report.problems, report.warnings, report.contested):
        show_problems(problems)
    if report.backup is not None:
        click.echo(f"backup: {visible(report.backup)}")
    more = f", {report.conflicts} with conflicts" if report.conflicts else ""
    more += f", {report.deleted} deleted here" if report.deleted else ""
    click.echo(
        f"{verb}: {report.new} new, {report.updated} updated, "
        f"{report.unchanged} unchanged, {report.invalid} invalid{more}"
    )


@click.command("export")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@with_database
def export_command(db: Database, file: Path) -> None:
    """Write all webhooks, secrets included, to FILE in the replaced service's form; FILE is replaced whole."""
    from hookline.store import schema
    from hookline.transfer import json_file

    schema.require_current(db)
    click.echo(f"exported: {json_file.export_file(db, file)} webhooks to {visible(file)}")


@click.command("copy")
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
    from hookline.transfer import databases

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
