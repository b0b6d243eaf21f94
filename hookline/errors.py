"""What can go wrong in the domain, five kinds. `web` maps each to a status, `manage.py` to a message.

HooklineError
├── NotFound      no such thing
├── Conflict      the request contradicts what is stored
├── Invalid       the input is wrong; `problems` lists every one
├── TooLarge      the input is over a limit
└── Unavailable   the database could not do it now; nothing was stored, try again
"""

from __future__ import annotations

from collections.abc import Sequence


class HooklineError(Exception):
    """The sentence is for the user: it never holds a secret, SQL or a traceback."""


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
    """The text on one line, safe for a terminal or a log: what cannot be printed becomes an escape such as `\\x1b`.

    That is control characters, line ends, bidirectional and zero-width marks, lone surrogates and unassigned code
    points. Ordinary text, non-ASCII letters included, stays as it is.
    """
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in plain)
