"""Pickles of published ground truths: plain containers and numpy arrays are read, nothing else is called."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np


def load_plain_pickle(path: Path) -> Any:
    """What the pickle holds, if it is made of dicts, lists, tuples, strings, numbers and numpy arrays alone.

    Pickles of numpy 1 and 2, Python 2 and 3 are read.

    Raises:
        ValueError: naming the path, when the pickle asks for anything else (which is not called), or is damaged.
    """
    with path.open("rb") as file:
        try:
            return _PlainUnpickler(file, encoding="latin1").load()  # the only encoding for arrays from Python 2
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"cannot read the pickle {str(path)!r}: {error}") from error


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 renamed `core` to `_core`; each reads the other's pickles.
        allowed = _CALLABLES.get((module.replace("numpy._core.", "numpy.core."), name))
        if allowed is None:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, but only containers, strings, numbers and numpy arrays are read"
            )
        return allowed


# How Python 3 writes bytes for Python 2. The functions that it names are not called: codecs.encode runs any registered
# codec, and bytes(n) takes n bytes of memory.
def _empty_bytes() -> bytes:
    return b""


def _latin1_bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}; only latin1 is read")
    return text.encode("latin1")


_CALLABLES = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    # Taken from numpy's own pickling, since their modules are private.
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy.core.multiarray", "scalar"): np.float64(0).__reduce__()[0],
    ("numpy.core.numeric", "_frombuffer"): np.empty(1).__reduce_ex__(5)[0],
    ("_codecs", "encode"): _latin1_bytes,
    ("__builtin__", "bytes"): _empty_bytes,
}
