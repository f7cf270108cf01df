"""A griffe extension for the documentation site: examples in docstrings (`>>> ...`) are shown as code.

Markdown takes `>>>` for a quotation inside of a quotation inside of a quotation, and a list that an example prints for
a link.
"""

import re

import griffe

_EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)  # up to the next empty line


class FencedDoctests(griffe.Extension):
    """Puts every example of a docstring into a fence."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = _EXAMPLE.sub(lambda found: f"```python\n{found[0]}\n```", obj.docstring.value)
