"""Pickles of published ground truths: plain containers and numpy arrays are read, nothing else is called."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np


def load_plain_pickle(path: Path) -> Any:
    """Return what the pickle holds, if it is made of dicts, lists, tuples, strings and numbers alone, or numpy arrays
    of them.

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
        allowed = _ALLOWED.get((module.replace("numpy._core.", "numpy.core."), name))
        if allowed is None:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, but only containers, strings, numbers and numpy arrays are read"
            )
        return allowed


# None of the functions that a pickle names is called. numpy's own take the bytes of a pickle for the addresses of
# Python objects, given the dtype object or one whose flags a pickle has cleared; codecs.encode runs any registered
# codec, and bytes(n) takes n bytes of memory.


class _Dtype:
    def __init__(self, code: str) -> None:
        if not re.fullmatch(r"[biufcSU][0-9]+", code):
            raise pickle.UnpicklingError(f"it asks for arrays of dtype {code!r}; only numbers and strings are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        values = _frombuffer(data, dtype, shape, "F" if is_fortran else "C")
        super().__setstate__((1, values.shape, values.dtype, is_fortran, values.tobytes("A")))


def _dtype(code: str, align: bool = False, copy: bool = False) -> _Dtype:
    return _Dtype(code)


def _reconstruct(kind: str, shape: tuple[int, ...], code: str | bytes) -> _Array:
    return np.empty(0).view(_Array)  # its state follows


def _scalar(dtype: _Dtype, data: bytes | str) -> np.generic:
    return _frombuffer(data, dtype, (), "C")[()]


def _frombuffer(data: bytes | str, dtype: _Dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    data = data.encode("latin1") if isinstance(data, str) else data  # str: bytes from Python 2
    if not isinstance(data, (bytes, bytearray)) or not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("it has a numpy array that is not made of bytes and a dtype")
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _empty_bytes() -> bytes:
    return b""


def _latin1_bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}; only latin1 is read")
    return text.encode("latin1")


# These are functions, because a pickle may set attributes of what it names, and those of a class would change its
# objects.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _dtype,
    ("numpy", "ndarray"): "ndarray",  # an argument of _reconstruct alone
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    # This is how Python 3 writes bytes for Python 2.
    ("_codecs", "encode"): _latin1_bytes,
    ("__builtin__", "bytes"): _empty_bytes,
}
