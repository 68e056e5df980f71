"""What came of one damaged file: it was read, or an error said what is wrong with it, or something went wrong."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fuzz.watch import Hangs, Watch
from runtime.failure import explain

SECONDS = 20
"""A reader that takes more processor time hangs."""
READ, TOLD = "read", "told"
CRASH, UNCLEAR, SILENT, HANG, FORBIDDEN = "crash", "unclear", "silent", "hang", "forbidden"
WRONG = (CRASH, UNCLEAR, SILENT, HANG, FORBIDDEN)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One of the words above, and what there is to say about it."""

    kind: str
    detail: str = ""


def judge(
    read: Callable[[], Any], watch: Watch, *, names: Sequence[str], expected: str | None, mark: Path | None = None
) -> Verdict:
    """Return what comes of reading a damaged file.

    Args:
        read: the reader.
        watch: which sees what it does.
        names: an error must have one of them in its message: those of the damaged file and of the folder it is in.
        expected: the fingerprint of what the whole file holds, where its format has checksums; else None.
        mark: a file that code in a hostile file would make.
    """
    try:
        with watch.watching(SECONDS) as seen:
            found = read()
        verdict = Verdict(READ)
        if expected is not None and fingerprint(found) != expected:
            verdict = Verdict(SILENT, "other content was read without an error")
    except Hangs:
        verdict = Verdict(HANG, f"no end within {SECONDS} seconds of processor time")
    except Exception as error:
        message = explain(error)
        if message is None:
            verdict = Verdict(CRASH, f"{type(error).__name__}: {error}"[:300])
        elif not any(name in message for name in names):
            verdict = Verdict(UNCLEAR, f"{type(error).__name__}: {message}"[:300])
        else:
            verdict = Verdict(TOLD, message[:300])
    if mark is not None and mark.exists():
        mark.rmdir()
        return Verdict(FORBIDDEN, "code of the file was executed")
    return Verdict(FORBIDDEN, seen[0][:300]) if seen else verdict


def fingerprint(value: Any) -> str:
    """Return a digest of what a file holds: of tensors, arrays, containers, dataclasses and plain values."""
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> list[bytes]:
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return [str((value.dtype, value.shape)).encode(), value.tobytes()]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return [part for key, item in value.items() for part in (repr(key).encode(), *_parts(item))]
    if isinstance(value, list | tuple):
        return [part for item in value for part in (b"item", *_parts(item))]
    return [repr(value).encode()]
