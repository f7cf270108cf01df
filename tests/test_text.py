"""Tables and values as text."""

import pytest

from granet.text import columns, markdown_table, printable, short


def test_a_table_needs_rows_of_the_same_length():
    for draw in (columns, markdown_table):
        with pytest.raises(ValueError, match="zip"):
            draw([["a", "b"], ["1"]])


def test_the_rule_is_as_long_as_the_longest_line_and_no_line_ends_in_blanks():
    lines = columns([["name", "why"], ["x", "a long reason"], ["y", ""]]).splitlines()
    assert lines == ["name  why", "-" * len("x     a long reason"), "x     a long reason", "y"]


def test_a_table_may_have_headings_alone():
    assert columns([["a", "b"]]) == "a  b\n----"
    assert markdown_table([["a", "b"]], right=[1]) == "| a | b |\n|---|--:|"


def test_what_commands_a_terminal_is_shown_instead():
    assert printable("plain, naïve ≤ 90 %\n\ttext …") == "plain, naïve ≤ 90 %\n\ttext …"
    assert printable("\x1b]0;title\x07\r\x9b2J\u202e\ud800\u2028") == (r"\x1b]0;title\x07\r\x9b2J\u202e\ud800\u2028")


def test_values_are_short_in_messages():
    assert short("granet") == "'granet'"
    for value in ("x" * 10_000, list(range(10_000)), {i: i for i in range(1000)}, 10**5000, b"\x1b" * 999):
        assert len(short(value)) < 200
    nested = []
    for _ in range(10_000):
        nested = [nested]
    assert len(short(nested)) < 200
