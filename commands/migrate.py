"""`migrate`: the database's schema, up to date or back."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

import click

from commands.database import with_database

if TYPE_CHECKING:
    from peewee import Database


@click.group()
def migrate() -> None:
    """Bring the database's schema up to date, or back."""


@migrate.command()
@click.argument("target", required=False)
@functools.partial(with_database, create=True)
def up(db: Database, target: str | None) -> None:
    """Apply what is pending, through TARGET if given. Safe while the service runs."""
    from hookline.store import schema

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
    from hookline.store import schema

    names = schema.down(db, target)
    for name in names:
        click.echo(f"reverted {name}")
    if not names:
        click.echo("nothing to revert")


@migrate.command()
@with_database
def status(db: Database) -> None:
    """List the migrations, applied or pending."""
    from hookline.store import schema

    for name, applied in schema.status(db):
        click.echo(f"{name}  {applied:applied %Y-%m-%d %H:%M:%S}" if applied else f"{name}  pending")


@migrate.command()
@with_database
def diff(db: Database) -> None:
    """Compare the database with the models; exits 1 if they differ."""
    from hookline.store import schema

    differences = schema.diff(db)
    click.echo(differences or "the database matches the models")
    sys.exit(1 if differences else 0)


@migrate.command()
@click.argument("name")
@with_database
def create(db: Database, name: str) -> None:
    """Write an empty migration script called NAME."""
    from hookline.store import schema

    click.echo(schema.create(db, name))
