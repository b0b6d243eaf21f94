"""Long work in short steps, written once as a generator: run at once, or beside other writers with rests between.

The generator yields actions, is sent the result of each, and returns the result of the whole:

    def work(webhook_id: str) -> Work[int]:
        ids = yield look(find_some, webhook_id)
        return (yield write(delete_some, ids))
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

from peewee import Database

from hookline.store.storage import Storage

T = TypeVar("T")


class Action(NamedTuple):
    """A call of `function(db, *arguments)`."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    writes: bool


Work = Generator[Action, Any, T]


def look(function: Callable[..., Any], *arguments: Any) -> Action:
    """An action that only reads."""
    return Action(function, arguments, writes=False)


def write(function: Callable[..., Any], *arguments: Any) -> Action:
    """An action that writes: one short unit of work."""
    return Action(function, arguments, writes=True)


def run(db: Database, work: Work[T]) -> T:
    """Carry out the work on this thread; raises what its actions raise."""
    result = None
    while True:
        try:
            action = work.send(result)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        result = action.function(db, *action.arguments)
        time.sleep(0)  # so that other threads get at the writer


async def run_beside(storage: Storage, work: Work[T]) -> T:
    """Carry out the work; after each write rest as long as it took, for other writers."""
    loop = asyncio.get_running_loop()
    result = None
    while True:
        try:
            action = work.send(result)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if action.writes:
            began = loop.time()
            result = await storage.write(action.function, *action.arguments)
            await asyncio.sleep(loop.time() - began)
        else:
            result = await storage.scan(action.function, *action.arguments)
