"""The checksums of a folder's files, kept in the folder as `sha256sum` writes them: FOLDER/SHA256SUMS."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from storage.torch_file import UnreadableFile

CHECKSUMS = "SHA256SUMS"


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file in `folder`, which has no subfolders; `sha256sum -c SHA256SUMS` compares them."""
    paths = sorted(path for path in folder.iterdir() if path.name != CHECKSUMS)
    (folder / CHECKSUMS).write_text("".join(f"{_sha256(path)}  {path.name}\n" for path in paths))


def check_checksums(folder: Path) -> None:
    """Compare the files in `folder` with what `write_checksums` wrote.

    Raises:
        UnreadableFile: a file, or the list of checksums itself, is damaged or gone; the message names it.
        FileNotFoundError: there is no list of checksums.
    """
    listing = folder / CHECKSUMS
    lines = listing.read_text(errors="replace").splitlines()
    found = [re.fullmatch(r"([0-9a-f]{64})  ([^/]+)", line) for line in lines]
    if not all(found) or not found:
        raise UnreadableFile(f"{listing} is damaged: it must hold a checksum and the name of a file in every line")
    for digest, name in (match.groups() for match in found if match):
        path = folder / name
        if not path.is_file():
            raise UnreadableFile(f"{path} is gone, or its name in {listing} is damaged")
        if _sha256(path) != digest:
            raise UnreadableFile(
                f"{path} is damaged, or its checksum in {listing} is (remove that list if you changed the file)"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
