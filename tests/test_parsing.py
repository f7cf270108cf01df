"""Texts that someone else wrote: plain data, or an error of one line, soon."""

import pytest

from granet.parsing import from_json, from_toml, from_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("read", "content", "says"),
    [
        (from_json, "[" * 100_000 + "]" * 100_000, "nested too deeply"),
        (from_json, "{", "Expecting property name"),
        (from_json, b"\xff", "not UTF-8"),
        (from_json, "9" * 5000, "4300"),
        (from_toml, "a = " + "[" * 100_000 + "]" * 100_000, "nested too deeply"),
        (from_toml, ".".join("a" * 100_000) + " = 1", "line 1 has more than 500 dots"),
        (from_toml, "a = ", "Invalid value"),
        (from_toml, b"\xff", "not UTF-8"),
        (from_yaml, "[" * 100_000, "nest"),
        (from_yaml, "[" * 200 + "]" * 200, "nested more than 100 levels deep, line 1"),
        (from_yaml, BOMB, "more than 50,000 entries"),
        (from_yaml, "a: &a [*a]", r"the alias \*a holds itself, line 1"),
        (from_yaml, "a: *b", "undefined alias"),
        (from_yaml, "a: 1\na: 2", "'a' is given twice in the mapping of line 1"),
        (from_yaml, "? [1]\n: 2", "unhashable key"),
        (from_yaml, "when: 2001-13-45", "month"),
        (from_yaml, "n: " + "9" * 5000, "4300"),
        (from_yaml, "!!python/object/apply:os.system [true]", "could not determine a constructor"),
        (from_yaml, "a: [", "line 2"),
        (from_yaml, b"\xff", "not UTF-8"),
        (from_yaml, "\x00", "not allowed"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(read, content, says):
    with pytest.raises(ValueError, match=says) as error:
        read(content)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 300


def test_aliases_of_ordinary_files_are_read():
    assert from_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]") == {
        "a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}],
    }  # fmt: skip
