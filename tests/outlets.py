"""Outlets for tests: what publishing in this process may take, with a worker that does nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hookline.lanes import MAX_PAYLOAD, NO_SLOTS, Outlet, Slots, Wake


def outlet(
    slots: Slots = NO_SLOTS,
    *,
    wake: Callable[[Wake], Any] = lambda wake: None,
    lease: float = 60,
    max_payload: int = MAX_PAYLOAD,
) -> Outlet:
    return Outlet(max_payload, lease, lambda: slots, wake)
