"""The tables: `models.py`, which in the source tree stands beside this package, and in a wheel is inside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models import *  # noqa: F403
else:
    try:
        from hookline.models import *  # noqa: F403
    except ModuleNotFoundError as exc:
        if exc.name != "hookline.models":
            raise
        from models import *  # noqa: F403
