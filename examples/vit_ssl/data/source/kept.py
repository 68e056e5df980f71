"""Where a run's images are, in OUTPUT/data.json: so that it can be resumed and evaluated without naming them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from storage.whole_file import whole_file

DATA = "data.json"


class Source(NamedTuple):
    """What the options --data and --images-per-epoch said when the run began."""

    data: Path | None = None
    """A folder, by its full path, or the name of a set on the hub; None for the images that come with libraries."""
    images_per_epoch: int | None = None
    """Length of a stream that does not say it itself."""


def read_source(output: Path) -> Source:
    """Return what `keep_source` wrote; an empty one where there is nothing, as in runs of earlier versions.

    Raises OSError when the file is damaged.
    """
    kept = _read(output)
    data, images = kept.get("data"), kept.get("images_per_epoch")
    if not isinstance(data, str | None) or not isinstance(images, int | None):
        raise OSError(f"{output / DATA} is damaged: remove it, and give --data again")
    return Source(None if data is None else Path(data), images)


def keep_source(output: Path, source: Source, found: dict[str, Any] | None = None) -> None:
    """Write OUTPUT/data.json, with what a look at the images `found`; without that, what was found before stays."""
    data = source.data
    if data is not None:
        data = data.resolve() if data.is_dir() else data
    kept = {"data": None if data is None else str(data), "images_per_epoch": source.images_per_epoch}
    before = _read(output)
    kept |= {"found": before.get("found") if found is None else found}
    if kept != before:
        with whole_file(output / DATA) as file:
            file.write(json.dumps(kept, indent=1).encode())


def _read(output: Path) -> dict[str, Any]:
    path = output / DATA
    if not path.is_file():
        return {}
    try:
        kept = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        kept = None
    if not isinstance(kept, dict):
        raise OSError(f"{path} is damaged: remove it, and give --data again")
    return kept
