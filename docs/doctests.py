"""Examples in docstrings as code: Markdown would take ``>>>`` for quotations, and lists behind them for links."""

import re
from typing import Any

import griffe

# From a prompt up to the next empty line: doctest's own idea of an example.
_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts each example of a docstring into a fence."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None and ">>>" in obj.docstring.value:
            obj.docstring.value = _EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
