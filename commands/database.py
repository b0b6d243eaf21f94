"""The database of a command: opened for it, with clear messages for what goes wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

import settings
from commands.terminal import show_problems

if TYPE_CHECKING:
    from peewee import Database


def with_database(command: Callable[..., None], create: bool = False) -> Callable[..., None]:
    """Give the command the database of DATABASE_URL."""

    @with_errors
    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        import models

        db = opened(settings.load().database_url, create)
        models.db.initialize(db)
        command(db, *args, **kwargs)

    return run


def opened(url: str, create: bool = False) -> Database:
    """Open a database until the command ends: its last connection removes SQLite's files beside it."""
    from hookline.store.open import open_database, require_reachable

    db = open_database(url, create=create, long_work=True)
    click.get_current_context().call_on_close(db.close_all)  # type: ignore[attr-defined]
    require_reachable(db)
    return db


def with_errors(command: Callable[..., None]) -> Callable[..., None]:
    """End the command with one clear message for every error of ours."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from peewee import PeeweeException

        from hookline.errors import HooklineError, Invalid
        from hookline.store.failures import UNKNOWN, reason

        try:
            command(*args, **kwargs)
        except settings.BadSetting as exc:
            raise click.ClickException(str(exc)) from exc
        except HooklineError as exc:
            if isinstance(exc, Invalid):
                show_problems(exc.problems)
            cause = exc.__cause__ if str(exc) == UNKNOWN else None  # its own words may be shown to an operator
            why = f"the database cannot be used: {reason(cause)}" if cause else str(exc)
            raise click.ClickException(why) from exc
        except PeeweeException as exc:
            raise click.ClickException(f"the database refused: {reason(exc)}") from exc

    return run
