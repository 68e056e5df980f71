"""Typesets the formulas as the site is built: TeX becomes MathML, which browsers draw without scripts or a network.

Formulas are written as GitHub reads them, too: `$...$` within a line, a fence called `math` for one by itself. This is
a hook of MkDocs; mkdocs.yml names it.
"""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

# A dollar sign that opens has no space behind it, one that closes none before it and no digit behind it.
_INLINE = r"(?<![\\$\w])\$(?![\s$])((?:[^$\\\n]|\\.)+?)(?<!\s)\$(?![\d$])"
# Where the notation that GitHub takes and the one that the converter takes differ.
_REWRITTEN = (
    (r"\\(begin|end)\{aligned\}", r"\\\1{align*}"),
    (r"\\(?:mathrm|operatorname)\{(\w\w+)\}", r"\\text{\1}"),  # one word in place of single letters
    (r"\\(log|exp|max|min)(?=\s+[^\s(^_])", r"\\\1\\,"),  # TeX's thin spaces behind a function and before it
    (r"(?<=[\w}])\s+(?=\\(log|exp|max|min)\b)", r"\\, "),
)
# Where MathML's spaces around operators differ from TeX's: a slash has none, a minus behind "(" or "=" is a sign.
_RESPACED = (
    (r"<mo>(&#x0002F;)</mo>", r'<mo lspace="0" rspace="0">\1</mo>'),
    (r"((?:&#x00028;|&#x0005B;|&#x0003D;)</mo>)<mo>(&#x02212;)", r'\1<mo form="prefix">\2'),
)
_LONG = 30  # characters: a line of a telephone; browsers do not break a formula
_INLINE_PRIORITY = 185  # after code spans (190), before backslash escapes (180)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Called by MkDocs once, with what mkdocs.yml says: adds both notations to the Markdown reader."""
    fence = {"name": "math", "class": "math", "format": _fence}
    config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", []).append(fence)
    config.markdown_extensions.append(_InlineMath())
    return config


def mathml(tex: str, display: str = "inline") -> str:
    """A `<math>` element for one formula; PluginError where the converter does not know a command."""
    for pattern, replacement in _REWRITTEN:
        tex = re.sub(pattern, replacement, tex)
    try:
        element = convert(tex, display=display)
    except Exception as error:
        raise PluginError(f"the formula {tex!r} is not understood: {error!r}") from error
    if unknown := re.search(r"\\\w+", "".join(ElementTree.fromstring(element).itertext())):
        raise PluginError(f"the formula {tex!r} has a command that is not understood: {unknown[0]}")
    for pattern, replacement in _RESPACED:
        element = re.sub(pattern, replacement, element)
    return element


def _fence(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="math" tabindex="0">{mathml(source.strip(), display="block")}</div>'


class _InlineMath(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(_InlineProcessor(_INLINE, md), "mathml", _INLINE_PRIORITY)


class _InlineProcessor(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:
        element = mathml(m[1])
        if len("".join(ElementTree.fromstring(element).itertext())) > _LONG:
            element = f'<span class="long-math">{element}</span>'
        return self.md.htmlStash.store(element), m.start(0), m.end(0)
