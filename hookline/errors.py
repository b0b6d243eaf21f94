"""Errors of the domain, of five kinds. `web/errors.py` maps each to a status, `manage.py` to a message.

HooklineError
├── NotFound      there is no such thing
├── Conflict      the request contradicts what is stored
├── Invalid       the input is wrong; `problems` lists every one
├── TooLarge      the input is over a limit
└── Unavailable   the database could not do it now: nothing was stored, try again
"""

from __future__ import annotations

from collections.abc import Sequence


class HooklineError(Exception):
    """An error whose sentence is for the user: it never holds a secret, SQL or a traceback."""


class NotFound(HooklineError):
    pass


class Conflict(HooklineError):
    pass


class Invalid(HooklineError):
    def __init__(self, sentence: str, problems: Sequence[str] = ()) -> None:
        super().__init__(sentence)
        self.problems = list(problems)


class TooLarge(HooklineError):
    pass


class Unavailable(HooklineError):
    pass


def visible(text: object) -> str:
    """Return a text on one line, safe for a terminal or a log: escapes such as `\\x1b` replace unprintable characters.

    These are control characters, line ends, bidirectional and zero-width marks, lone surrogates and unassigned code
    points. Ordinary text, non-ASCII letters included, stays as it is.
    """
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in plain)
