"""Files of torch.save, which may be damaged, cut off, or something else altogether."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PICKLE, _ZIP = b"\x80", b"PK"
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # with which files of torch before 1.6 begin


class UnreadableFile(OSError, ValueError):
    """A file cannot be read; the message names it and says what it is."""


def read_torch_file(path: Path, *, safe: Sequence[Any] = ()) -> Any:
    """Return what torch.save wrote, on the CPU, after a check of every checksum; no code in the file is executed.

    torch.save writes a zip file, whose checksums torch.load ignores: one flipped bit would become a wrong weight.
    Files of torch before 1.6 have no checksums. `safe` are types that the file may hold besides tensors and plain
    values.

    Raises:
        UnreadableFile: the file is damaged or no such file; the message says what it is.
        FileNotFoundError: there is no file.
    """
    with path.open("rb") as file:
        begin = file.read(512)
    if not begin.startswith((_ZIP, _LEGACY)):
        raise UnreadableFile(f"{path} is no PyTorch file but {_kind(begin)}")
    if begin.startswith(_ZIP):
        _check_sums(path)
    try:
        with torch.serialization.safe_globals(list(safe)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        lines = str(error).strip().splitlines() or ["nothing"]
        reason = next((line for line in lines if "GLOBAL" in line), lines[0])  # which names the object
        raise UnreadableFile(
            f"{path} holds objects whose unpickling can run code, and is not opened. If you trust it, save its "
            f"weights alone where it was made: torch.save({{'teacher': checkpoint['teacher']}}, 'weights.pth'). "
            f"PyTorch says: {reason}"
        ) from error
    except Exception as error:  # whatever a file that somebody else made can make of torch.load
        reason = str(error).splitlines() or [type(error).__name__]
        raise UnreadableFile(f"{path} is no readable PyTorch file ({reason[0]})") from error


def is_stored(value: Tensor) -> bool:
    """Return whether every number of a plain tensor is in memory: one of a few bytes can claim to have any shape."""
    return value.layout == torch.strided and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _check_sums(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            # torch.save compresses nothing, and what is small compressed may be larger than the memory.
            packed = [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]
            damaged = None if packed else archive.testzip()
    except Exception as error:  # a zip file can be wrong in many ways, and each has an exception of its own
        raise UnreadableFile(f"{path} is damaged, or its end is missing ({error})") from error
    if not any(name.endswith("/data.pkl") for name in names):
        raise UnreadableFile(f"{path} is no PyTorch file but another zip file ({', '.join(names[:3]) or 'empty'})")
    if packed:
        raise UnreadableFile(f"{path} is damaged, or not by torch.save, which compresses nothing: {packed[0]} is")
    if damaged is not None:
        raise UnreadableFile(f"{path} is damaged (the checksum of its part {damaged} is wrong)")


def _kind(begin: bytes) -> str:
    if not begin:
        return "empty"
    if not begin.strip(b"\0"):
        return "filled with zeros, as a crash can leave a file behind"
    if begin.startswith(_PICKLE):
        return "a pickle, whose unpickling can run code and which is not opened"
    try:
        text = begin.decode().lstrip()
    except UnicodeDecodeError as error:
        if error.start < len(begin) - 3:  # and not in the middle of the last character
            return "something else"
        text = begin[: error.start].decode().lstrip()
    if text.startswith("version https://git-lfs"):
        return "a pointer of Git LFS: run `git lfs pull` where it is from"
    if text[:200].lower().startswith(("<!doctype html", "<html")):
        return "a web page, as a failed download leaves it"
    return f"text ({text.splitlines()[0][:40]!r})" if text.isprintable() or "\n" in text else "something else"
