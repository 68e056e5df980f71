"""The sets that are out of distribution, as the command line names them: NAME=DATA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from data.images import LIBRARY_SETS, SPLITS

KINDS = ("out", "near", "far")


class OutSet(NamedTuple):
    """Images that are not of the data."""

    name: str
    kind: str
    """How far they are from the data as their user sees it: "near", "far", or "out" where nothing is said."""
    dataset: str
    data: Path | None

    def split(self, wanted: str) -> str:
        """Return the split to take: the wanted one, or that of a folder without splits, which is all of it."""
        whole = self.dataset == "folder" and not any((self.data / name).is_dir() for name in SPLITS if self.data)
        return "train" if whole else wanted


def parse_out_sets(named: Mapping[str, Iterable[str]]) -> list[OutSet]:
    """Return the sets of every kind, each given as NAME=DATA or as DATA alone, whose last part is then the name.

    DATA is one of the sets that come with libraries, a folder of class folders, or hub:NAME for a set of the hub.

    Raises:
        ValueError: a set has no data, or two sets have one name, or the name of a kind.
        FileNotFoundError: there is no such folder.
    """
    found: list[OutSet] = []
    for kind, texts in named.items():
        for text in texts:
            name, separator, data = text.partition("=")
            data = data if separator else text
            name = name if separator else Path(text.removeprefix("hub:")).name
            if not name or not data:
                raise ValueError(f"`{kind}` (={text!r}) must be NAME=DATA: {', '.join(LIBRARY_SETS)}, DIR or hub:NAME")
            if name in KINDS or name in {other.name for other in found}:
                raise ValueError(f"`{kind}` (={text!r}) must have a name of its own, not {name!r}")
            found.append(OutSet(name, kind, *_source(kind, data)))
    return found


def _source(kind: str, data: str) -> tuple[str, Path | None]:
    if data in LIBRARY_SETS:
        return data, None
    if data.startswith("hub:"):
        return "hub", Path(data.removeprefix("hub:"))
    if not Path(data).is_dir():
        raise FileNotFoundError(f"`{kind}` (={data!r}) must be {', '.join(LIBRARY_SETS)}, a folder or hub:NAME")
    return "folder", Path(data)
