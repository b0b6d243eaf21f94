"""Storage: the service's connection-per-request hook.

A request, or a step of the worker, uses the database through one of four methods:

    await storage.read(fn, *args)           fn(db, *args), a short look-up
    await storage.scan(fn, *args)           the same for work that may be long
    await storage.write(fn, *args)          fn(db, *args) in a transaction; returns once the commit is durable
    await storage.write_together(fn, item)  fn(db, [item, ...]), with all items that are waiting for the same `fn`

`fn` is an ordinary function. Each call is one unit of work: on the thread that runs `fn` a connection is checked out of
the pool, and given back before the caller goes on after its `await`. That happens in one place, `units.connected`,
which `read_now` enters for reads and `units.unit` for writes. So no connection is held across an `await`, and between
calls nobody has one.

It is no ASGI middleware, since Peewee keeps the connection by thread: requests share the event loop's thread, and would
share a connection and its transaction. A write that was answered could be rolled back with another's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from peewee import Database

from hookline.errors import Unavailable
from hookline.store import forks
from hookline.store.failures import is_lost
from hookline.store.units import Unreachable, connected

T = TypeVar("T")

GROUP_LIMIT = 500  # writes in one commit
STOPPING = "the service is stopping; nothing was stored"
FORKED = "this process was forked from the one that runs the storage: start one here; nothing was stored"


class Storage:
    """The hook of one database, made by `open.storage_of`; `start` and `stop` run on the event loop that uses it."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self._why_refused = STOPPING
        forks.follow_state(self)

    def forked(self) -> None:
        """Refuse everything in a child of a fork: the threads are the parent's."""
        self._why_refused = FORKED

    async def start(self) -> None:
        raise NotImplementedError

    async def stop(self) -> None:
        """Finish every write that was accepted, then close all connections."""
        raise NotImplementedError

    async def read(self, fn: Callable[..., T], *args: Any) -> T:
        """Return `fn(db, *args)`, a look-up by key or of one page. Raises Unavailable."""
        raise NotImplementedError

    async def scan(self, fn: Callable[..., T], *args: Any) -> T:
        """Return `fn(db, *args)`, which may take long, from a worker thread. Raises Unavailable."""
        raise NotImplementedError

    async def write(self, fn: Callable[..., T], *args: Any) -> T:
        """Run `fn(db, *args)` in a transaction; return its result when the commit is durable.

        `fn` must touch nothing but the database: after a transient failure it is run again. Raises what `fn` raises
        (only its own changes are rolled back then), and Unavailable if they cannot be committed.
        """
        raise NotImplementedError

    async def write_together(self, fn: Callable[[Database, list[Any]], Sequence[T]], item: Any) -> T:
        """Like `write` of `fn(db, [item])[0]`, but one call of `fn` takes the items of all such writes that wait.

        One statement for many items costs little more than for one. Writes are grouped by the identity of `fn`: pass
        a function of a module, never a lambda or a partial made for the call. `fn` returns a result for each item, in
        order.
        """
        raise NotImplementedError

    def listen(self, wake: Callable[[], None]) -> None:
        """Call `wake` on the loop when another process has opened a lane, if the database can tell."""

    def notify(self) -> None:
        """Tell other processes soon, from any thread, that a lane is open. A lost notice costs them one poll."""


def read_now(db: Database, fn: Callable[..., T], *args: Any) -> T:
    """Return `fn(db, *args)` from this thread; run it again if the connection was lost. Raises Unavailable."""
    try:
        with connected(db):
            return fn(db, *args)
    except Unreachable:
        raise
    except Unavailable as exc:
        if not is_lost(exc):
            raise
    with connected(db):
        return fn(db, *args)


class Write(NamedTuple):
    """A write that waits for its commit; with `together` it is of `write_together`, and `args` is its item alone."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    future: asyncio.Future[Any]
    together: bool

    def run(self, db: Database) -> Any:
        return self.fn(db, list(self.args))[0] if self.together else self.fn(db, *self.args)


def run_all(db: Database, group: Sequence[Write]) -> list[Any]:
    """Run each write, those together that share their `fn`; returns their results in the order of the group."""
    results: list[Any] = [None] * len(group)
    positions: dict[Callable[..., Any], list[int]] = {}
    for position, write in enumerate(group):
        if write.together:
            positions.setdefault(write.fn, []).append(position)
        else:
            results[position] = write.run(db)
    for fn, shared in positions.items():
        items = [group[position].args[0] for position in shared]
        for position, result in zip(shared, fn(db, items), strict=True):
            results[position] = result
    return results


def resolve(group: list[Write], results: list[Any]) -> None:
    """Resolve the future of each write with its result, or with the exception that is in its place."""
    for write, result in zip(group, results, strict=True):
        if write.future.done():  # the client went away
            continue
        if isinstance(result, Exception):
            write.future.set_exception(result)
        else:
            write.future.set_result(result)
