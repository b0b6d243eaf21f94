"""A line in the log is ours: a stranger can neither end it, nor begin another, nor command a terminal."""

from __future__ import annotations

import io
import logging

import pytest

from hookline.logs import OneLine

FORGED = "x\nINFO hookline: all is well\r\n\x1b[2J\x1b]0;title\x07\u202e\u2028\x85\x00\udcff"


@pytest.fixture
def written() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def log(written: io.StringIO) -> logging.Logger:
    handler = logging.StreamHandler(written)
    handler.setFormatter(OneLine())
    logger = logging.Logger("hookline")
    logger.addHandler(handler)
    return logger


def test_a_message_with_control_characters_is_one_line_of_printable_ones(
    log: logging.Logger, written: io.StringIO
) -> None:
    log.warning("no delivery to %s: %s", FORGED, "přijato ☃")
    (line,) = written.getvalue().splitlines()
    assert line.startswith("WARNING hookline: no delivery to x\\nINFO hookline: all is well\\r\\n\\x1b[2J\\x1b]0;title")
    assert line.endswith(": přijato ☃")
    assert line.isprintable()


def test_a_traceback_stays_readable_and_none_of_its_lines_looks_like_a_record(
    log: logging.Logger, written: io.StringIO
) -> None:
    try:
        raise ValueError(FORGED)
    except ValueError:
        log.exception("it failed", stack_info=True)
    first, *others = written.getvalue().split("\n")[:-1]
    assert first == "ERROR hookline: it failed"
    assert len(others) > 5
    assert all(line.startswith("  ") and line.isprintable() for line in others)
    assert "  Traceback (most recent call last):" in others
