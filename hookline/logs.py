"""Format of log lines: text that strangers sent can neither end a line nor command a terminal."""

from __future__ import annotations

import logging

from hookline.errors import visible

FORMAT = "%(levelname)s %(name)s: %(message)s"
INDENT = "  "


class OneLine(logging.Formatter):
    """Formats a record as one line with control characters escaped; a traceback follows, each line indented."""

    def __init__(self) -> None:
        super().__init__(FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        return visible(super().formatMessage(record))

    def formatException(self, ei: object) -> str:
        return indented(super().formatException(ei))  # type: ignore[arg-type]

    def formatStack(self, stack_info: str) -> str:
        return indented(super().formatStack(stack_info))


def indented(text: str) -> str:
    return "\n".join(INDENT + visible(line) for line in text.split("\n"))
