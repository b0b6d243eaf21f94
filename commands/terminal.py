"""Output on the terminal: errors in one line each, lists of problems, progress bars."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from hookline.errors import visible
from hookline.transfer.progress import Progress

SHOWN_PROBLEMS = 1000
SHORT = 2000  # rows: fewer are done before a bar could be read


class Commands(click.Group):
    """Commands that fail with one line: file names and input may hold anything, and stdout may be full."""

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
        if exc.errno == errno.EPIPE:  # nobody reads the output any more
            raise
        where = f"{exc.filename}: " if exc.filename else ""
        raise click.ClickException(visible(f"{where}{exc.strerror or exc}")) from exc


def show_problems(problems: Sequence[str]) -> None:
    for problem in problems[:SHOWN_PROBLEMS]:
        click.echo(f"  {visible(problem)}", err=True)
    if len(problems) > SHOWN_PROBLEMS:
        click.echo(f"  ... and {len(problems) - SHOWN_PROBLEMS} more", err=True)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on the terminal for each stage of long work; nothing where there is no terminal."""
    bars: dict[str, Any] = {}

    def advance(what: str, done: int, total: int) -> None:
        if total < SHORT:
            return
        if what not in bars:
            bars[what] = click.progressbar(length=total, label=what, file=sys.stderr)
            bars[what].render_progress()
        bars[what].update(done - bars[what].pos)
        if done >= total:
            bars[what].render_finish()

    try:
        yield advance
    finally:
        for bar in bars.values():  # also after Ctrl-C or an error: it hides the cursor
            if not bar.finished:
                bar.render_finish()
