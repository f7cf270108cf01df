"""Text for people: tables, numbers with units, time spans, and what of a foreign text may be shown."""

import re
import reprlib
import unicodedata
from collections.abc import Collection, Iterator, Sequence


def columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Returns a table as text: rows of cells in aligned columns, the first row with a rule below it.

    Args:
        rows: the cells, headings first; every row has as many.
        right: the columns that are aligned at the right, counted from 0.

    >>> print(columns([["layer", "weights"], ["conv1", "864"], ["fc", "5,120"]], right=[1]))
    layer  weights
    --------------
    conv1      864
    fc       5,120
    """
    lines = ["  ".join(cells) for cells in _aligned(rows, right)]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Returns a table in Markdown, aligned in the source as well; its arguments are those of `columns`.

    >>> print(markdown_table([["layer", "weights"], ["a|b", "864"]], right=[1]))
    | layer | weights |
    |-------|--------:|
    | a\\|b  |     864 |
    """
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    head, *lines = (f"| {' | '.join(cells)} |" for cells in _aligned(rows, right))
    rule = "|".join("-" * (len(cell) + 1) + ":-"[i not in right] for i, cell in enumerate(next(_aligned(rows, right))))
    return "\n".join([head, f"|{rule}|", *lines])


def _aligned(rows: Sequence[Sequence[str]], right: Collection[int]) -> Iterator[list[str]]:
    """Yields each row with its cells filled up to the widths of their columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        yield [cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in cells]


def si(number: float) -> str:
    """Returns a number in three digits and a prefix.

    >>> si(8.18e9), si(72_608), si(0)
    ('8.18 G', '72.6 k', '0')
    """
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:
            digits = number / factor
            return f"{digits:.{2 if digits < 9.995 else 1 if digits < 99.95 else 0}f} {prefix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Returns a time span in its two largest units.

    >>> duration(8.44), duration(75), duration(7320)
    ('8.4 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def printable(text: str) -> str:
    r"""Returns ``text`` as it may be written to a terminal: what would command the terminal is shown instead.

    >>> print(printable("\x1b[2Jname\u202e"))
    \x1b[2Jname\u202e
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(x if _shows(x) else x.encode("unicode_escape").decode() for x in text)


def _shows(character: str) -> bool:
    # all but control, format (writing directions), surrogate, and unassigned characters, and ends of lines but one
    return character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")


def worded(text: str) -> str:
    """Returns a message of the library as the command line says it: ``skip=`` is the option ``--model.keep-dense``.

    >>> worded("leave it dense with skip='fc.weight'")
    "leave it dense with --model.keep-dense 'fc.weight'"
    """
    return re.sub(r"\b(only=None, )?skip=(?=(\S?))", lambda m: "--model.keep-dense" + " " * bool(m[2]), text)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 4
_SHORT.maxlevel = 2


def short(value: object) -> str:
    """Returns a value for a message, long ones cut.

    >>> short({"name": "x" * 1000})
    "{'name': 'xxxxxxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxx'}"
    """
    try:
        return printable(_SHORT.repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits
        return "a number of many digits" if isinstance(value, int) else f"a {type(value).__name__}"
