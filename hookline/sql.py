"""Hot statements as text, and the few places where the databases differ in it.

Building a statement with the ORM costs ten times what running it does; running one for each row costs a hand-over of
the GIL each. So what is on a hot path is one statement for a whole set, whose rows come as one JSON parameter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from peewee import Database


def rows(db: Database, *columns: str) -> str:
    """A FROM item with these columns, whose rows are the array of arrays in one parameter (see `parameter`).

    Its alias is `given`.
    """
    fields = [f"json_extract(value, '$[{place}]') AS {name}" for place, name in enumerate(columns)]
    return f"(SELECT {', '.join(fields)} FROM json_each({db.param})) AS given"


def parameter(values: Iterable[Sequence[Any]]) -> str:
    """Rows of plain values as the parameter that `rows` reads."""
    return json.dumps(list(values), ensure_ascii=False, separators=(",", ":"))
