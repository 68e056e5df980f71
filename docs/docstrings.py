"""Lets the API pages show docstrings that are written for `help()`: an extension of griffe, which mkdocstrings uses.

In plain text a literal block follows `::`, an example starts with `>>>` and <w, y> is an inner product; in Markdown the
first would keep its second colon, the second would become a quotation and the third vanish as an HTML tag.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# A run of lines from `>>>` to the next blank line: the input and what it prints.
_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
_INNER_PRODUCT = re.compile(r"<(\w+, \w+)>")
_LITERAL_BLOCK = re.compile(r"::$", re.MULTILINE)


class PlainTextDocstrings(griffe.Extension):
    """Turns literal blocks, examples and inner products of every docstring into what Markdown calls them."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for each module, class, function and attribute that it reads."""
        if obj.docstring:
            text = _LITERAL_BLOCK.sub(":", _INNER_PRODUCT.sub(r"⟨\1⟩", obj.docstring.value))
            obj.docstring.value = _EXAMPLE.sub(lambda example: f"```pycon\n{example.group()}\n```", text)
