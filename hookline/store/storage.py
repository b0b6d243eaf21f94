"""Storage: the two ways in which an asynchronous caller may use a database.

    await storage.read(fn, *args)           fn(db, *args), a short look-up
    await storage.scan(fn, *args)           the same for work that may be long
    await storage.write(fn, *args)          fn(db, *args) in a transaction; returns once the commit is durable
    await storage.write_together(fn, item)  fn(db, [item, ...]), with all items that are waiting, returns a list

`fn` is an ordinary function that uses the database. No connection is ever held across an `await`.
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


def read_now(db: Database, fn: Callable[..., T], *args: Any) -> T:
    """`fn(db, *args)` on this thread, once more if the connection was lost. Raises Unavailable."""
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
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    future: asyncio.Future[Any]
    together: bool  # does `fn` take a list of the single argument of every such write, and return a list?

    def run(self, db: Database) -> Any:
        return self.fn(db, list(self.args))[0] if self.together else self.fn(db, *self.args)


class Storage:
    """The connection hook of one database: see `storage_of`. `start` and `stop` belong to the running event loop."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self._why_refused = STOPPING
        forks.follow_state(self)

    def forked(self) -> None:
        """In a child of a fork: our threads are the parent's, so nothing is taken any more."""
        self._why_refused = FORKED

    async def start(self) -> None:
        raise NotImplementedError

    async def stop(self) -> None:
        """Finish every write that was accepted, then close."""
        raise NotImplementedError

    async def read(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(db, *args)`, a point look-up or the like. Raises Unavailable if the database cannot be read."""
        raise NotImplementedError

    async def scan(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(db, *args)` in a worker thread, for what may take long. Raises Unavailable."""
        raise NotImplementedError

    async def write(self, fn: Callable[..., T], *args: Any) -> T:
        """`fn(db, *args)` in a transaction; returns when its commit is durable.

        `fn` touches nothing but the database: it is run again where something passing was in its way. Raises what
        `fn` raised (then it alone is rolled back), or Unavailable if it could not be committed.
        """
        raise NotImplementedError

    async def write_together(self, fn: Callable[[Database, list[Any]], Sequence[T]], item: Any) -> T:
        """Like `write` of `fn(db, [item])[0]`, but `fn` is called once with the items of all such writes that wait.

        One statement for a whole group costs little more than one for a single write. `fn` returns a result for each
        item, in order.
        """
        raise NotImplementedError

    def listen(self, wake: Callable[[], None]) -> None:
        """Call `wake` on the loop when another process has queued something, as far as the database can tell."""

    def notify(self) -> None:
        """Tell the other processes, soon, that something is queued. From any thread; one lost costs them a poll."""


def run_all(db: Database, group: Sequence[Write]) -> list[Any]:
    """The answer of each write, those that can run together in one call."""
    answers: list[Any] = [None] * len(group)
    sets: dict[Callable[..., Any], list[int]] = {}
    for place, write in enumerate(group):
        if write.together:
            sets.setdefault(write.fn, []).append(place)
        else:
            answers[place] = write.run(db)
    for function, places in sets.items():
        results = function(db, [group[place].args[0] for place in places])
        for place, result in zip(places, results, strict=True):
            answers[place] = result
    return answers


def resolve(group: list[Write], answers: list[Any]) -> None:
    for write, answer in zip(group, answers, strict=True):
        if write.future.done():  # the client went away
            continue
        if isinstance(answer, Exception):
            write.future.set_exception(answer)
        else:
            write.future.set_result(answer)
