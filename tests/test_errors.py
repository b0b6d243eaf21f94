"""Text that strangers wrote is shown without anything that a terminal would obey."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from hookline.errors import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("wh_1", "wh_1"),
        ("größer 日本 🏈", "größer 日本 🏈"),
        ("", ""),
        ("\x1b[2J", r"\x1b[2J"),
        ("two\r\nlines\tand\0", r"two\r\nlines\tand\x00"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("abc\u202edef\u2066", r"abc\u202edef\u2066"),
        ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
        ("a\u200bb\ufeff", r"a\u200bb\ufeff"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_cannot_be_printed_is_escaped(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_no_character_of_the_control_categories_comes_through() -> None:
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code)).startswith("C"):
            assert visible(chr(code)).startswith("\\"), hex(code)


def test_what_is_not_a_text_is_shown_too() -> None:
    assert visible(ValueError("bad\nline")) == r"bad\nline"
