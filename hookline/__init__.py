"""Hookline: webhook registrations and signed, durable deliveries. This is what Python callers need.

Each name is loaded when it is first asked for, so that importing the errors loads no HTTP client and no database.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hookline.binding import connect
    from hookline.errors import Conflict, HooklineError, Invalid, NotFound, TooLarge, Unavailable
    from hookline.events import publish
    from hookline.manager import WebhookManager

__all__ = [
    "Conflict",
    "HooklineError",
    "Invalid",
    "NotFound",
    "TooLarge",
    "Unavailable",
    "WebhookManager",
    "connect",
    "publish",
]
MODULES = {"WebhookManager": "hookline.manager", "connect": "hookline.binding", "publish": "hookline.events"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(MODULES.get(name, "hookline.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
