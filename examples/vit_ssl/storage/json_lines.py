"""Rows in a file of JSON lines: a line that was cut off, by a crash or a full disk, costs that line only."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, none where there is no file; say on stderr which lines are damaged and left out."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = [parsed(line) for line in lines]
    if damaged := [str(number) for number, row in enumerate(rows, start=1) if row is None]:
        print(f"{path}: line {', '.join(damaged)} is damaged and left out", file=sys.stderr)
    return [row for row in rows if row is not None]


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append to a file with one write, beginning a new line where the last one was cut off."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else b"\n" + text
        written = file.write(text)  # at the end, wherever the position is
        if written < len(text):  # the disk is full: the second attempt says so
            file.write(text[written:])


def parsed(line: bytes | str) -> Row | None:
    """Return the row of a line; None for one that was cut off or is no JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, or thousands of brackets
        return None
    return row if isinstance(row, dict) else None
