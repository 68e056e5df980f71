"""Small pieces of the report's HTML, with their images inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from data.images import Images
from reporting.demo_table import COLUMNS, format_cell


def image(picture: Image.Image, alt: str, *, width: int | None = None, css: str = "") -> str:
    """Return a picture inside the page as PNG, `width` CSS pixels wide."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    size = f" width='{width}'" if width else ""
    return f"<img src='{_data_uri('image/png', buffer.getvalue())}' alt='{escape(alt)}' class='{css}'{size}>"


def chart(draw: Callable[[bool], str], alt: str) -> str:
    """Return an SVG drawn for a light and for a dark page, `draw(dark)`; the reader's setting chooses."""
    light, dark = (_data_uri("image/svg+xml", draw(is_dark).encode()) for is_dark in (False, True))
    source = f"<source srcset='{dark}' media='(prefers-color-scheme: dark)'>"
    return f"<picture>{source}<img src='{light}' alt='{escape(alt)}' class='fill'></picture>"


def table_html(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the demo's table, with the same cells as its text form."""
    head = "".join(f"<th>{escape(column)}</th>" for column in ("", *COLUMNS))
    rows = ""
    for row in table:
        cells = "".join(f"<td>{escape(format_cell(row, column))}</td>" for column in COLUMNS)
        rows += f"<tr><th scope='row'>{escape(row['model'])}</th>{cells}</tr>"
    return (
        f"<div class='scroll'><table class='numbers'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def neighbour_row(queries: Images, query: int, bank: Images, groups: Iterable[Sequence[int]]) -> str:
    """Return a query and groups of images of the bank, framed by whether they are of the query's class."""
    picture, label = queries[query]
    name = queries.classes[label].replace("_", " ")
    shown = ""
    for group in groups:
        cells = ""
        for neighbour in group:
            found, of = bank[neighbour]
            verdict = "right" if of == label else "wrong"
            cells += image(found, f"{verdict}: {bank.classes[of]}", width=44, css=verdict)
        shown += f"<span>{cells}</span>"
    return (
        f"<div class='neighbours'><span class='name'>{escape(name)}</span>{image(picture, name, width=44)}{shown}</div>"
    )


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
