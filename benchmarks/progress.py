"""A progress bar where tqdm is installed, and no bar where it is not."""

from collections.abc import Iterable
from typing import Any, TypeVar

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

T = TypeVar("T")


def progress(things: Iterable[T], **options: Any) -> Iterable[T]:
    """`things`, one after the other, beside a bar with tqdm's `options`."""
    return things if tqdm is None else tqdm(things, **options)
